"""Every built-in keeps its contract, and every check of a contract is seen to fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SCHEDULE, build, conditional_unet, random_backbone, tiny_clip, unet
from pydantic import ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor, nn

from iec_eval.calibration import Bench
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.callbacks.epsilon_scaling import EpsilonScaling
from iec_eval.callbacks.hooks import iec_eval_callbacks
from iec_eval.callbacks.iec import IEC
from iec_eval.callbacks.look_ahead import LookAhead
from iec_eval.callbacks.scale_matched import ScaleMatched
from iec_eval.callbacks.self_consistent import SelfConsistent
from iec_eval.callbacks.time_shift import TimeShift
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Step
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.efficiency.deepcache import CachedUNet, DeepCache
from iec_eval.efficiency.hooks import iec_eval_efficiency_methods
from iec_eval.embedded import FASHION_MNIST
from iec_eval.errors import Incompatible
from iec_eval.intervals import Estimate
from iec_eval.metrics.base import Metric, Pairs
from iec_eval.metrics.clip_score import ClipScore
from iec_eval.metrics.features import CARD, WEIGHTS, ClassifierFeatures, ImageClassifier
from iec_eval.metrics.fid import FID
from iec_eval.metrics.hooks import iec_eval_metrics
from iec_eval.metrics.inception_score import InceptionScore
from iec_eval.metrics.kid import KID
from iec_eval.metrics.lpips import LPIPS
from iec_eval.metrics.paired import PSNR, SSIM
from iec_eval.metrics.precision_recall import PrecisionRecall
from iec_eval.metrics.statistics import FILE, KeptFeatures, ReferenceStatistics
from iec_eval.models.hooks import iec_eval_models
from iec_eval.models.unet import UNet
from iec_eval.noise import Draw, Noise
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler, State
from iec_eval.samplers.ddim import DDIM, DDIMOptions
from iec_eval.samplers.diffusers import DiffusersSampler
from iec_eval.samplers.hooks import iec_eval_samplers
from iec_eval.samplers.plms import PLMS
from iec_eval.schedule import NoiseSchedule
from iec_eval.testing import (
    TinyModel,
    check_callback,
    check_efficiency_method,
    check_metric,
    check_model,
    check_sampler,
)
from iec_eval.testing.efficiency import TOYS, ToyCacher, ToyQuantizer, ToyScaler

Options = dict[str, Any]
CACHE = {"interval": 2, "cut": 2}

# --- the built-ins ----------------------------------------------------------------------------

SAMPLERS: dict[type[Sampler], list[Options]] = {
    DDIM: [
        {"steps": 5},
        {"steps": 5, "spacing": "quad"},
        {"steps": 5, "eta": 1.0},
        {"steps": 5, "eta": 0.5, "clip_sample": True},
        {"steps": 5, "spacing": "ldm"},
    ],
    PLMS: [{"steps": 5}],
    DiffusersSampler: [{"steps": 5}],  # its other schedulers: test_diffusers_sampler.py
}
METHODS: dict[type[EfficiencyMethod], list[Options]] = {
    DeepCache: [
        {"interval": 3, "cut": 1},
        {"interval": 2, "cut": 2},
        {"interval": 5, "cut": 4},
        {"interval": 1, "cut": 3},
    ]
}
CALLBACKS: dict[type[DenoisingCallback], list[Options]] = {
    IEC: [
        {"preset": "paper"},
        {"preset": "heun"},
        {"preset": "paper", "weights": [0.5, 0.25], "tolerance": 0.5},
        {"preset": "paper", "where": "all", "refresh_cache": False},
        {"preset": "paper", "where": {"ends": "1/4"}, "noise": "fresh"},
        {"preset": "paper", "correct": False, "noise": "fresh"},
    ],
    LookAhead: [{"weight": 0.5}],
    SelfConsistent: [{"substeps": 2, "history": 2}],
    EpsilonScaling: [{"factor": 1.05}, {"factor": 0.9, "slope": 0.05}],
    ScaleMatched: [{}, {"of": {"name": "iec", "weights": [1.0, 0.5], "where": "first"}}],
    TimeShift: [{}, {"window": 300, "cutoff": 0}],
}
NEUTRAL: dict[type[DenoisingCallback], Options] = {
    IEC: {"weights": []},
    EpsilonScaling: {"factor": 1.0},
    ScaleMatched: {"of": {"weights": []}},
    TimeShift: {"window": 0},
    LookAhead: {},
    SelfConsistent: {"substeps": 1},
}


def every(table: dict[Any, list[Options]]) -> list[Any]:
    return [
        pytest.param(cls, options, id=f"{cls.name} {options}")
        for cls, cases in table.items()
        for options in cases
    ]


def test_every_built_in_is_here() -> None:
    assert set(SAMPLERS) == set(iec_eval_samplers())
    # the other efficiency methods, alone and in chains: test_chains.py
    assert set(METHODS) < set(iec_eval_efficiency_methods())
    assert set(CALLBACKS) == set(iec_eval_callbacks())
    metrics = {ClipScore, FID, InceptionScore, KID, LPIPS, PSNR, PrecisionRecall, SSIM}
    assert metrics == set(iec_eval_metrics())
    # the other models, on small folders: test_latent.py
    assert {cls.name for cls in iec_eval_models()} > {"unet", "fashion-mnist"}


@pytest.mark.parametrize(("cls", "options"), every(SAMPLERS))
def test_samplers(cls: type[Sampler], options: Options) -> None:
    check_sampler(cls, options)


@pytest.mark.parametrize(("cls", "options"), every(METHODS))
def test_efficiency_methods(cls: type[EfficiencyMethod], options: Options) -> None:
    check_efficiency_method(cls, options)


def test_efficiency_method_on_a_given_network() -> None:
    model = TinyModel(network=unet(sample_size=(8, 12)))
    assert model.shape == (3, 8, 12)
    assert not model.condition([0]).inputs
    check_efficiency_method(DeepCache, {"interval": 3, "cut": 3}, model=model)


def test_efficiency_method_on_a_text_network() -> None:
    options = {"interval": 3, "cut": 2}
    check_efficiency_method(DeepCache, options, model=TextModel(), skip=["composition"])


@pytest.mark.parametrize(("cls", "options"), every(CALLBACKS))
def test_callbacks(cls: type[DenoisingCallback], options: Options) -> None:
    ddim, plms = build(DDIM, {"steps": 5}, SCHEDULE), build(PLMS, {"steps": 5}, SCHEDULE)
    # the others they refuse: test_correctors.py, test_self_consistent.py
    some: dict[Any, list[Sampler]] = {TimeShift: [ddim, plms], SelfConsistent: [ddim]}
    check_callback(cls, options, neutral=NEUTRAL[cls], samplers=some.get(cls))


@pytest.mark.parametrize("preset", ["official_ddim", "official_ldm"])
def test_the_released_presets_depend_on_the_batch(preset: str) -> None:
    """As their tolerance is over the batch, which is why they are not the default."""
    options = {"preset": preset, "tolerance": 0.3}
    check_callback(IEC, options, neutral={"preset": preset, "weights": []}, skip=["batch"])
    with pytest.raises(AssertionError, match=r"IEC: batch: .*reduced over the batch"):
        check_callback(IEC, options)


def test_metrics(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    check_metric(InceptionScore, {"features": str(tmp_path), "splits": 4})
    reference = {"features": str(tmp_path), "reference": str(tmp_path / FILE)}
    check_metric(FID, reference)
    check_metric(KID, {**reference, "subset_size": 30, "subsets": 5})
    check_metric(PrecisionRecall, {**reference, "samples": 80})
    for paired in (PSNR, SSIM):
        check_metric(paired)
    random_backbone(tmp_path / "squeeze.pth")
    squeeze = {"net": "squeeze", "weights": str(tmp_path / "squeeze.pth")}
    check_metric(LPIPS, squeeze, images=24)
    check_metric(ClipScore, {"model": str(tiny_clip(tmp_path / "clip"))})


def save_classifier(folder: Path) -> None:
    """A feature network with random weights, and statistics of random features."""
    card = {"tag": "random", "channels": 3, "size": 8, "classes": 10, "width": 4}
    (folder / CARD).write_text(json.dumps(card))
    network = ImageClassifier(channels=3, size=8, classes=10, width=4)
    save_file(network.state_dict(), folder / WEIGHTS)
    identity = ClassifierFeatures(folder).identity()
    vectors = Noise(3, range(200), (64,)).initial().double()
    moments = vectors.mean(0), torch.cov(vectors.T), 200
    kept = KeptFeatures.of(vectors)
    ReferenceStatistics(*moments, identity, kept=kept).save(folder / FILE)


def test_model_from_a_folder(tmp_path: Path) -> None:
    save_model(tmp_path / "plain")
    check_model(UNet, {"path": str(tmp_path / "plain")})
    save_model(tmp_path / "classes", num_class_embeds=5)
    options = {"path": str(tmp_path / "classes"), "unconditional_class": 4}
    check_model(UNet, options)
    check_model(UNet, {**options, "guidance": 2.0})
    check_model(UNet, {**options, "label": 3})


def save_model(folder: Path, **changes: Any) -> None:
    from diffusers import DDPMScheduler

    unet(**changes).save_pretrained(folder / "unet")
    scheduler: Any = DDPMScheduler()
    scheduler.save_pretrained(folder / "scheduler")


@pytest.mark.skipif(not (FASHION_MNIST / "unet").is_dir(), reason="its weights are not here")
def test_the_packaged_model() -> None:
    cls = next(cls for cls in iec_eval_models() if cls.name == "fashion-mnist")
    check_model(cls)
    check_model(cls, {"guidance": 2.0})


def test_the_tiny_model_and_the_toys() -> None:
    check_model(TinyModel, {"seed": 3})
    for toy in TOYS:
        check_efficiency_method(toy, skip=["composition"])


def test_unknown_checks_cannot_be_skipped() -> None:
    with pytest.raises(ValueError, match=r"unknown .'puritee'.; the checks are declaration,"):
        check_sampler(DDIM, {"steps": 5}, skip=["puritee"])


class TextModel(TinyModel):
    """A network that is told a text, guided."""

    def __init__(self) -> None:
        super().__init__(network=conditional_unet())

    def condition(self, images: Sequence[int]) -> Condition:
        text = {"encoder_hidden_states": Noise(2, images, (5, 12)).initial()}
        nothing = {"encoder_hidden_states": torch.zeros(len(images), 5, 12)}
        return Condition(text, nothing, 2.0)


# --- efficiency methods in a chain ------------------------------------------------------------


def deepcache() -> DeepCache:
    method: DeepCache = build(DeepCache, CACHE)
    return method


def test_pairs_in_both_orders() -> None:
    check_efficiency_method(ToyQuantizer, before=[deepcache()])
    check_efficiency_method(ToyQuantizer, after=[deepcache()])
    check_efficiency_method(DeepCache, CACHE, before=[ToyQuantizer(BaseOptions())])
    check_efficiency_method(DeepCache, CACHE, after=[ToyQuantizer(BaseOptions())])


class ScalesRecalled(EfficiencyMethod):
    """Scales what a cached step gives, by a factor found on the cached network."""

    name = "scales-recalled"

    def calibrate(self, bench: Any) -> dict[str, Tensor]:
        cached = isinstance(bench.network, CachedUNet) and bench.clock.full_steps == {0, 2, 4}
        return {"factor": torch.tensor(1.25 if cached else float("nan"))}

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        if not isinstance(network, CachedUNet):
            raise Incompatible("put deepcache before it")
        factor = artifact["factor"].item() if artifact else 1.0
        return Around(network, after=lambda output: output if clock.full else output * factor)


def test_a_method_that_needs_another_one_underneath() -> None:
    check_efficiency_method(ScalesRecalled, before=[deepcache()])
    with pytest.raises(Incompatible, match="put deepcache before it"):
        check_efficiency_method(ScalesRecalled, after=[deepcache()])


def test_methods_are_calibrated_and_applied_in_order() -> None:
    noted: list[str] = []

    class Noting(BrokenMethod):
        def __init__(self, options: BaseOptions, label: str = "checked") -> None:
            super().__init__(options)
            self.note: Callable[[str], None] = lambda what: noted.append(f"{what} {label}")

        def calibrate(self, bench: Any) -> dict[str, Tensor]:
            self.note("calibrate")
            return {}

        def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
            self.note("apply")
            return super().apply(network, clock, artifact)

    before, after = ([Noting(BaseOptions(), label)] for label in ("first", "last"))
    others = [name for name in names_of(check_efficiency_method) if name != "finite"]
    check_efficiency_method(Noting, before=before, after=after, skip=others)
    order = ("first", "checked", "last")
    assert noted == [f"{what} {label}" for label in order for what in ("calibrate", "apply")]


@pytest.mark.parametrize("place", ["before", "after"])
def test_properties_are_those_of_the_whole_chain(place: str) -> None:
    def check(broken: EfficiencyMethod, message: str, skip: Sequence[str] = ()) -> None:
        chain: Any = {place: [broken]}
        with pytest.raises(AssertionError, match=f"^ToyScaler: {message}"):
            check_efficiency_method(ToyScaler, **chain, skip=skip)

    check(StartsCached(BaseOptions()), "full steps: step 0 must be full")
    check(FullUntilCalibrated(BaseOptions()), "skeleton: toy-cacher: full_steps gives 5 steps")
    check(GivesNothing(BaseOptions()), "finite: ")
    check(ArtifactOfNumbers(BaseOptions()), "artifact: .* are not tensors")
    check(RandomCalibration(BaseOptions()), "calibration: ")
    check(NeverStops(BaseOptions()), "second trajectory: ")
    check(build(AlwaysStores, CACHE), "extra evaluations: ")
    check(FailsWhenCorrected(BaseOptions()), "iec: ")
    check(build(IgnoresRows, CACHE), "rows: ")
    check(RangeOfTheBatch(BaseOptions()), "batch: ", skip=["rows"])


def test_the_declaration_is_that_of_the_checked_method() -> None:
    check_efficiency_method(ToyScaler, before=[UndescribedMethod(Undescribed())])


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_chain_is_combined_with_what_fits_in_its_free_slots(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unwanted(ToyCacher):
        def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
            raise Incompatible("a second cacher")

    monkeypatch.setattr("iec_eval.testing.efficiency.TOYS", (Unwanted,))
    chain: Any = {place: [deepcache()]}
    check_efficiency_method(ToyScaler, **chain)
    with pytest.raises(Incompatible, match="a second cacher"):
        check_efficiency_method(ToyScaler)


# --- broken samplers --------------------------------------------------------------------------


class Undescribed(BaseOptions):
    steps: int = 5


class Loose(BaseOptions):
    model_config = ConfigDict(extra="allow")


class Broken(DDIM):
    """DDIM in five steps, for its subclasses to break."""

    name = "broken"
    Options = BaseOptions  # type: ignore[assignment]

    def __init__(self, options: BaseOptions, schedule: NoiseSchedule) -> None:
        super().__init__(DDIMOptions(steps=5), schedule)


class NamedInCapitals(Broken):
    name = "DDIM 2"


class UndescribedSampler(Broken):
    Options = Undescribed


class LooseSampler(Broken):
    Options = Loose


class PredictsNoise(Broken):
    predictions = frozenset({"noise"})


class NoSteps(Broken):
    def __init__(self, options: BaseOptions, schedule: NoiseSchedule) -> None:
        super().__init__(options, schedule)
        self.timesteps = ()


class NegativeTimesteps(Broken):
    def __init__(self, options: BaseOptions, schedule: NoiseSchedule) -> None:
        super().__init__(options, schedule)
        self.timesteps = (3, -1)


class DividesByZero(Broken):
    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        return State(super().step(state, index, prediction, draw).sample / 0)


class TruncatesTheBatch(Broken):
    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        return State(super().step(state, index, prediction, draw).sample[..., :4])


class Multistep(Broken):
    """Keeps the last prediction to itself instead of in the state."""

    last: Tensor | None = None

    def start(self, noise: Tensor) -> State:
        self.last = None
        return State(noise)

    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        mixed = prediction if self.last is None else 1.5 * prediction - 0.5 * self.last
        self.last = prediction
        return super().step(state, index, mixed, draw)


class InPlace(Broken):
    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        state.sample.sub_(0.1 * prediction)
        return State(state.sample)


class RandomInput(Broken):
    def network_input(self, state: State, index: int, sample: Tensor) -> Tensor:
        return sample + torch.randn_like(sample)


class MutableMemory(Broken):
    """Its memory is a value, but one that steps change."""

    def start(self, noise: Tensor) -> State:
        return State(noise, [])

    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        state.memory.append(prediction)
        return State(super().step(state, index, prediction, draw).sample, state.memory)


class CountsEvaluations(Broken):
    evaluations = 0

    def evaluate(self, state: State, step: Step) -> tuple[State, Tensor]:
        self.evaluations += 1
        return state, step.predict(state.sample) * (1 + 0.01 * self.evaluations)


class EvaluatesInPlace(Broken):
    def evaluate(self, state: State, step: Step) -> tuple[State, Tensor]:
        prediction = step.predict(state.sample)
        state.sample.add_(0.01)
        return State(state.sample), prediction


class StepsInEvaluation(Broken):
    """Its callbacks would be shown another sample than the step started from."""

    def evaluate(self, state: State, step: Step) -> tuple[State, Tensor]:
        moved = State(state.sample - 0.1 * step.predict(state.sample))
        return moved, step.predict(moved.sample)


class CountsTrajectories(Broken):
    trajectories = 0

    def start(self, noise: Tensor) -> State:
        self.trajectories += 1
        return State(noise * self.trajectories)


class OwnRandomness(Broken):
    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        sample = super().step(state, index, prediction, draw).sample
        return State(sample + 0.01 * torch.randn_like(sample))


class RandomAtBirth(Broken):
    def __init__(self, options: BaseOptions, schedule: NoiseSchedule) -> None:
        super().__init__(options, schedule)
        self.factor = 1 + torch.rand(())

    def start(self, noise: Tensor) -> State:
        return State(noise * self.factor)


class Standardizes(Broken):
    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        sample = super().step(state, index, prediction, draw).sample
        return State(sample / sample.std())


# --- broken efficiency methods ----------------------------------------------------------------


class Around(nn.Module):
    """A network with something done before and after."""

    def __init__(
        self,
        network: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda sample: sample,
        after: Callable[[Tensor], Tensor] = lambda output: output,
    ) -> None:
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        output = self.network(self.before(sample), timestep, **inputs)
        return self.after(output if isinstance(output, Tensor) else output[0])


class BrokenMethod(EfficiencyMethod):
    """The network as it is, for its subclasses to break."""

    name = "broken"

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return Around(network)


class UnknownSlot(BrokenMethod):
    slot = "cache"  # type: ignore[assignment]


class VersionZero(BrokenMethod):
    version = 0


class UndescribedMethod(BrokenMethod):
    Options = Undescribed


class NoParts(BrokenMethod):
    def parts(self) -> Sequence[EfficiencyMethod]:
        return []


class TwoCachers(BrokenMethod):
    def parts(self) -> Sequence[EfficiencyMethod]:
        return [ToyCacher(BaseOptions()), ToyCacher(BaseOptions())]


class StartsCached(ToyCacher):
    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        return range(1, total, 2)


class RunsOver(ToyCacher):
    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        return range(0, total + 4, 2)


class ChangesItsMind(ToyCacher):
    asked = 0

    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        self.asked += 1
        return range(0, total, self.asked)


class OneChannel(BrokenMethod):
    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return Around(network, after=lambda output: output[:, :1])


class CachesOneChannel(ToyCacher):
    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        cached = super().apply(network, clock, artifact)
        return Around(cached, after=lambda output: output if clock.full else output[:, :1])


class FullUntilCalibrated(ToyCacher):
    """Its schedule is known after calibration, and its number of full steps no earlier."""

    def calibrate(self, bench: Any) -> dict[str, Tensor]:
        return {"steps": torch.arange(0, bench.clock.total, 2)}

    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        return artifact["steps"].tolist() if artifact else range(total)


class NoStepsUntilCalibrated(FullUntilCalibrated):
    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        return list(artifact["steps"].tolist())


class GivesNothing(BrokenMethod):
    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return Around(network, after=lambda output: output * float("nan"))


class KeepsItsResult(BrokenMethod):
    """Calibrates into itself, not into the artifact."""

    scale = 1.0

    def calibrate(self, bench: Any) -> dict[str, Tensor]:
        self.scale = 0.5
        return {}

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return Around(network, after=lambda output: output * self.scale)


class ArtifactOfNumbers(BrokenMethod):
    def calibrate(self, bench: Any) -> dict[str, Tensor]:
        return {"scale": 0.5}  # type: ignore[dict-item]


class ChangesTheArtifact(BrokenMethod):
    def calibrate(self, bench: Any) -> dict[str, Tensor]:
        return {"scale": torch.ones(1)}

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        scale = artifact["scale"].mul_(0.5)
        return Around(network, after=lambda output: output * scale.item())


class RandomCalibration(BrokenMethod):
    def calibrate(self, bench: Any) -> dict[str, Tensor]:
        return {"scale": torch.rand(1)}


class CountsCalls(BrokenMethod):
    """The index of the step, by counting calls: shifted by extra evaluations."""

    wraps = True

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        calls = 0

        def scale(output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return output * (1 + 0.1 * (calls % clock.total if self.wraps else calls))

        return Around(network, after=scale)


class NeverStops(CountsCalls):
    wraps = False


class AlwaysStores(DeepCache):
    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return StoringCache(network, self.options.cut, clock)


class StoringCache(CachedUNet):
    def _remember(self, feature: Tensor) -> None:
        rows = self._clock.rows
        kept = self.feature
        self.feature = (
            feature if rows is None or kept is None else kept.index_copy(0, rows, feature)
        )


class FailsWhenCorrected(BrokenMethod):
    """Works at a step's own prediction only."""

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return Around(network, after=lambda output: output / float(clock.evaluation == 0))


