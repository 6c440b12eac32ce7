"""Error correction: the fit, what it corrects, and the numbers recorded from the authors' code."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ConvNet, FixedNoise, build, ddim, oracle, run, trajectory, unet
from test_oracles import assert_recorded, network, official_iec
from test_quantizer_oracles import CUT, STEPS, at_step, quantized, recorded, take_recorded_grids
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iec_eval.calibration import Bench
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.callbacks.iec import IEC
from iec_eval.clock import Clock
from iec_eval.cost import stored_bytes
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.efficiency.deepcache import CachedUNet, DeepCache
from iec_eval.efficiency.error_correction import (
    CacheCorrection,
    HiddenCorrection,
    LayerFit,
    Line,
    QuantizationCorrection,
    StepAffine,
    StreamedFit,
    _FitFeatures,
)
from iec_eval.efficiency.quantized_layers import (
    ActivationQuantizer,
    GridSearch,
    QuantizedLayer,
    Switch,
)
from iec_eval.efficiency.quantizer import Grid, find_grid
from iec_eval.efficiency.timestep_quantizer import TimestepQuantizer
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Noise
from iec_eval.options import BaseOptions
from iec_eval.testing import TinyModel

Options = dict[str, Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the fit ----------------------------------------------------------------------------------


def by_numpy(x: Tensor, y: Tensor) -> Tensor:
    """Slope and intercept ``[2, C]`` of each channel, by numpy's least squares."""
    lines = []
    for of_x, of_y in zip(x.double().unbind(1), y.double().unbind(1), strict=True):
        columns = np.stack([of_x.flatten().numpy(), np.ones(of_x.numel())], axis=1)
        lines.append(np.linalg.lstsq(columns, of_y.flatten().numpy(), rcond=None)[0])
    return torch.tensor(np.array(lines)).T


@pytest.mark.parametrize("sizes", [[21], [8, 8, 5], [1, 17, 3]])
def test_fit_over_batches_is_least_squares(sizes: list[int]) -> None:
    x = 3 + random(21, 4, 5, 5)
    y = x * torch.tensor([0.5, -2.0, 1.0, 0.0]).view(4, 1, 1) + random(21, 4, 5, 5, seed=1)
    fit = StreamedFit(3, 4)
    for some_x, some_y in zip(x.split(sizes), y.split(sizes), strict=True):
        fit.add(1, some_x, some_y)
    found = torch.stack([table[1] for table in fit.solve()])
    torch.testing.assert_close(found, by_numpy(x, y), rtol=1e-9, atol=1e-9)


def test_fit_of_what_does_not_vary_is_a_shift() -> None:
    x = torch.tensor([0.1, -1e4]).view(1, 2, 1, 1).expand(5, 2, 3, 3)
    fit = StreamedFit(1, 2)
    fit.add(0, x, x + 0.25 + 0.1 * random(5, 1, 3, 3))
    line = fit.solve()
    assert torch.equal(line.slope, torch.ones(1, 2, dtype=torch.float64))
    shift = 0.25 + 0.1 * float(random(5, 1, 3, 3).mean())
    assert line.intercept[0].tolist() == pytest.approx([shift, shift], abs=1e-3)


def test_fit_of_nothing_is_the_identity() -> None:
    line = StreamedFit(4, 3).solve()
    assert torch.equal(line.slope, torch.ones(4, 3, dtype=torch.float64))
    assert torch.equal(line.intercept, torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["linear input", "convolution input"])
def test_affine_takes_the_entries_of_the_rows_steps(name: str) -> None:
    clock, line = Clock(4), Line(random(4, 3), random(4, 3, seed=1))
    affine = StepAffine(clock, line)
    x = random(3, 3, seed=2) if name == "linear input" else random(3, 3, 2, 2, seed=2)
    clock.steps = torch.tensor([2, 0, 2])
    mixed = affine(x)
    clock.steps = None
    for row, clock.step in enumerate([2, 0, 2]):
        assert torch.equal(mixed[row : row + 1], affine(x[row : row + 1]))
    wanted = line.slope[2].view(-1, *[1] * (x.dim() - 2)) * x[2]
    wanted = wanted + line.intercept[2].view(-1, *[1] * (x.dim() - 2))
    assert torch.equal(affine(x)[2], wanted)


