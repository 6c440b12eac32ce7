"""Contract checks for plugin authors, one line each, in any test framework.

    def test_my_sampler() -> None:
        check_sampler(MySampler, {"steps": 8})

Each ``check_*`` builds the class from its options, runs it on a tiny network, and raises
AssertionError saying which property does not hold. Properties have names; ``skip`` leaves some
out, for a class that breaks one on purpose and says so.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iec_eval.calibration import Bench
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser, Step, denoise
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.models.base import DiffusionModel
from iec_eval.noise import Draw, Noise
from iec_eval.options import BaseOptions, validated
from iec_eval.samplers.base import Sampler, State
from iec_eval.samplers.ddim import DDIM
from iec_eval.schedule import NoiseSchedule

__all__ = [
    "TinyModel",
    "check_callback",
    "check_efficiency_method",
    "check_metric",
    "check_model",
    "check_sampler",
]

# out of order and with gaps, so that a position is never mistaken for an index
IMAGES = (3, 1, 40, 0, 9)
OTHERS = (7, 8)
SEED = 11
STEPS = 5
PREDICTIONS = frozenset({"epsilon", "v", "sample", "flow"})
Options = Mapping[str, Any]
Inputs = Callable[[Tensor], Any]


def check_sampler(
    cls: type[Sampler],
    options: Options | None = None,
    *,
    model: DiffusionModel | None = None,
    tolerance: float = 1e-4,
    skip: Collection[str] = (),
) -> None:
    """Check that a sampler is pure and treats every image alike.

    Properties: ``declaration``, ``finite``, ``previews`` (needless ones leave no trace),
    ``purity`` (a step called again gives the same and changes nothing it was given),
    ``second trajectory``, ``fresh instance`` (the loop by hand on a new one), ``batch`` (five
    images together are five alone, up to ``tolerance`` of the largest value).
    """
    case = _SamplerCase(cls, options or {}, model or TinyModel(), tolerance)
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "finite": case.finite,
        "previews": case.previews,
        "purity": case.purity,
        "second trajectory": case.second_trajectory,
        "fresh instance": case.fresh_instance,
        "batch": case.batch,
    }
    _run_checks(cls, checks, skip)


def check_efficiency_method(
    cls: type[EfficiencyMethod],
    options: Options | None = None,
    *,
    model: DiffusionModel | None = None,
    sampler: Sampler | None = None,
    images: int = 8,
    tolerance: float = 1e-4,
    skip: Collection[str] = (),
) -> None:
    """Check that an efficiency method keeps no state beside its artifact and the clock.

    ``model`` is a guided, class-conditional UNet2DModel unless given, see :class:`TinyModel`;
    ``images`` are for calibration. Properties: ``declaration``, ``full steps``, ``finite``,
    ``artifact`` (after saving and loading bit-equal), ``calibration`` (repeats bit-equal),
    ``second trajectory``, ``extra evaluations`` (with store=False, they change no later step),
    ``rows`` (some images of a batch alone), ``batch``, ``composition`` (before and after a toy
    method of every other slot).
    """
    chosen = model or TinyModel()
    run = sampler or _build(DDIM, {"steps": STEPS}, chosen.schedule)
    case = _MethodCase(cls, options or {}, chosen, run, images, tolerance)
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "full steps": case.full_steps,
        "finite": case.finite,
        "artifact": case.artifact,
        "calibration": case.calibration,
        "second trajectory": case.second_trajectory,
        "extra evaluations": case.extra_evaluations,
        "rows": case.rows,
        "batch": case.batch,
        "composition": case.composition,
    }
    _run_checks(cls, checks, skip)


def check_callback(
    cls: type[DenoisingCallback],
    options: Options | None = None,
    *,
    neutral: Options | None = None,
    samplers: Sequence[Sampler] | None = None,
    model: DiffusionModel | None = None,
    tolerance: float = 1e-4,
    skip: Collection[str] = (),
) -> None:
    """Check that a callback is a function of the image alone, on every built-in sampler.

    Properties: ``declaration``, ``finite``, ``neutral`` (with the options ``neutral``, bit-equal
    to no callback), ``inputs`` (changes nothing it was given), ``second trajectory``, ``batch``,
    ``cached network`` (works when every other step is cached). ``samplers`` replaces the built-in
    ones.
    """
    chosen = model or TinyModel()
    runs = _builtin_samplers(chosen.schedule) if samplers is None else samplers
    case = _CallbackCase(cls, options or {}, neutral, chosen, runs, tolerance)
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "finite": case.finite,
        "neutral": case.neutral_options,
        "inputs": case.inputs,
        "second trajectory": case.second_trajectory,
        "batch": case.batch,
        "cached network": case.cached_network,
    }
    _run_checks(cls, checks, skip)


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
    _run_checks(cls, checks, skip)


def check_model(
    cls: type[DiffusionModel], options: Options | None = None, *, skip: Collection[str] = ()
) -> None:
    """Check that a model's parts agree with each other.

    Properties: ``declaration``, ``schedule``, ``labels`` (depend on the index alone),
    ``skeleton`` (on the meta device, with the parameters of the network), ``weights`` (in eval
    mode, on the CPU, the same every time), ``prediction`` (has the latent's shape), ``decode``
    (uint8, image by image), ``identity``.
    """
    case = _ModelCase(cls, options or {})
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "schedule": case.schedule,
        "labels": case.labels,
        "skeleton": case.skeleton,
        "weights": case.weights,
        "prediction": case.prediction,
        "decode": case.decode,
        "identity": case.identity,
    }
    _run_checks(cls, checks, skip)


class TinyOptions(BaseOptions):
    """Options of the tiny model."""

    seed: int = Field(0, ge=0, description="of the random weights")
    guidance: float = Field(2.0, ge=0, description="classifier-free guidance scale")


class TinyModel(DiffusionModel):
    """A class-conditional UNet2DModel with random weights; or the UNet2DModel ``network``."""

    name = "tiny"
    Options = TinyOptions

    def __init__(
        self, options: TinyOptions | None = None, *, network: nn.Module | None = None
    ) -> None:
        chosen = options or TinyOptions()
        super().__init__(chosen)
        self._network = (_tiny_unet(chosen.seed) if network is None else network).eval()
        self._guidance, config = chosen.guidance, self._config
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (config["in_channels"], height, width)
        self.schedule = NoiseSchedule.from_betas()

    def skeleton(self) -> nn.Module:
        return self.load().to("meta")

    def load(self) -> nn.Module:
        return deepcopy(self._network)

    def identity(self) -> dict[str, str]:
        return {"network": f"random weights {self.options.model_dump()}"}

    def condition(self, images: Sequence[int]) -> Condition:
        classes = self._config.get("num_class_embeds")
        if not classes:
            return Condition()
        labels = {"class_labels": torch.tensor([index % (classes - 1) for index in images])}
        nothing = {"class_labels": torch.full((len(images),), classes - 1)}
        return Condition(labels, nothing, self._guidance)

    @property
    def _config(self) -> Any:
        return self._network.config


@dataclass(frozen=True)
class _Run:
    """Everything a trajectory needs but its callbacks and images."""

    sampler: Sampler
    network: nn.Module
    clock: Clock
    model: DiffusionModel

    def latents(
        self, callbacks: Sequence[DenoisingCallback] = (), images: Sequence[int] = IMAGES
    ) -> Tensor:
        """Final latents ``[B, C, H, W]`` of ``images``."""
        denoiser = Denoiser(self.network, self.model.condition(images), self.clock)
        with torch.inference_mode():
            return denoise(self.sampler, denoiser, Noise(SEED, images, self.model.shape), callbacks)


@dataclass(frozen=True)
class _SamplerCase:
    cls: type[Sampler]
    options: Options
    model: DiffusionModel
    tolerance: float

    def declaration(self) -> None:
        _check_declaration(self.cls)
        kinds = self.cls.predictions
        _ensure(
            bool(kinds) and kinds <= PREDICTIONS,
            f"predictions: wanted some of {', '.join(sorted(PREDICTIONS))}, got {set(kinds)}",
        )
        timesteps = self.run().sampler.timesteps
        _ensure(len(timesteps) > 0, "timesteps is empty")
        _ensure(
            all(isinstance(t, int | float) and t >= 0 for t in timesteps),
            f"timesteps: wanted numbers from 0, got {list(timesteps)}",
        )

    def finite(self) -> None:
        _ensure_latents(self.run().latents(), self.model)

    def previews(self) -> None:
        run = self.run()
        _ensure_same(
            run.latents([_NeedlessPreviews(BaseOptions())]),
            run.latents(),
            "needless previews changed the result: step() leaves something behind",
        )

    @torch.inference_mode()
    def purity(self) -> None:
        run = self.run()
        for index, done in reversed(list(enumerate(_steps_by_hand(run)))):
            given = deepcopy((done.state, done.prediction))
            again = run.sampler.step(done.state, index, done.prediction, done.draw)
            _ensure(_same(again, done.after), f"step {index} called again gives another result")
            shown = [
                run.sampler.network_input(done.state, index, done.state.sample) for _ in range(2)
            ]
            _ensure(_same(shown[0], shown[1]), f"network_input {index} differs when called again")
            now = (done.state, done.prediction)
            _ensure(_same(now, given), f"step {index} changed the state or prediction it was given")

    def second_trajectory(self) -> None:
        _ensure_repeats(self.run())

    @torch.inference_mode()
    def fresh_instance(self) -> None:
        by_hand = _steps_by_hand(self.run())[-1].after.sample
        _ensure_same(
            by_hand, self.run().latents(), "a new instance gives another result than the last one"
        )

    def batch(self) -> None:
        _ensure_batch_free(self.run(), [], self.tolerance)

    def run(self) -> _Run:
        sampler = _build(self.cls, self.options, self.model.schedule)
        return _Run(sampler, self.model.load(), Clock(len(sampler.timesteps)), self.model)


@dataclass(frozen=True)
class _MethodCase:
    cls: type[EfficiencyMethod]
    options: Options
    model: DiffusionModel
    sampler: Sampler
    images: int
    tolerance: float

    def declaration(self) -> None:
        _check_declaration(self.cls)
        parts = self.method().parts()
        _ensure(len(parts) > 0, "parts() is empty")
        for part in parts:
            _ensure(
                part.slot in (None, "cacher", "quantizer"),
                f"slot: wanted 'cacher', 'quantizer' or None, got {part.slot!r}",
            )
            _ensure(
                type(part.version) is int and part.version >= 1,
                f"version: wanted a whole number from 1, got {part.version!r}",
            )
        taken = [part.slot for part in parts if part.slot]
        _ensure(len(set(taken)) == len(taken), f"its parts take one slot twice: {taken}")

    def full_steps(self) -> None:
        total = len(self.sampler.timesteps)
        for part, artifact in zip(self.method().parts(), self.applied()[1], strict=True):
            steps = set(part.full_steps(total, artifact))
            _ensure(0 in steps, f"step 0 must be full, full_steps gives {sorted(steps)}")
            outside = sorted(steps - set(range(total)))
            _ensure(not outside, f"full_steps gives {outside}, the run has 0..{total - 1}")
            again = set(part.full_steps(total, artifact))
            _ensure(steps == again, "full_steps gives other steps when asked again")

    def finite(self) -> None:
        _ensure_latents(self.applied()[0].latents(), self.model)

    def artifact(self) -> None:
        run, artifacts = self.applied()
        reloaded = [_saved_and_loaded(artifact) for artifact in artifacts]
        _ensure_same(
            self.applied(artifacts=reloaded)[0].latents(),
            run.latents(),
            "the artifact, saved and loaded, gives another result than direct from calibration",
        )
        _ensure(_same(reloaded, artifacts), "apply() changed the artifact it was given")

    def calibration(self) -> None:
        _ensure(
            _same(self.applied()[1], self.applied()[1]), "calibrating again gives another result"
        )

    def second_trajectory(self) -> None:
        _ensure_repeats(self.applied()[0])

    def extra_evaluations(self) -> None:
        _ensure_untouched_by_evaluations(self.applied()[0])

    def rows(self) -> None:
        probe = _SomeRows(BaseOptions())
        self.applied()[0].latents([probe])
        _ensure(
            probe.worst <= self.tolerance,
            f"evaluating some rows of the batch differs from the whole batch by {probe.worst:.2g} "
            f"of the largest value, wanted at most {self.tolerance:.2g}: mind Clock.rows",
        )

    def batch(self) -> None:
        _ensure_batch_free(self.applied()[0], [], self.tolerance)

    def composition(self) -> None:
        alone = self.applied()[0].latents()
        taken = {part.slot for part in self.method().parts()} - {None}
        for toy in (toy for toy in TOYS if toy.slot not in taken):
            for before, after in (([toy(BaseOptions())], []), ([], [toy(BaseOptions())])):
                where = f"{'after' if before else 'before'} a {toy.slot or 'slotless method'}"
                with _prefix(f"applied {where}: "):
                    self._check_composed(self.applied(before, after)[0], alone)

    def _check_composed(self, run: _Run, alone: Tensor) -> None:
        latents = run.latents()
        _ensure_latents(latents, self.model)
        _ensure(not torch.equal(latents, alone), "the other method has no effect: it is bypassed")
        _ensure_repeats(run)
        _ensure_untouched_by_evaluations(run)
        _ensure_batch_free(run, [], self.tolerance, positions=(0, 2))

    def method(self) -> EfficiencyMethod:
        method: EfficiencyMethod = _build(self.cls, self.options)
        return method

    def applied(
        self,
        before: Sequence[EfficiencyMethod] = (),
        after: Sequence[EfficiencyMethod] = (),
        *,
        artifacts: Sequence[Artifact] | None = None,
    ) -> tuple[_Run, list[Artifact]]:
        """A new network with the methods applied in order, and their parts' artifacts."""
        network, clock = self.model.load(), Clock(len(self.sampler.timesteps))
        used: list[Artifact] = []
        parts = [part for method in (*before, self.method(), *after) for part in method.parts()]
        for position, part in enumerate(parts):
            bench = Bench(network, clock, self.model, self.sampler, SEED + 1, self.images)
            used.append(part.calibrate(bench) if artifacts is None else artifacts[position])
            clock.full_steps &= frozenset(part.full_steps(clock.total, used[-1]))
            network = part.apply(network, clock, used[-1])
        clock.reset()
        return _Run(self.sampler, network.eval(), clock, self.model), used


@dataclass(frozen=True)
class _CallbackCase:
    cls: type[DenoisingCallback]
    options: Options
    neutral: Options | None
    model: DiffusionModel
    samplers: Sequence[Sampler]
    tolerance: float

    def declaration(self) -> None:
        _check_declaration(self.cls)

    def finite(self) -> None:
        def check(run: _Run) -> None:
            _ensure_latents(run.latents([_Guard(self.callback(run))]), self.model)

        self.everywhere(check)

    def neutral_options(self) -> None:
        if self.neutral is not None:
            self.everywhere(self._check_neutral)

    def inputs(self) -> None:
        def check(run: _Run) -> None:
            guard = _Guard(self.callback(run))
            run.latents([guard])
            _ensure(not guard.changed, f"refine() changed {guard.changed} in place")

        self.everywhere(check)

    def second_trajectory(self) -> None:
        self.everywhere(lambda run: _ensure_repeats(run, [self.callback(run)]))

    def batch(self) -> None:
        self.everywhere(lambda run: _ensure_batch_free(run, [self.callback(run)], self.tolerance))

    def cached_network(self) -> None:
        def check(run: _Run) -> None:
            toy = ToyCacher(BaseOptions())
            run.clock.full_steps = frozenset(toy.full_steps(run.clock.total, {}))
            network = toy.apply(run.network, run.clock, {})
            cached = _Run(run.sampler, network, run.clock, self.model)
            callbacks = [self.callback(cached)]
            _ensure_latents(cached.latents(callbacks), self.model)
            _ensure_repeats(cached, callbacks)

        self.everywhere(check)

    def _check_neutral(self, run: _Run) -> None:
        callback = _build(self.cls, self.neutral or {})
        callback.check(run.sampler, run.clock)
        _ensure_same(
            run.latents([callback]),
            run.latents(),
            f"with {self.neutral} the result differs from that without a callback",
        )

    def callback(self, run: _Run) -> DenoisingCallback:
        callback: DenoisingCallback = _build(self.cls, self.options)
        callback.check(run.sampler, run.clock)
        return callback

    def everywhere(self, check: Callable[[_Run], None]) -> None:
        """``check`` a fresh run on every sampler; failures say on which."""
        for sampler in self.samplers:
            clock = Clock(len(sampler.timesteps))
            with _prefix(f"on sampler {sampler.name} {sampler.options.model_dump()}: "):
                check(_Run(sampler, self.model.load(), clock, self.model))


@dataclass
class _MetricCase:
    cls: type[Any]
    options: Options
    inputs: Inputs | None
    images: int
    tolerance: float
    _whole: dict[str, float] = field(default_factory=dict)

    def declaration(self) -> None:
        _check_declaration(self.cls)

    def result(self) -> None:
        metric = self.updated([range(self.images)])
        result = metric.compute()
        _ensure(isinstance(result, dict) and len(result) > 0, f"compute() gives {result!r}")
        for name, value in result.items():
            _ensure(isinstance(name, str), f"compute(): wanted names, got {name!r}")
            _ensure(isinstance(value, float), f"compute(): {name} is {value!r}, wanted a float")
            _ensure(abs(value) < float("inf"), f"compute(): {name} is {value}")
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
        metric = _build(self.cls, self.options)
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
        _ensure(found.keys() == self._whole.keys(), f"{what} gives other names: {set(found)}")
        for name, wanted in self._whole.items():
            limit = self.tolerance * max(1.0, abs(wanted))
            _ensure(
                abs(found[name] - wanted) <= limit,
                f"{what} gives {name} = {found[name]!r}, wanted {wanted!r} within {limit:.2g}",
            )


@dataclass(frozen=True)
class _ModelCase:
    cls: type[DiffusionModel]
    options: Options

    def declaration(self) -> None:
        _check_declaration(self.cls)
        model = self.model()
        _ensure(
            model.prediction in PREDICTIONS,
            f"prediction: wanted one of {', '.join(sorted(PREDICTIONS))}, got {model.prediction!r}",
        )
        _ensure(
            len(model.shape) == 3 and all(type(n) is int and n > 0 for n in model.shape),
            f"shape: wanted (C, H, W), got {model.shape!r}",
        )

    def schedule(self) -> None:
        abar = self.model().schedule.alphas_cumprod
        _ensure(
            abar.dtype == torch.float64 and abar.ndim == 1,
            f"alphas_cumprod: wanted float64 [N], got {abar.dtype} {list(abar.shape)}",
        )
        falls = bool((abar[1:] <= abar[:-1]).all() and (abar >= 0).all() and (abar <= 1).all())
        _ensure(falls, "alphas_cumprod must fall from at most 1 to at least 0")

    def labels(self) -> None:
        model = self.model()
        together = model.condition(IMAGES)
        for position, image in enumerate(IMAGES):
            alone = model.condition([image])
            _ensure(
                alone.scale == together.scale and alone.guided == together.guided,
                f"condition: guidance of image {image} depends on the batch",
            )
            _ensure(
                _same(_row(together.inputs, position), dict(alone.inputs))
                and _same(
                    _row(together.unconditional or {}, position), dict(alone.unconditional or {})
                ),
                f"condition: image {image} is told something else in another batch",
            )

    def skeleton(self) -> None:
        model = self.model()
        empty, full = model.skeleton().state_dict(), model.load().state_dict()
        real = [name for name, value in empty.items() if not value.is_meta]
        _ensure(not real, f"skeleton(): {real[:3]} are not on the meta device")
        differing = sorted(
            name
            for name in empty.keys() | full.keys()
            if name not in empty or name not in full or empty[name].shape != full[name].shape
        )
        _ensure(not differing, f"skeleton() and load() differ in {differing[:3]}")

    def weights(self) -> None:
        model = self.model()
        network = model.load()
        _ensure(not any(m.training for m in network.modules()), "load() is not in eval mode")
        state = network.state_dict()
        away = [name for name, value in state.items() if value.device.type != "cpu"]
        _ensure(not away, f"load(): {away[:3]} are not on the CPU")
        _ensure(_same(state, model.load().state_dict()), "load() gives other weights every time")

    @torch.inference_mode()
    def prediction(self) -> None:
        model = self.model()
        noise = Noise(SEED, IMAGES, model.shape).initial()
        denoiser = Denoiser(model.load(), model.condition(IMAGES), Clock(1))
        predicted = denoiser(noise, len(model.schedule) // 2)
        _ensure(
            predicted.shape == noise.shape,
            f"the network maps {list(noise.shape)} to {list(predicted.shape)}",
        )
        _ensure(bool(predicted.isfinite().all()), "the network's output is not finite")

    @torch.inference_mode()
    def decode(self) -> None:
        model = self.model()
        latents = Noise(SEED, IMAGES, model.shape).initial()
        images = model.decode(latents)
        _ensure(
            images.dtype == torch.uint8 and images.ndim == 4 and len(images) == len(latents),
            f"decode(): wanted uint8 [{len(latents)}, C, H, W], got {images.dtype} "
            f"{list(images.shape)}",
        )
        alone = torch.cat([model.decode(row[None]) for row in latents])
        off = int((images.int() - alone.int()).abs().max())
        _ensure(off <= 1, f"decode(): an image differs by {off} levels in another batch")

    def identity(self) -> None:
        model = self.model()
        identity = model.identity()
        _ensure(
            bool(identity)
            and all(isinstance(v, str) and v for v in (*identity, *identity.values())),
            f"identity(): wanted a hash for each file, got {identity!r}",
        )
        _ensure(identity == self.model().identity(), "identity() differs from time to time")

    def model(self) -> DiffusionModel:
        model: DiffusionModel = _build(self.cls, self.options)
        return model


class _NeedlessPreviews(DenoisingCallback):
    """Looks at samples that are never taken."""

    name = "needless-previews"

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        for factor in (1.0, -2.0, 0.0):
            step.preview(factor * prediction)
        return prediction


class _NeedlessEvaluations(DenoisingCallback):
    """Evaluates the network in every way it may, stores nothing and uses nothing."""

    name = "needless-evaluations"

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        rows = torch.tensor([0, 2])
        step.predict(-step.sample, store=False)
        step.predict(2 * step.sample[rows], rows=rows, store=False)
        step.predict(0.5 * step.sample, full=True, store=False)
        step.predict(0.5 * step.sample, full=False, store=False)
        if not step.last:
            step.predict(step.sample, timestep="next", store=False)
        return prediction


class _SomeRows(DenoisingCallback):
    """Evaluates some images of the batch again and compares."""

    name = "some-rows"
    worst = 0.0

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        rows = torch.tensor([3, 1])
        some = step.predict(step.sample[rows], rows=rows, store=False)
        self.worst = max(self.worst, _difference(some, prediction[rows]))
        return prediction


class _Guard(DenoisingCallback):
    """Watches another callback: what it changes in place, and the form of what it returns."""

    name = "guard"

    def __init__(self, inner: DenoisingCallback) -> None:
        super().__init__(BaseOptions())
        self._inner, self.changed = inner, ""

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        sample, given = step.sample.clone(), prediction.clone()
        refined = self._inner.refine(step, prediction)
        if not torch.equal(sample, step.sample):
            self.changed = "step.sample"
        if not torch.equal(given, prediction):
            self.changed = "the prediction"
        _ensure(
            refined.shape == given.shape and refined.dtype == given.dtype,
            f"refine() gives {refined.dtype} {list(refined.shape)}, wanted {given.dtype} "
            f"{list(given.shape)}",
        )
        return refined


class ToyCacher(EfficiencyMethod):
    """Repeats the whole prediction of the last full step on every other step."""

    name = "toy-cacher"
    slot = "cacher"

    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        return range(0, total, 2)

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return _Repeater(network, clock)


class _Repeater(nn.Module):
    def __init__(self, network: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.network, self._clock = network, clock
        self._kept = torch.empty(0)

    def forward(self, sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        clock = self._clock
        if not clock.full:
            return self._kept if clock.rows is None else self._kept[clock.rows]
        output = self.network(sample, timestep, **inputs)
        tensor: Tensor = output if isinstance(output, Tensor) else output[0]
        if clock.store or clock.evaluation == 0:
            rows = clock.rows
            self._kept = tensor if rows is None else self._kept.index_copy(0, rows, tensor)
        return tensor


class ToyQuantizer(EfficiencyMethod):
    """Rounds weights to 8 bits, and inputs on a grid that depends on the step, in place."""

    name = "toy-quantizer"
    slot = "quantizer"
    simulated = True

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        def round_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            first, *rest = inputs
            return (first + 1e-3 * (1 + clock.step) * torch.sin(first), *rest)

        for module in _leaves(network):
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim > 1:
                scale = float(weight.detach().abs().max()) / 127 or 1.0
                weight.data = (weight.data / scale).round() * scale
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.register_forward_pre_hook(round_input)
        return network


class ToyScaler(EfficiencyMethod):
    """Takes no slot: scales what every layer gives by a factor that depends on the step."""

    name = "toy-scaler"

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        def scale(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return output * (1 + 1e-3 * clock.step)

        for module in _leaves(network):
            module.register_forward_hook(scale)
        return network


TOYS: tuple[type[EfficiencyMethod], ...] = (ToyCacher, ToyQuantizer, ToyScaler)


@dataclass(frozen=True)
class _Done:
    """A step that was taken: what went in and what came out."""

    state: State
    prediction: Tensor
    draw: Draw
    after: State


def _steps_by_hand(run: _Run) -> list[_Done]:
    """The loop without :func:`denoise`, keeping every step."""
    noise = Noise(SEED, IMAGES, run.model.shape)
    denoiser = Denoiser(run.network, run.model.condition(IMAGES), run.clock)
    state, done = run.sampler.start(noise.initial()), list[_Done]()
    for index, timestep in enumerate(run.sampler.timesteps):
        shown = run.sampler.network_input(state, index, state.sample)
        prediction, draw = denoiser(shown, timestep), noise.draw(index)
        after = run.sampler.step(state, index, prediction, draw)
        done.append(_Done(state, prediction, draw, after))
        state = after
    return done


def _ensure_repeats(run: _Run, callbacks: Sequence[DenoisingCallback] = ()) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = run.latents(callbacks)
        run.latents(callbacks, OTHERS)
        again = run.latents(callbacks)
    _ensure_same(
        again,
        first,
        "the same images again, after others, came out different: something is remembered, "
        "or random beside Noise",
    )


def _ensure_untouched_by_evaluations(run: _Run) -> None:
    _ensure_same(
        run.latents([_NeedlessEvaluations(BaseOptions())]),
        run.latents(),
        "evaluations with store=False changed later steps: mind Clock.store and Clock.evaluation, "
        "and count no calls",
    )


def _ensure_batch_free(
    run: _Run,
    callbacks: Sequence[DenoisingCallback],
    tolerance: float,
    positions: Sequence[int] = range(len(IMAGES)),
) -> None:
    together = run.latents(callbacks)
    alone = torch.cat([run.latents(callbacks, [IMAGES[position]]) for position in positions])
    off = _difference(alone, together[list(positions)])
    _ensure(
        off <= tolerance,
        f"five images together differ from each alone by {off:.2g} of the largest value, wanted "
        f"at most {tolerance:.2g}: nothing may be reduced over the batch",
    )


def _ensure_latents(latents: Tensor, model: DiffusionModel) -> None:
    wanted = (len(IMAGES), *model.shape)
    _ensure(latents.shape == wanted, f"the result has shape {tuple(latents.shape)}, not {wanted}")
    _ensure(bool(latents.isfinite().all()), "the result is not finite")


def _ensure_same(found: Tensor, wanted: Tensor, message: str) -> None:
    if not torch.equal(found, wanted):
        off = _difference(found, wanted) if found.shape == wanted.shape else float("inf")
        raise AssertionError(f"{message} (by {off:.2g} of the largest value)")


def _ensure(holds: bool, message: str) -> None:
    # not an assert statement, so that the checks also hold under python -O
    if not holds:
        raise AssertionError(message)


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _same(first: Any, second: Any) -> bool:
    """Whether two values are equal bit for bit, whatever they are made of."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if is_dataclass(first):
        names = [each.name for each in fields(first)]
        return all(_same(getattr(first, name), getattr(second, name)) for name in names)
    return bool(first == second) or _same_inside(first, second)


def _same_inside(first: Any, second: Any) -> bool:
    """For objects without an equality of their own, such as a library's scheduler."""
    return bool(getattr(first, "__dict__", None)) and _same(vars(first), vars(second))


def _row(inputs: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
    return {name: value[position : position + 1] for name, value in inputs.items()}


def _saved_and_loaded(artifact: Artifact) -> dict[str, Tensor]:
    """``artifact`` as it comes back from a file."""
    wrong = [name for name, value in artifact.items() if not isinstance(value, Tensor)]
    _ensure(not wrong, f"calibrate(): {wrong} are not tensors")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact.safetensors"
        save_file({name: value.contiguous() for name, value in artifact.items()}, path)
        return load_file(path)


def _build(cls: type[Any], options: Options, *more: Any) -> Any:
    return cls(validated(cls.Options, options, cls.__name__), *more)


def _check_declaration(cls: type[Any]) -> None:
    name = getattr(cls, "name", None)
    _ensure(
        isinstance(name, str) and bool(re.fullmatch(r"[a-z0-9][a-z0-9_.+-]*", name)),
        f"name: wanted lower-case letters, digits, and - _ . + after the first, got {name!r}",
    )
    options = cls.Options
    _ensure(issubclass(options, BaseOptions), f"Options: wanted BaseOptions, got {options!r}")
    _ensure(options.model_config.get("extra") == "forbid", "Options must refuse unknown keys")
    silent = [key for key, each in options.model_fields.items() if not each.description]
    _ensure(not silent, f"Options: {', '.join(silent)} have no description")


def _builtin_samplers(schedule: NoiseSchedule) -> list[Sampler]:
    from iec_eval.samplers.hooks import iec_eval_samplers

    plain: list[Sampler] = [_build(cls, {"steps": STEPS}, schedule) for cls in iec_eval_samplers()]
    special: list[dict[str, Any]] = [{"spacing": "quad"}, {"eta": 1.0}]
    return plain + [_build(DDIM, {"steps": STEPS, **more}, schedule) for more in special]


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


def _leaves(network: nn.Module) -> list[nn.Module]:
    """Layers: modules without parts that have weights of their own."""
    modules = [m for m in network.modules() if not any(True for _ in m.children())]
    return [module for module in modules if module._parameters]


def _tiny_unet(seed: int) -> Any:
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=5,
        )


@contextmanager
def _prefix(text: str) -> Iterator[None]:
    """Say in an assertion's message where it was."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{text}{error}") from None


def _run_checks(
    cls: type[Any], checks: Mapping[str, Callable[[], None]], skip: Collection[str]
) -> None:
    unknown = sorted(set(skip) - checks.keys())
    if unknown:
        raise ValueError(f"skip: unknown {unknown}; the checks are {', '.join(checks)}")
    for name, check in checks.items():
        if name not in skip:
            with _prefix(f"{cls.__name__}: {name}: "):
                check()