class RemembersCorrections(BrokenMethod):
    """Scales by what the last correction gave, also that of another image."""

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        size = 0.0

        def scale(output: Tensor) -> Tensor:
            nonlocal size
            if clock.evaluation > 0 and clock.store:
                size = float(output.norm())
            return output * (1 + 0.01 * size)

        return Around(network, after=scale)


class IgnoresRows(DeepCache):
    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return FirstRowsCache(network, self.options.cut, clock)


class FirstRowsCache(CachedUNet):
    def _recall(self) -> Tensor:
        assert self.feature is not None
        rows = self._clock.rows
        return self.feature if rows is None else self.feature[: len(rows)]


class RangeOfTheBatch(BrokenMethod):
    """Rounds to a grid that is as wide as the largest value of the batch."""

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        def rounded(sample: Tensor) -> Tensor:
            scale = sample.abs().max() / 7
            return (sample / scale).round() * scale

        return Around(network, before=rounded)


class HidesTheNetwork(BrokenMethod):
    """What comes after cannot find the layers."""

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        hidden = [network]

        class Hiding(nn.Module):
            def forward(self, *args: Any, **inputs: Any) -> Any:
                return hidden[0](*args, **inputs)

        return Hiding()


class KnowsOnlyBareNetworks(BrokenMethod):
    """Replaces what comes before by the network it remembers."""

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return TinyModel().load()