# --- the recorded statistics ------------------------------------------------------------------


def as_released(line: Line, x_mean: Tensor, pairs: int, bias: Tensor | float = 0.0) -> Line:
    """Our line as the released code gives it.

    It divides the covariance by n but the variance by n - 1, and has the bias on both sides.
    """
    slope = line.slope * (pairs - 1) / pairs
    intercept = line.intercept + (line.slope - slope) * x_mean
    return Line(slope, intercept + (1 - slope) * bias)


def test_recorded_statistic() -> None:
    tensors, _ = oracle("dec")
    x, y = tensors["in/pair/X"], tensors["in/pair/Y"]
    fit = StreamedFit(1, 8)
    fit.add(0, x, y)
    mean = x.double().mean((0, 2, 3))
    line = as_released(fit.solve(), mean, x.numel() // 8)
    torch.testing.assert_close(line.slope[0].float(), tensors["out/pair/a"], rtol=1e-4, atol=1e-4)
    found = line.intercept[0].float()
    torch.testing.assert_close(found, tensors["out/pair/b"], rtol=1e-4, atol=1e-4)


def test_recorded_cache_correction() -> None:
    tensors, _ = oracle("dec")
    features, starts = tensors["in/F"], tensors["in/full_steps"].tolist()
    cached: Any = SimpleNamespace(feature=None)
    fit = StreamedFit(12, 32)
    for batch in features.split(4, dim=1):
        observer = _FitFeatures(cached, starts, fit)
        for step, cached.feature in enumerate(batch):
            observer.refine(SimpleNamespace(index=step), cached.feature)  # type: ignore[arg-type]
    line = fit.solve()
    before = [max(start for start in starts if start <= step) for step in range(12)]
    means = features.double().mean((1, 3, 4))[before]
    found = as_released(line, means, features[0, :, 0].numel())
    cached_steps = [step for step in range(12) if step not in starts]
    for table, name in zip(found, "ab", strict=True):
        wanted = tensors[f"out/cache/{name}"][cached_steps]
        torch.testing.assert_close(table[cached_steps].float(), wanted, rtol=1e-4, atol=1e-4)
    assert (line.slope[starts] == 1).all()
    assert (line.intercept[starts] == 0).all()


QUANTIZED = ["shortcut1x1_W8", "shortcut1x1_W4", "conv3x3_norm_W8", "conv3x3_norm_W4"]
HIDDEN = 32


def recorded_layer(name: str, clock: Clock) -> QuantizedLayer:
    """The layer with the grids that were recorded for its h part."""
    tensors, place = oracle("dec")[0], f"in/{name}"
    weight, bits = tensors[f"{place}/weight"], int(name[-1])
    layer = nn.Conv2d(*weight.shape[1::-1], weight.shape[-1], padding=weight.shape[-1] // 2)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(tensors[f"{place}/bias"])
    switch = Switch("on")
    inputs = [ActivationQuantizer(clock, switch, GridSearch(), 8) for _ in range(2)]
    inputs[0].set_grids(tensors[f"{place}/a_delta"], tensors[f"{place}/a_zero"])
    placed = QuantizedLayer(layer, inputs, bits, HIDDEN)
    scale, zero = (tensors[f"{place}/w_{kind}"].flatten() for kind in ("delta", "zero"))
    skip = find_grid(weight[:, HIDDEN:].flatten(1), bits)
    both = Grid(torch.stack([scale, skip.scale]), torch.stack([zero, skip.zero_point]))
    placed.quantize_weights(both)
    return placed.requires_grad_(False)


def hidden_input(name: str, step: int) -> Tensor:
    """The recorded input of the layer at a step: the corrected feature, normed for the 3x3."""
    tensors, _ = oracle("dec")
    start = max(s for s in tensors["in/full_steps"].tolist() if s <= step)
    a, b = (tensors[f"out/cache/{kind}"][step].view(-1, 1, 1) for kind in "ab")
    feature = tensors["in/F"][start] * a + b
    if not name.startswith("conv3x3"):
        return feature
    affine = (tensors[f"in/{name}/gn_{kind}"][:HIDDEN] for kind in ("weight", "bias"))
    return nn.functional.silu(nn.functional.group_norm(feature, 16, *affine, eps=1e-5))


@pytest.mark.parametrize("name", QUANTIZED)
@torch.inference_mode()
def test_recorded_quantization_correction(name: str) -> None:
    tensors, _ = oracle("dec")
    clock = Clock(12)
    with torch.inference_mode(False):
        layer = recorded_layer(name, clock)
        fit = LayerFit(layer, tensors[f"in/{name}/weight"], HIDDEN, clock)
    handle = layer.register_forward_pre_hook(fit)
    skip_width, means = layer.weight.shape[1] - HIDDEN, []
    for clock.step in range(12):
        hidden = hidden_input(name, clock.step)
        skip = torch.ones(len(hidden), skip_width, *hidden.shape[2:])  # must not matter
        layer(torch.cat([hidden, skip], dim=1))
        rounded = layer.quantize_input(torch.cat([hidden, skip], dim=1))[:, :HIDDEN]
        padding = layer.weight.shape[-1] // 2
        made = nn.functional.conv2d(rounded, layer.weight[:, :HIDDEN], padding=padding)
        means.append(made.double().mean((0, 2, 3)))
    handle.remove()
    bias = tensors[f"in/{name}/bias"].double()
    found = as_released(fit.fit.solve(), torch.stack(means), 6 * 6 * 6, bias)
    for table, kind in zip(found, ("alpha", "beta"), strict=True):
        wanted = tensors[f"out/{name}/{kind}"]
        torch.testing.assert_close(table.float(), wanted, rtol=3e-4, atol=3e-4)


# --- the recorded network ---------------------------------------------------------------------


def recorded_network(dtype: torch.dtype) -> tuple[CachedUNet, Clock]:
    """Quantized and cached, with the recorded corrections; only the shortcut is corrected."""
    cached, clock, placed = quantized("W8A8_N4", dtype)
    take_recorded_grids("W8A8_N4", placed)
    place = "in/W8A8_N4"
    tables = {kind: recorded()[f"{place}/dec_cache_{kind}"] for kind in "ab"}
    network = build(CacheCorrection).apply(cached, clock, tables)
    method = build(QuantizationCorrection, {"layers": ["conv_shortcut"]})
    # the recorded beta is added as it is: what is wrong with it is how it was fitted
    tables = {
        f"conv_shortcut.{kind}": recorded()[f"{place}/dec_quant_{kind}"]
        for kind in ("alpha", "beta")
    }
    return method.apply(network, clock, tables), clock


def test_corrected_network_in_double_precision() -> None:
    network, clock = recorded_network(torch.float64)
    with torch.inference_mode():
        full = at_step(network, clock, 4, recorded()["in/fp/x"][4].double())
        assert network.feature is not None
        feature = network.feature.clone()
        cached = at_step(network, clock, 5, recorded()["in/fp/x"][5].double())
    for found, name in (
        (full, "eps_full_step4"),
        (feature, "F_step4"),
        (cached, "eps_cached_step5"),
    ):
        wanted = recorded()[f"out/W8A8_N4_dec/fp64/{name}"].double()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        plain = recorded()[f"out/W8A8_N4/fp64/{name}"].double()
        if name != "F_step4":
            assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["noiec", "iec_tol0"])
def test_corrected_trajectories_stay_near_the_recorded_ones(mode: str) -> None:
    """In float32 single roundings flip: a third of the quantization error is allowed."""
    network, clock = recorded_network(torch.float32)
    sampler = ddim(steps=STEPS, spacing="quad")
    iec = [official_iec("tol0")] if mode == "iec_tol0" else []
    found = trajectory(network, sampler, FixedNoise(recorded()["in/x_T"]), iec, clock=clock)
    away = (found - recorded()[f"out/W8A8_N4_dec/{mode}/x"]).abs()
    limit = oracle("quant_ddpm")[1]["runs"]["W8A8_N4"]["quant_error_vs_fp_final"] / 3
    assert away[1].max() < limit / 3
    assert away[-1].max() < limit


def test_recorded_trajectory_with_an_affine_cache() -> None:
    tensors, about = oracle("deepcache_ddpm")
    clock = Clock(20, range(0, 20, 5))
    tables = {kind: tensors[f"in/affine/{kind}"] for kind in "ab"}
    cached = build(CacheCorrection).apply(CachedUNet(network(), CUT, clock), clock, tables)
    sampler = ddim(steps=20, spacing="quad")
    states = trajectory(cached, sampler, FixedNoise(tensors["in/x_T"]), clock=clock)
    assert_recorded(states, tensors["out/affine/quad20/N5/noiec/x"], about)


# --- what a correction does -------------------------------------------------------------------

TOTAL = 6
STAGES: dict[str, tuple[type[EfficiencyMethod], Options]] = {
    "cache": (DeepCache, {"interval": 3, "cut": 2}),
    "quantizer": (TimestepQuantizer, {"weight_bits": 4, "activation_bits": 4}),
    "cache-correction": (CacheCorrection, {}),
    "quantization-correction": (QuantizationCorrection, {}),
}
CONSUMER = "up_blocks.1.resnets.0"  # the second resnet from the output, as cut is 2
WIDTH, OUTPUTS = 16, 8  # channels of the feature, and of what the consumer's layers make of it
ORDERS = [
    ["cache", "cache-correction", "quantizer", "quantization-correction"],
    ["quantizer", "cache", "cache-correction", "quantization-correction"],
    ["cache", "quantizer", "quantization-correction", "cache-correction"],
]


def bench_of(network: nn.Module, clock: Clock, model: TinyModel, images: int = 6) -> Bench:
    return Bench(network, clock, model, ddim(steps=clock.total), seed=5, images=images)


def staged(
    names: Sequence[str], model: TinyModel, artifacts: dict[str, Artifact] | None = None
) -> tuple[nn.Module, Clock, dict[str, Artifact]]:
    """The model's network with the stages applied, calibrated in turn unless given."""
    network, clock, made = model.load(), Clock(TOTAL), dict[str, Artifact]()
    for name in names:
        cls, options = STAGES[name]
        method = build(cls, options)
        given = (artifacts or {}).get(name)
        made[name] = method.calibrate(bench_of(network, clock, model)) if given is None else given
        clock.full_steps &= frozenset(method.full_steps(TOTAL, made[name]))
        network = method.apply(network, clock, made[name])
    return network, clock, made


def latents(network: nn.Module, clock: Clock, model: TinyModel, callbacks: Any = ()) -> Tensor:
    noise = Noise(3, [0, 7, 2], model.shape)
    condition = model.condition(noise.images)
    return run(network, ddim(steps=TOTAL), noise, callbacks, clock=clock, condition=condition)


def identity_tables(artifact: Artifact) -> dict[str, Tensor]:
    slopes = ("a", "conv1.alpha", "conv_shortcut.alpha")
    return {
        name: torch.full_like(table, 1.0 if name in slopes else 0.0)
        for name, table in artifact.items()
    }


def test_identity_on_the_cache_is_deepcache_bit_by_bit() -> None:
    model = TinyModel()
    network, clock, made = staged(["cache", "cache-correction"], model)
    corrected = latents(network, clock, model)
    plain = latents(*staged(["cache"], model)[:2], model)
    assert not torch.allclose(corrected, plain, atol=1e-3)
    given = {"cache-correction": identity_tables(made["cache-correction"])}
    network, clock, _ = staged(["cache", "cache-correction"], model, given)
    iec = build(IEC, {"preset": "paper"})
    assert torch.equal(latents(network, clock, model), plain)
    other, other_clock, _ = staged(["cache"], model)
    with_iec = latents(network, clock, model, [iec])
    assert torch.equal(with_iec, latents(other, other_clock, model, [iec]))


def double_model() -> TinyModel:
    """In float64 no rounding of a quantizer flips between two orders of the same sum."""
    model: TinyModel = build(TinyModel, {"double": True})
    return model


def test_identity_on_the_layers_is_the_quantized_network() -> None:
    model, name = double_model(), "quantization-correction"
    names = ["cache", "quantizer", name]
    corrected, clock, made = staged(names, model)
    identity, same_clock, _ = staged(names, model, {**made, name: identity_tables(made[name])})
    plain, plain_clock, _ = staged(names[:-1], model, made)
    wanted = latents(plain, plain_clock, model)
    found = latents(identity, same_clock, model)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(latents(corrected, clock, model), wanted, atol=1e-3)


class Features(DenoisingCallback):
    """Keeps the cache's feature of every step, as it is stored."""

    name = "features"

    def __init__(self, cached: Any) -> None:
        super().__init__(BaseOptions())
        self.cached, self.kept = cached, list[Tensor]()

    def refine(self, step: Any, prediction: Tensor) -> Tensor:
        self.kept.append(self.cached.feature)
        return prediction


def features_of(cached: Any, clock: Clock, model: TinyModel) -> list[Tensor]:
    """F_i of the calibration images, every step full; they are one batch."""
    seen, bench = Features(cached), bench_of(cached, clock, model)
    with bench.every_step_full():
        bench.run([seen])
    return seen.kept


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().square().sum())


