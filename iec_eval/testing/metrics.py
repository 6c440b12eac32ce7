"""The contract of metrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from iec_eval.intervals import Estimate
from iec_eval.metrics.base import PairedMetric, Pairs
from iec_eval.metrics.features import Features
from iec_eval.models.base import DiffusionModel
from iec_eval.noise import Noise
from iec_eval.testing.checks import SEED, Options, build, check_declaration, ensure, run_checks
from iec_eval.testing.tiny import TinyModel

ROW = "full precision"
Inputs = Callable[[Tensor], Any]


def check_metric(
    cls: type[Any],
    options: Options | None = None,
    *,
    inputs: Inputs | None = None,
    model: DiffusionModel | None = None,
    images: int = 96,
    tolerance: float = 1e-6,
    skip: Collection[str] = (),
) -> None:
    """Check that a metric is a function of the set of images.

    ``inputs(indices [B])`` gives what :meth:`Metric.update` takes, a pure function of the index;
    by default random features as wide as the metric's network's, random uint8 images for a metric
    without one, pairs of them for a paired metric. ``model`` is the one the metric is bound to, by
    default one with captions and images of 32x32 pixels. Properties: ``declaration``, ``result``
    (finite floats by name, twice the same), ``batches`` (one update or many), ``order``, ``merge``
    (two halves make the whole), ``empty`` (merging a metric that saw nothing changes nothing),
    ``reset``, ``estimates`` (the numbers of ``compute()``; influence values are float64, one an
    image in the order of indices, with mean zero, whatever the batches), ``pairs`` (of a paired
    metric: images without network are compared with the
    reference, whose row the protocol names).
    """
    case = _MetricCase(cls, options or {}, inputs, model or _PicturesModel(), images, tolerance)
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "result": case.result,
        "batches": case.batches,
        "order": case.order,
        "merge": case.merge,
        "empty": case.empty,
        "reset": case.reset,
        "estimates": case.estimates,
        "pairs": case.pairs,
    }
    run_checks(cls, checks, skip)


@dataclass
class _MetricCase:
    cls: type[Any]
    options: Options
    inputs: Inputs | None
    model: DiffusionModel
    images: int
    tolerance: float
    _whole: dict[str, float] = field(default_factory=dict)

    def declaration(self) -> None:
        check_declaration(self.cls)

    def result(self) -> None:
        metric = self.updated([range(self.images)])
        result = metric.compute()
        ensure(isinstance(result, dict) and len(result) > 0, f"compute() gives {result!r}")
        for name, value in result.items():
            ensure(isinstance(name, str), f"compute(): wanted names, got {name!r}")
            ensure(isinstance(value, float), f"compute(): {name} is {value!r}, wanted a float")
            ensure(abs(value) < float("inf"), f"compute(): {name} is {value}")
        self._ensure_equal(metric, "computing again")

    def batches(self) -> None:
        third = self.images // 3
        cut = [range(third), range(third, third + 1), range(third + 1, self.images)]
        self._ensure_equal(self.updated(cut), "the same images in three batches")

    def order(self) -> None:
        shuffled = torch.randperm(self.images, generator=torch.Generator().manual_seed(SEED))
        halves = shuffled.chunk(2)
        self._ensure_equal(
            self.updated([half.tolist() for half in halves]), "the same images in another order"
        )

    def merge(self) -> None:
        third = self.images // 3
        metric = self.updated([range(third)])
        metric.merge_state(self.updated([range(third, self.images)]))
        self._ensure_equal(metric, "two parts merged")

    def empty(self) -> None:
        metric = self.updated([range(self.images)])
        metric.merge_state(self.updated([]))
        self._ensure_equal(metric, "merged with one that saw no image")

    def reset(self) -> None:
        metric = self.updated([range(self.images // 2)])
        metric.reset()
        self._update(metric, range(self.images))
        self._ensure_equal(metric, "reset and used again")

    def estimates(self) -> None:
        half = self.images // 2
        found = self._estimates([range(self.images)])
        again = self._estimates([range(half, self.images), range(half)])
        for name, wanted in self.updated([range(self.images)]).compute().items():
            ensure(name in found, f"estimates() lacks {name}, which compute() gives")
            close = abs(found[name].value - wanted) <= self.tolerance * max(1.0, abs(wanted))
            ensure(close, f"estimates() gives {name} = {found[name].value!r}, compute() {wanted!r}")
        for name, one in found.items():
            if one.influence is not None:
                self._check_influence(name, one.influence, again[name].influence)

    def _check_influence(self, name: str, influence: Tensor, again: Tensor | None) -> None:
        shape, kind = tuple(influence.shape), influence.dtype
        ensure(
            (shape, kind) == ((self.images,), torch.float64),
            f"influence on {name} is {kind} {shape}, wanted float64 ({self.images},)",
        )
        ensure(bool(influence.isfinite().all()), f"influence on {name} is not finite")
        scale = max(1.0, float(influence.abs().max()))
        centred = abs(float(influence.mean())) <= self.tolerance * scale
        ensure(centred, f"influence on {name} has the mean {float(influence.mean()):.3g}, wanted 0")
        same = again is not None and bool(
            torch.allclose(influence, again, rtol=0, atol=self.tolerance * scale)
        )
        ensure(same, f"influence on {name} depends on the order of the batches")

    def _estimates(self, batches: Sequence[Sequence[int]]) -> dict[str, Estimate]:
        metric = self.updated(batches)
        chosen = [torch.tensor(list(batch)) for batch in batches]
        found: dict[str, Estimate] = metric.estimates(
            [(self._shown(metric, indices), indices) for indices in chosen]
        )
        return found

    def pairs(self) -> None:
        if not issubclass(self.cls, PairedMetric):
            return
        metric = self.updated([range(self.images)])
        ensure(metric.network is None, "a paired metric gets images, but this one has a network")
        named = ROW in metric.protocol().values()
        ensure(named, f"protocol() does not name the row compared with: {metric.protocol()}")
        alike = self.updated([])
        for part in torch.arange(self.images).split(self.images // 3):
            shown = self._shown(alike, part)
            alike.update(Pairs(shown.images, shown.images), part)
        ensure(
            alike.compute() != metric.compute(),
            "another reference gives the same result: it is not compared with",
        )

    def updated(self, batches: Sequence[Sequence[int]]) -> Any:
        metric = build(self.cls, self.options)
        if isinstance(metric, PairedMetric):
            metric.reference_row = ROW
        metric.bind(self.model)
        metric.prepare(self.images)
        for batch in batches:
            self._update(metric, batch)
        return metric

    def _update(self, metric: Any, indices: Sequence[int]) -> None:
        chosen = torch.tensor(list(indices))
        metric.update(self._shown(metric, chosen), chosen)

    def _shown(self, metric: Any, indices: Tensor) -> Any:
        if self.inputs is not None:
            return self.inputs(indices)
        return _toy_inputs(metric, indices, self.model.image_shape)

    def _ensure_equal(self, metric: Any, what: str) -> None:
        if not self._whole:
            self._whole = self.updated([range(self.images)]).compute()
        with warnings.catch_warnings():
            # torchmetrics warns of a compute() before any update(), which merging makes possible
            warnings.simplefilter("ignore")
            found = metric.compute()
        ensure(found.keys() == self._whole.keys(), f"{what} gives other names: {set(found)}")
        for name, wanted in self._whole.items():
            limit = self.tolerance * max(1.0, abs(wanted))
            ensure(
                abs(found[name] - wanted) <= limit,
                f"{what} gives {name} = {found[name]!r}, wanted {wanted!r} within {limit:.2g}",
            )


class _PicturesModel(TinyModel):
    """Large enough for every built-in metric; only what metrics are told about it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = (3, 32, 32)

    def captions(self, images: Sequence[int]) -> list[str]:
        return [f"a picture of a {('cat', 'dog', 'ship')[index % 3]}" for index in images]


def _toy_inputs(metric: Any, indices: Tensor, shape: tuple[int, int, int]) -> Any:
    """Random features, or images for a metric without a network, each a function of its index."""
    images = indices.tolist()
    if isinstance(metric, PairedMetric):
        return Pairs(_pictures(images, shape, SEED), _pictures(images, shape, SEED + 1))
    if metric.network is None:
        return _pictures(images, shape, SEED)
    width = metric.network.dimensions
    features = Noise(SEED, images, (width,)).initial().relu()
    return Features(features, 2 * Noise(SEED + 1, images, (10,)).initial())


def _pictures(images: Sequence[int], shape: tuple[int, int, int], seed: int) -> Tensor:
    return ((Noise(seed, images, shape).initial() + 2) * 64).clamp(0, 255).to(torch.uint8)