# --- broken callbacks -------------------------------------------------------------------------


class BrokenCallback(DenoisingCallback):
    """Leaves the prediction as it is, for its subclasses to break."""

    name = "broken"

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction


class UndescribedCallback(BrokenCallback):
    Options = Undescribed


class CalibratedCallback(BrokenCallback):
    """Scales the prediction by a number it calibrates, for its subclasses to break."""

    scale: Tensor | None = None

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        return {"scale": torch.tensor(0.9)}

    def use(self, artifact: Mapping[str, Tensor]) -> None:
        self.scale = artifact["scale"]

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction if self.scale is None else self.scale * prediction


class RandomMeasurement(CalibratedCallback):
    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        return {"scale": torch.rand(())}


class WritesNumbers(CalibratedCallback):
    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        return {"scale": 0.9}  # type: ignore[dict-item]


class KnowsItsArtifact(CalibratedCallback):
    """Uses what it has measured only while it is the very same object."""

    measured: Mapping[str, Tensor] | None = None

    def use(self, artifact: Mapping[str, Tensor]) -> None:
        self.measured = self.measured or artifact
        self.scale = artifact["scale"] if artifact is self.measured else None


class CorrectsWhatItMeasured(CalibratedCallback):
    """Takes its extra evaluation only once it is calibrated."""

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction if self.scale is None else step.predict(step.sample)