def test_corrected_features_are_nearest_on_the_calibration_images() -> None:
    model = TinyModel()
    network, clock, made = staged(["cache", "cache-correction"], model)
    cached: Any = network
    features = features_of(cached, clock, model)
    for clock.step, feature in enumerate(features):
        start = features[clock.step // 3 * 3]
        if clock.is_full(clock.step):
            assert torch.equal(cached.correction(start), start)
            continue
        line = torch.stack([made["cache-correction"][kind][clock.step] for kind in "ab"])
        torch.testing.assert_close(line, by_numpy(start, feature).float(), rtol=1e-4, atol=1e-4)
        assert error(cached.correction(start), feature) < error(start, feature)


class HiddenParts:
    """Keeps what a layer makes of h alone at every step, and what it should: no bias, no skip.

    A forward pre-hook of the quantized layer; ``exact`` is the layer before it was quantized.
    """

    def __init__(self, exact: nn.Conv2d, width: int) -> None:
        self.exact, self.width = exact, width
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: QuantizedLayer, inputs: tuple[Tensor, ...]) -> None:
        made = self._convolve(layer.quantize_input(*inputs), layer.weight)
        self.pairs.append((made, self._convolve(*inputs, self.exact.weight)))

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        hidden = x.clone()
        hidden[:, self.width :] = 0
        return nn.functional.conv2d(hidden, weight, padding=self.exact.padding)


