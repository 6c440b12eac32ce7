"""The contract of metrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from iec_eval.noise import Noise
from iec_eval.testing.checks import SEED, Options, build, check_declaration, ensure, run_checks

Inputs = Callable[[Tensor], Any]


def check_metric(
    cls: type[Any],
    options: Options | None = None,
    *,
    inputs: Inputs | None = None,
    images: int = 96,
    tolerance: float = 1e-6,
    skip: Collection[str] = (),
) -> None:
    """Check that a metric is a function of the set of images.

    ``inputs(indices [B])`` gives what :meth:`Metric.update` takes, a pure function of the index;
    by default random features as wide as the metric's network's, or random uint8 images for a
    metric without one. Properties: ``declaration``, ``result`` (finite floats by name, twice the
    same), ``batches`` (one update or many), ``order``, ``merge`` (two halves make the whole),
    ``empty`` (merging a metric that saw nothing changes nothing), ``reset``.
    """
    case = _MetricCase(cls, options or {}, inputs, images, tolerance)
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "result": case.result,
        "batches": case.batches,
        "order": case.order,
        "merge": case.merge,
        "empty": case.empty,
        "reset": case.reset,
    }
    run_checks(cls, checks, skip)


@dataclass
class _MetricCase:
    cls: type[Any]
    options: Options
    inputs: Inputs | None
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

    def updated(self, batches: Sequence[Sequence[int]]) -> Any:
        metric = build(self.cls, self.options)
        metric.prepare(self.images)
        for batch in batches:
            self._update(metric, batch)
        return metric

    def _update(self, metric: Any, indices: Sequence[int]) -> None:
        chosen = torch.tensor(list(indices))
        metric.update(self.inputs(chosen) if self.inputs else _toy_inputs(metric, chosen), chosen)

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


def _toy_inputs(metric: Any, indices: Tensor) -> Any:
    """Random features, or images for a metric without a network, each a function of its index."""
    images = indices.tolist()
    if metric.network is None:
        noise = Noise(SEED, images, (3, 16, 16)).initial()
        return ((noise + 2) * 64).clamp(0, 255).to(torch.uint8)
    from iec_eval.metrics.features import Features

    width = metric.network.dimensions
    features = Noise(SEED, images, (width,)).initial().relu()
    return Features(features, 2 * Noise(SEED + 1, images, (10,)).initial())