class NotFinite(BrokenCallback):
    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction / 0


class OneForAll(BrokenCallback):
    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction.mean(0, keepdim=True)


class OtherType(BrokenCallback):
    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction.double()


class LooksPastTheEnd(BrokenCallback):
    """Evaluates at the next timestep, which the last step does not have."""

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        later = step.index + 1
        return prediction if later < step.total else prediction * float("inf")


class AlmostNeutral(BrokenCallback):
    class Options(BaseOptions):
        strength: float = Field(0.0, description="0 changes nothing, or so it says")

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction + 1e-5 * step.sample


class ChangesThePrediction(BrokenCallback):
    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction.mul_(0.9)


class ChangesTheSample(BrokenCallback):
    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        step.sample.mul_(0.9)
        return prediction


class RemembersTrajectories(BrokenCallback):
    """Accelerates with the last prediction, also with that of another image."""

    last: Tensor | None = None

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        size = 0.0 if self.last is None else float(self.last.norm())
        self.last = prediction
        return prediction * (1 + 0.01 * size)


class CentresTheBatch(BrokenCallback):
    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction - prediction.mean()


class WantsFullSteps(BrokenCallback):
    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction if step.full else prediction * float("nan")


# --- broken metrics ---------------------------------------------------------------------------