@pytest.mark.parametrize("name", ["conv1", "conv_shortcut"])
def test_corrected_layers_are_nearest_on_the_calibration_images(name: str) -> None:
    """On the trajectory that the correction was fitted on, that is without it."""
    model = TinyModel()
    network, clock, _ = staged(ORDERS[0][:-1], model)
    cached: Any = network
    bench = bench_of(network, clock, model)
    made = build(QuantizationCorrection).calibrate(bench)
    exact: Any = model.load().get_submodule(f"{CONSUMER}.{name}")
    parts = HiddenParts(exact, cached.channels)
    handle = getattr(cached.consumer, name).register_forward_pre_hook(parts)
    bench.run([])
    handle.remove()
    alpha, beta = made[f"{name}.alpha"], made[f"{name}.beta"]
    for step, (found, wanted) in enumerate(parts.pairs):
        line = torch.stack([alpha[step], beta[step]])
        torch.testing.assert_close(line, by_numpy(found, wanted).float(), rtol=1e-4, atol=1e-4)
        slope, intercept = line.view(2, -1, 1, 1)
        assert error(slope * found + intercept, wanted) < error(found, wanted)


@pytest.mark.parametrize("name", ["conv1", "conv_shortcut"])
@torch.no_grad()
def test_only_what_the_feature_gives_is_corrected(name: str) -> None:
    """What the skip and the bias give stays as it is."""
    network, clock, made = staged(ORDERS[0], double_model())
    cached: Any = network
    layer = getattr(cached.consumer, name)
    tables = made["quantization-correction"]
    x, parts = random(2, layer.weight.shape[1], 8, 8).double(), HiddenParts(layer.layer, WIDTH)
    for clock.step in range(TOTAL):
        alpha, beta = (
            tables[f"{name}.{kind}"][clock.step, :, None, None] for kind in ("alpha", "beta")
        )
        parts(layer, (x,))
        hidden, _ = parts.pairs[-1]
        wanted = layer.layer(layer.quantize_input(x)) + (alpha - 1) * hidden + beta
        torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-9)


def test_calibration_streams() -> None:
    """Batches of 4 images and one of all 6 give the same lines, but for rounding."""
    model = TinyModel()
    cached, clock, made = staged(["cache", "cache-correction"], model)
    with_small = SmallBatches(cached, clock, model, ddim(steps=TOTAL), seed=5, images=6)
    found = build(CacheCorrection).calibrate(with_small)
    for name, table in made["cache-correction"].items():
        torch.testing.assert_close(found[name], table, rtol=1e-4, atol=1e-4)
    assert found["a"].std() > 0


class SmallBatches(Bench):
    def run(self, callbacks: Any, **options: Any) -> None:
        super().run(callbacks, **{"batch_size": 4, **options})


@pytest.mark.parametrize("order", ORDERS)
def test_calibration_leaves_the_network_as_it_was(order: list[str]) -> None:
    model = TinyModel()
    for position, name in enumerate(order):
        if "correction" not in name:
            continue
        network, clock, _ = staged(order[:position], model)
        before, modules = latents(network, clock, model), list(network.modules())
        full = clock.full_steps
        build(STAGES[name][0]).calibrate(bench_of(network, clock, model))
        assert torch.equal(latents(network, clock, model), before)
        assert list(network.modules()) == modules
        assert not any(module._forward_pre_hooks for module in modules)
        assert clock.full_steps == full


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_corrects_the_same_places(order: list[str]) -> None:
    model = TinyModel()
    network, _, made = staged(order, model)
    cached = next(m for m in network.modules() if isinstance(m, CachedUNet))
    assert cached.correction is not None
    corrected = {
        name for name, module in cached.network.named_modules()
        if isinstance(module, QuantizedLayer) and module.correction is not None
    }  # fmt: skip
    assert corrected == {f"{CONSUMER}.conv1", f"{CONSUMER}.conv_shortcut"}
    assert set(made["cache-correction"]) == {"a", "b"}
    for name in ("conv1", "conv_shortcut"):
        for kind in ("alpha", "beta"):
            assert made["quantization-correction"][f"{name}.{kind}"].shape == (TOTAL, OUTPUTS)