class Brightness(Metric):
    """The mean of all pixels."""

    name = "brightness"
    total: Tensor
    count: Tensor

    def __init__(self, options: BaseOptions) -> None:
        super().__init__(options)
        self.add_state("total", torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, features: Any, indices: Tensor) -> None:
        self.total += features.double().mean(dim=(1, 2, 3)).sum()
        self.count += len(features)

    def compute(self) -> dict[str, float]:
        return {"brightness": float(self.total / self.count)}


class WithoutItsNumber(Brightness):
    def estimates(self, again: Any) -> dict[str, Estimate]:
        return {}


class OtherNumber(Brightness):
    def estimates(self, again: Any) -> dict[str, Estimate]:
        return {"brightness": Estimate(1.0)}


class GivesInfluence(Brightness):
    def estimates(self, again: Any) -> dict[str, Estimate]:
        values = torch.cat([batch.double().mean(dim=(1, 2, 3)) for batch, _ in again])
        return {"brightness": Estimate(float(values.mean()), self.influence(values))}

    def influence(self, values: Tensor) -> Tensor:
        return values - values.mean()  # as the batches come, not by index


class InfluenceOfSome(GivesInfluence):
    def influence(self, values: Tensor) -> Tensor:
        return values[:5]


class InfluenceOffCentre(GivesInfluence):
    def influence(self, values: Tensor) -> Tensor:
        return values