@torch.no_grad()
def test_rows_of_different_steps() -> None:
    """As when a batch is put together for learning: each row is at its own step."""
    model = double_model()
    network, clock, _ = staged(ORDERS[0], model)
    cached: Any = network
    x, features = random(3, *model.shape).double(), random(3, WIDTH, 8, 8, seed=1).double()
    steps, when, labels = [4, 1, 5], torch.full((3,), 500.0), torch.tensor([2, 0, 3])
    clock.full, clock.steps, cached.feature = False, torch.tensor(steps), features
    mixed = cached(x, when, class_labels=labels)
    clock.steps = None
    for row, clock.step in enumerate(steps):
        wanted = cached(x, when, class_labels=labels)
        torch.testing.assert_close(mixed[row], wanted[row], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(mixed[row - 1], wanted[row - 1], atol=1e-4)


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
@pytest.mark.parametrize("split", [True, False])
def test_every_cut_and_undivided_layers(cut: int, split: bool) -> None:
    model = TinyModel(network=unet())
    network, clock = model.load(), Clock(TOTAL)
    stages: list[EfficiencyMethod] = [
        build(DeepCache, {"interval": 3, "cut": cut}),
        build(TimestepQuantizer, {"split_skips": split}),
        build(CacheCorrection),
        build(QuantizationCorrection),
    ]
    for method in stages:
        artifact = method.calibrate(bench_of(network, clock, model, images=2))
        clock.full_steps &= frozenset(method.full_steps(TOTAL, artifact))
        network = method.apply(network, clock, artifact)
    cached: Any = network
    latents(network, clock, model)
    assert cached.channels == cached.feature.shape[1]
    assert cached.correction.slope.shape == (TOTAL, cached.channels)
    assert cached.consumer.conv1.correction.affine.slope.std() > 0


# --- without an artifact ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_structure_and_cost_are_known_before_calibration(order: list[str]) -> None:
    model = TinyModel()
    calibrated, _, made = staged(order, model)
    clock, network = Clock(TOTAL), model.skeleton()
    kept = [name for name in order if "correction" not in name]
    plain, plain_clock, _ = staged(kept, model, made)
    for name in order:
        method = build(*STAGES[name])
        clock.full_steps &= frozenset(method.full_steps(TOTAL, {}))
        network = method.apply(network, clock, {})
    kinds = [[type(m) for m in each.modules()] for each in (network, calibrated)]
    assert kinds[0] == kinds[1]
    assert stored_bytes(network) == stored_bytes(calibrated)
    # two tables of floats: one of the feature, one of each layer's output
    tables = 2 * 4 * TOTAL * (WIDTH + OUTPUTS + OUTPUTS)
    assert stored_bytes(network) - stored_bytes(plain) == tables
    assert flops(network, clock, model, "meta") == flops(plain, plain_clock, model, "cpu")


def flops(network: nn.Module, clock: Clock, model: TinyModel, device: str) -> list[int]:
    """Of a full evaluation, then of a cached one."""
    x, when = torch.zeros(1, *model.shape, device=device), torch.zeros(1, device=device)
    labels, found = torch.zeros(1, dtype=torch.int64, device=device), []
    for clock.full in (True, False):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, when, class_labels=labels)
        found.append(counter.get_total_flops())
    return found


# --- refusals ---------------------------------------------------------------------------------


def test_networks_without_what_is_corrected() -> None:
    clock = Clock(TOTAL)
    with pytest.raises(Incompatible, match="caches nothing; put deepcache before it"):
        build(CacheCorrection).apply(ConvNet(), clock, {})
    with pytest.raises(Incompatible, match="caches nothing; put deepcache before it"):
        build(QuantizationCorrection).apply(unet(), clock, {})
    cached = CachedUNet(unet(), 2, clock)
    with pytest.raises(Incompatible, match=r"conv1 .* is not; put timestep-quantizer before it"):
        build(QuantizationCorrection).apply(cached, clock, {})


def test_a_resnet_without_a_shortcut() -> None:
    cached = CachedUNet(unet(), 2, Clock(TOTAL))
    cached.consumer.conv_shortcut = None
    with pytest.raises(Incompatible, match="has no conv_shortcut; leave it out of layers"):
        build(QuantizationCorrection, {"layers": ["conv_shortcut"]}).apply(cached, Clock(1), {})


@pytest.mark.parametrize("name", ["cache-correction", "quantization-correction"])
def test_nothing_is_corrected_twice(name: str) -> None:
    network, clock, made = staged(ORDERS[0], TinyModel())
    with pytest.raises(Incompatible, match="corrected already"):
        build(*STAGES[name]).apply(network, clock, made[name])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "layers: .* at least 1 item"),
        (["conv2"], r"layers\.0: .*'conv1' or 'conv_shortcut'"),
        (["conv_shortcut", "conv1", "conv1"], "layers: conv1 is listed twice"),
        ("conv1", "layers: .* list"),
    ],
)
def test_wrong_layers(layers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(QuantizationCorrection, {"layers": layers})


def test_only_the_layers_asked_for() -> None:
    model = TinyModel()
    network, clock, _ = staged(ORDERS[0][:-1], model)
    method = build(QuantizationCorrection, {"layers": ["conv_shortcut"]})
    made = method.calibrate(bench_of(network, clock, model))
    assert set(made) == {"conv_shortcut.alpha", "conv_shortcut.beta"}
    cached: Any = method.apply(network, clock, made)
    assert cached.consumer.conv1.correction is None
    assert isinstance(cached.consumer.conv_shortcut.correction, HiddenCorrection)