class InfiniteInfluence(GivesInfluence):
    def influence(self, values: Tensor) -> Tensor:
        return values / 0


class UndescribedMetric(Brightness):
    Options = Undescribed


class TensorResult(Brightness):
    def compute(self) -> dict[str, float]:
        return {"brightness": self.total / self.count}  # type: ignore[dict-item]


class NoResult(Brightness):
    def compute(self) -> dict[str, float]:
        return {}


class NotANumber(Brightness):
    def compute(self) -> dict[str, float]:
        return {"brightness": float("nan")}


class MeanOfMeans(Brightness):
    def update(self, features: Any, indices: Tensor) -> None:
        self.total += features.double().mean()
        self.count += 1


class ByArrival(Brightness):
    """Weighs images by when they came."""

    def update(self, features: Any, indices: Tensor) -> None:
        for image in features.double():
            self.count += 1
            self.total += image.mean() * self.count


class WantsFeatures(PSNR):
    """Compares, but cannot say whether images or features."""

    @property
    def network(self) -> Any:
        return ClassifierFeatures


class UnnamedRow(PSNR):
    def protocol(self) -> Options:
        return {}


class IgnoresReference(PSNR):
    def compare(self, pairs: Pairs) -> Tensor:
        return pairs.images.double().mean(dim=(1, 2, 3))


class NotAState(Brightness):
    """Keeps its sum where merging and resetting do not look."""

    def __init__(self, options: BaseOptions) -> None:
        super().__init__(options)
        self.kept: list[float] = []

    def update(self, features: Any, indices: Tensor) -> None:
        self.kept += features.double().mean(dim=(1, 2, 3)).tolist()

    def compute(self) -> dict[str, float]:
        return {"brightness": sum(self.kept) / len(self.kept)}


class CountsRanks(Brightness):
    """Divides by the number of processes, those without images too."""

    ranks: Tensor

    def __init__(self, options: BaseOptions) -> None:
        super().__init__(options)
        self.add_state("ranks", torch.ones((), dtype=torch.int64), "sum")

    def compute(self) -> dict[str, float]:
        return {"brightness": float(self.total / self.count / self.ranks)}


# --- broken models ----------------------------------------------------------------------------


class FlatShape(TinyModel):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.shape = (8, 8)  # type: ignore[assignment]


class PredictsNothing(TinyModel):
    prediction = "noise"  # type: ignore[assignment]


class RisingSchedule(TinyModel):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.schedule = NoiseSchedule(self.schedule.alphas_cumprod.flip(0))


class SingleSchedule(TinyModel):
    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.schedule = NoiseSchedule(self.schedule.alphas_cumprod.float())


class LabelsByPosition(TinyModel):
    def condition(self, images: Sequence[int]) -> Condition:
        return Condition({"class_labels": torch.arange(len(images)) % 4})


class NothingByPosition(TinyModel):
    def condition(self, images: Sequence[int]) -> Condition:
        given = super().condition(images)
        return Condition(given.inputs, {"class_labels": torch.arange(len(images)) % 4}, 2.0)


class GuidanceByBatch(TinyModel):
    def condition(self, images: Sequence[int]) -> Condition:
        given = super().condition(images)
        return Condition(given.inputs, given.unconditional, 1.0 + len(images))


class OneCaption(TinyModel):
    def captions(self, images: Sequence[int]) -> list[str] | None:
        return ["the same for all"]


class CaptionsByPosition(TinyModel):
    def captions(self, images: Sequence[int]) -> list[str] | None:
        return [str(position) for position, _ in enumerate(images)]


class CaptionsNowAndThen(TinyModel):
    def captions(self, images: Sequence[int]) -> list[str] | None:
        return ["zero"] if list(images) == [0] else None


class RealSkeleton(TinyModel):
    def skeleton(self) -> nn.Module:
        return self.load()


class OtherSkeleton(TinyModel):
    def skeleton(self) -> nn.Module:
        return TinyModel(network=unet()).skeleton()


class InTraining(TinyModel):
    def load(self) -> nn.Module:
        return super().load().train()


class OnMeta(TinyModel):
    def load(self) -> nn.Module:
        return super().load().to("meta")


class OtherWeights(TinyModel):
    def load(self) -> nn.Module:
        network = super().load()
        network.conv_in.bias.data.normal_()  # type: ignore[union-attr, operator]
        return network


class HalfTheChannels(TinyModel):
    def load(self) -> nn.Module:
        return Around(super().load(), after=lambda output: output[:, :1]).eval()


class InfiniteOutput(TinyModel):
    def load(self) -> nn.Module:
        return Around(super().load(), after=lambda output: output / 0).eval()


class DecodesToFloat(TinyModel):
    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)


class StretchesTheBatch(TinyModel):
    def decode(self, latents: Tensor) -> Tensor:
        return ((latents - latents.min()) / (latents.max() - latents.min()) * 255).to(torch.uint8)


class NoIdentity(TinyModel):
    def identity(self) -> dict[str, str]:
        return {}


class NewIdentity(TinyModel):
    def identity(self) -> dict[str, str]:
        return {"weights": str(id(self))}


# --- every check fails where it should ----------------------------------------------------------

Case = tuple[type[Any], Options, str]
BROKEN: dict[Callable[..., None], dict[str, list[Case]]] = {
    check_sampler: {
        "declaration": [
            (NamedInCapitals, {}, "lower-case letters.*got 'DDIM 2'"),
            (UndescribedSampler, {}, "steps have no description"),
            (LooseSampler, {}, "must refuse unknown keys"),
            (PredictsNoise, {}, "wanted some of epsilon, flow, sample, v, got {'noise'}"),
            (NoSteps, {}, "timesteps is empty"),
            (NegativeTimesteps, {}, r"numbers from 0, got \[3, -1\]"),
        ],
        "finite": [
            (DividesByZero, {}, "not finite"),
            (TruncatesTheBatch, {}, "has shape"),
        ],
        "previews": [(Multistep, {}, "needless previews changed the result")],
        "purity": [
            (Multistep, {}, "step 4 called again gives another result"),
            (InPlace, {}, "changed the state or prediction it was given"),
            (MutableMemory, {}, "step 4"),
            (RandomInput, {}, "network_input 4 differs"),
            (CountsEvaluations, {}, "evaluate 4 called again gives another result"),
            (EvaluatesInPlace, {}, "evaluate 4 changed the state it was given"),
            (StepsInEvaluation, {}, "evaluate 4 gives a state with another sample"),
        ],
        "second trajectory": [
            (CountsTrajectories, {}, "something is remembered"),
            (OwnRandomness, {}, "or random beside Noise"),
        ],
        "fresh instance": [(RandomAtBirth, {}, "a new instance gives another result")],
        "batch": [(Standardizes, {}, "reduced over the batch")],
    },
    check_efficiency_method: {
        "declaration": [
            (UnknownSlot, {}, "wanted 'cacher', 'quantizer' or None, got 'cache'"),
            (VersionZero, {}, "whole number from 1, got 0"),
            (UndescribedMethod, {}, "steps have no description"),
            (NoParts, {}, "is empty"),
            (TwoCachers, {}, "take one slot twice"),
        ],
        "full steps": [
            (StartsCached, {}, r"step 0 must be full, full_steps gives \[1, 3\]"),
            (RunsOver, {}, r"gives \[6, 8\], the run has 0..4"),
            (ChangesItsMind, {}, "other steps when asked again"),
        ],
        "skeleton": [
            (ChangesTheArtifact, {}, "an empty artifact, raises KeyError: 'scale'"),
            (NoStepsUntilCalibrated, {}, "an empty artifact, raises KeyError: 'steps'"),
            (KnowsOnlyBareNetworks, {}, "a full evaluation on the meta device raises"),
            (OneChannel, {}, r"a full evaluation .* shape \[1, 1, 8, 8\], wanted \[1, 3, 8, 8\]"),
            (CachesOneChannel, {}, r"a cached evaluation .* shape \[1, 1, 8, 8\], wanted"),
            (FullUntilCalibrated, {}, "5 steps for an empty artifact, 3 after calibration"),
        ],
        "finite": [(GivesNothing, {}, "not finite")],
        "artifact": [
            (KeepsItsResult, {}, "saved and loaded, gives another result"),
            (ArtifactOfNumbers, {}, r"\['scale'\] are not tensors"),
            (ChangesTheArtifact, {}, "artifact"),
        ],
        "calibration": [(RandomCalibration, {}, "calibrating again gives another result")],
        "second trajectory": [(NeverStops, {}, "something is remembered")],
        "extra evaluations": [
            (CountsCalls, {}, "count no calls"),
            (AlwaysStores, CACHE, "mind Clock.store"),
        ],
        "iec": [
            (FailsWhenCorrected, {}, "under IEC the result is not finite"),
            (RemembersCorrections, {}, "under IEC .* something is remembered"),
            (AlwaysStores, CACHE, "IEC of weight zero .* changed the result"),
        ],
        "rows": [(IgnoresRows, CACHE, "mind Clock.rows")],
        "batch": [(RangeOfTheBatch, {}, "reduced over the batch")],
        "composition": [
            (HidesTheNetwork, {}, "applied before a quantizer: the other method has no effect"),
            (KnowsOnlyBareNetworks, {}, "applied after a cacher: the other method has no effect"),
            (RangeOfTheBatch, {}, "applied after a cacher: .*reduced over the batch"),
            (CountsCalls, {}, "applied after a cacher"),
        ],
    },
    check_callback: {
        "declaration": [(UndescribedCallback, {}, "steps have no description")],
        "calibration": [(RandomMeasurement, {}, "calibrating again gives another result")],
        "artifact": [
            (WritesNumbers, {}, r"\['scale'\] are not tensors"),
            (KnowsItsArtifact, {}, "saved and loaded, gives another result"),
        ],
        "expected evaluations": [
            (CorrectsWhatItMeasured, {}, r"takes \(25, 0\) evaluations before .*, \(50, 0\) after"),
        ],
        "finite": [
            (NotFinite, {}, "on sampler ddim.*not finite"),
            (OneForAll, {}, r"gives torch.float32 \[1, 3, 8, 8\], wanted"),
            (OtherType, {}, "gives torch.float64"),
            (LooksPastTheEnd, {}, "not finite"),
        ],
        "neutral": [(AlmostNeutral, {}, "differs from that without a callback")],
        "inputs": [
            (ChangesThePrediction, {}, "changed the prediction in place"),
            (ChangesTheSample, {}, "changed step.sample in place"),
        ],
        "second trajectory": [(RemembersTrajectories, {}, "something is remembered")],
        "batch": [(CentresTheBatch, {}, "reduced over the batch")],
        "cached network": [
            (WantsFullSteps, {}, "not finite"),
            (RemembersTrajectories, {}, "something is remembered"),
        ],
    },
    check_metric: {
        "declaration": [(UndescribedMetric, {}, "steps have no description")],
        "result": [
            (TensorResult, {}, "wanted a float"),
            (NoResult, {}, "gives {}"),
            (NotANumber, {}, "brightness is nan"),
        ],
        "batches": [(MeanOfMeans, {}, "the same images in three batches gives brightness")],
        "order": [(ByArrival, {}, "the same images in another order")],
        "merge": [(NotAState, {}, "two parts merged"), (CountsRanks, {}, "two parts merged")],
        "empty": [(CountsRanks, {}, "merged with one that saw no image")],
        "reset": [(NotAState, {}, "reset and used again")],
        "estimates": [
            (WithoutItsNumber, {}, "lacks brightness"),
            (OtherNumber, {}, "gives brightness = 1.0"),
            (InfluenceOfSome, {}, r"wanted float64 \(96,\)"),
            (InfluenceOffCentre, {}, "wanted 0"),
            (InfiniteInfluence, {}, "not finite"),
            (GivesInfluence, {}, "depends on the order"),
        ],
        "pairs": [
            (WantsFeatures, {}, "this one has a network"),
            (UnnamedRow, {}, "does not name the row"),
            (IgnoresReference, {}, "another reference gives the same result"),
        ],
    },
    check_model: {
        "declaration": [
            (FlatShape, {}, r"wanted \(C, H, W\), got \(8, 8\)"),
            (PredictsNothing, {}, "got 'noise'"),
        ],
        "schedule": [
            (RisingSchedule, {}, "must fall"),
            (SingleSchedule, {}, r"wanted float64 \[N\], got torch.float32"),
        ],
        "labels": [
            (LabelsByPosition, {}, "image .* is told something else"),
            (NothingByPosition, {}, "image .* is told something else"),
            (GuidanceByBatch, {}, "depends on the batch"),
        ],
        "captions": [
            (OneCaption, {}, "wanted a text for each"),
            (CaptionsByPosition, {}, "image .* is told something else"),
            (CaptionsNowAndThen, {}, "of some images there are none"),
        ],
        "skeleton": [
            (RealSkeleton, {}, "not on the meta device"),
            (OtherSkeleton, {}, "differ in"),
        ],
        "weights": [
            (InTraining, {}, "not in eval mode"),
            (OnMeta, {}, "not on the CPU"),
            (OtherWeights, {}, "other weights every time"),
        ],
        "prediction": [
            (HalfTheChannels, {}, r"maps \[5, 3, 8, 8\] to \[5, 1, 8, 8\]"),
            (InfiniteOutput, {}, "not finite"),
        ],
        "decode": [
            (DecodesToFloat, {}, "wanted uint8"),
            (StretchesTheBatch, {}, "levels in another batch"),
        ],
        "identity": [(NoIdentity, {}, "wanted a hash"), (NewIdentity, {}, "from time to time")],
    },
}
GOOD: dict[Callable[..., None], type[Any]] = {
    check_sampler: Broken,
    check_efficiency_method: BrokenMethod,
    check_callback: BrokenCallback,
    check_metric: Brightness,
    check_model: TinyModel,
}


def names_of(check: Callable[..., None]) -> list[str]:
    """Names of the properties, as an error lists them."""
    with pytest.raises(ValueError, match="the checks are") as caught:
        check(GOOD[check], skip=["?"])
    return str(caught.value).partition("the checks are ")[2].split(", ")


def cases() -> Iterator[Any]:
    for check, properties in BROKEN.items():
        for name, broken in properties.items():
            for cls, options, message in broken:
                label = f"{check.__name__}-{name}-{cls.__name__}"
                yield pytest.param(check, name, cls, options, message, id=label)


@pytest.mark.parametrize("check", BROKEN)
def test_every_property_has_a_class_that_breaks_it(check: Callable[..., None]) -> None:
    assert list(BROKEN[check]) == names_of(check)
    check(GOOD[check])


@pytest.mark.parametrize(("check", "name", "cls", "options", "message"), cases())
def test_broken_classes_are_found(
    check: Callable[..., None], name: str, cls: type[Any], options: Options, message: str
) -> None:
    others = [other for other in names_of(check) if other != name]
    more = {"neutral": {"strength": 0.0}} if name == "neutral" else {}
    with pytest.raises(AssertionError, match=f"^{cls.__name__}: {name}: .*{message}"):
        check(cls, options, skip=others, **more)
