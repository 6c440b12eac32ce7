"""The quantizer against numbers recorded from the authors' code."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from helpers import FixedNoise, _new_name, ddim, oracle, original_ddpm, trajectory
from torch import Tensor, nn

from iec_eval.clock import Clock
from iec_eval.efficiency.deepcache import CachedUNet
from iec_eval.efficiency.quantized_layers import GridSearch
from iec_eval.efficiency.quantized_network import Bits, QuantizedNetwork, insert_quantizers
from iec_eval.efficiency.quantizer import Grid, fake_quantize, find_grid
from iec_eval.efficiency.unet_walk import core_of, skip_splits

OFFICIAL = GridSearch(official=True, samples=None)
CASES = [
    (kind, name, method, bits)
    for kind, names in {
        "weight": "conv3x3 conv1x1 linear conv1d positive_linear negative_linear heavy_tail",
        "act": "normal shifted silu softmax relu_like negative positive_far heavy_tail",
    }.items()
    for name in names.split()
    for method in ("mse", "max")
    for bits in (8, 4)
]


def rows_of(kind: str, x: Tensor) -> Tensor:
    return x.flatten(1) if kind == "weight" else x.reshape(1, -1)


@pytest.mark.parametrize(("kind", "name", "method", "bits"), CASES)
def test_grids_and_dequantized_tensors(kind: str, name: str, method: Any, bits: int) -> None:
    tensors, _ = oracle("quantizer")
    x, place = tensors[f"in/{kind}/{name}"], f"out/{kind}/{name}/{method}{bits}"
    grid = find_grid(rows_of(kind, x), bits, method, official=True, samples=None)
    scale, zero = tensors[f"{place}/delta"].flatten(), tensors[f"{place}/zero_point"].flatten()
    torch.testing.assert_close(grid.scale, scale, rtol=1e-6, atol=0)
    assert torch.equal(grid.zero_point, zero.round())
    shape = (-1, *[1] * (x.dim() - 1)) if kind == "weight" else ()
    found = fake_quantize(x, grid.scale.view(shape), grid.zero_point.view(shape), bits)
    torch.testing.assert_close(found, tensors[f"{place}/dequant"], rtol=1e-6, atol=1e-7)


def test_fixed_grids_round_zero_points_and_gather_steps() -> None:
    tensors, _ = oracle("quantizer")
    x, clock = tensors["in/fake/x"], Clock(4)
    scale, zero = tensors["in/fake/delta"], tensors["in/fake/zero_point"]
    for step in range(4):
        found = fake_quantize(x, scale[step], zero[step], 8)
        torch.testing.assert_close(found, tensors[f"out/fake/step{step}"], rtol=1e-6, atol=1e-6)
    clock.steps = tensors["in/fake/mixed_steps"]
    mixed = fake_quantize(x, clock.at(scale, x), clock.at(zero, x), 8)
    torch.testing.assert_close(mixed, tensors["out/fake/mixed"], rtol=1e-6, atol=1e-6)


def test_one_range_per_channel() -> None:
    tensors, _ = oracle("quantizer")
    x = tensors["in/act_channelwise/x"]
    grid = find_grid(x.movedim(1, 0).flatten(1), 8, "max", official=True)
    scale, zero = (value.view(1, -1, 1, 1) for value in grid)
    torch.testing.assert_close(scale, tensors["out/act_channelwise/delta"], rtol=1e-6, atol=0)
    assert torch.equal(zero, tensors["out/act_channelwise/zero_point"])
    found = fake_quantize(x, scale, zero, 8)
    torch.testing.assert_close(found, tensors["out/act_channelwise/dequant"], rtol=1e-6, atol=1e-6)


# --- the whole network ------------------------------------------------------------------------


class Sinusoids(nn.Module):
    """The original code's time embedding: diffusers' differs in the last bit of float32."""

    def forward(self, timestep: Tensor) -> Tensor:
        half = 16
        rate = math.log(10_000) / (half - 1)
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -rate)
        angles = timestep.float()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


RUNS = {"W8A8_N1": 8, "W4A8_N1": 4, "W8A8_N4": 8}
STEPS = 8
CUT = 4
OPERANDS = {
    "act_quantizer_q": "q",
    "act_quantizer_k": "k",
    "act_quantizer_v": "v",
    "act_quantizer_w": "softmax",
}


@cache
def recorded() -> dict[str, Tensor]:
    return oracle("quant_ddpm")[0]


def original(dtype: torch.dtype) -> Any:
    tensors, about = oracle("ddpm_unet")
    state = {key[5:]: value for key, value in tensors.items() if key.startswith("ckpt/")}
    network = original_ddpm(state, about["config"])
    network.time_proj = Sinusoids()
    return network.to(dtype)


def quantized(run: str, dtype: torch.dtype) -> tuple[Any, Clock, QuantizedNetwork]:
    """The network (cached for N4) with quantizers in place and off."""
    clock = Clock(STEPS, range(STEPS) if run.endswith("N1") else (0, 4))
    network = original(dtype)
    edges = frozenset({"conv_in", "conv_out"})
    bits = Bits(weights=RUNS[run], edges=edges)
    splits = skip_splits(network)
    placed = insert_quantizers(network, clock, bits, OFFICIAL, splits=splits)
    return (network if run.endswith("N1") else CachedUNet(network, CUT, clock)), clock, placed


def at_step(network: Any, clock: Clock, step: int, x: Tensor) -> Tensor:
    clock.step, clock.full, clock.evaluation = step, clock.is_full(step), 0
    when = torch.full((len(x),), float(recorded()["in/timesteps"][step]))
    output = network(x, when)
    return output if isinstance(output, Tensor) else output.sample


def our_name(module: str) -> str:
    return _new_name(f"{module}.x", 4).removesuffix(".x")


def scales_of(folder: str, placed: QuantizedNetwork) -> dict[str, Grid]:
    """The recorded grids under our names."""
    found = {}
    for key in (k for k in recorded() if k.startswith(folder) and k.endswith("/delta")):
        module, kind = key.removeprefix(folder).removesuffix("/delta").rsplit(".", 1)
        grid = Grid(recorded()[key], recorded()[key.replace("/delta", "/zero_point")])
        if kind in OPERANDS:
            found[f"{attention_name(module)}.{OPERANDS[kind]}"] = grid
        else:
            second = kind.endswith("_0")
            name = "weight" if kind.startswith("weight") else "input"
            found[f"{our_name(module)}.{name}{'1' if second else ''}"] = grid
    return found


def attention_name(module: str) -> str:
    """An attention has no weights of its own to rename: through one of its layers."""
    return our_name(f"{module}.q").removesuffix(".to_q")


@pytest.mark.parametrize("run", ["W8A8_N1", "W8A8_N4"])
def test_calibration_in_double_precision(run: str) -> None:
    network, clock, placed = quantized(run, torch.float64)
    placed.switch.mode = "observe"
    with torch.inference_mode():
        for step in range(STEPS):
            if not clock.is_full(step):
                network.feature = recorded()["in/W8A8_N4/calibration_features"][step // 4].double()
            at_step(network, clock, step, recorded()["in/x_cal_states"][step, :6].double())
    wanted = scales_of(f"out/{run}/scales_fp64/", placed)
    quantizers = placed.quantizers()
    assert set(wanted) == set(quantizers)
    exact = []
    for name, quantizer in quantizers.items():
        found, grid = quantizer.found(), wanted[name]
        away = (found.scale / grid.scale - 1).abs()
        # Steps that never run a layer have the grids of step 0 in the original, of the last one
        # that does here. Where one activation rounds the other way, ranges of the layers after it
        # move a little: it happens at step 0.
        own = grid.scale != grid.scale[0]
        assert (away[own] < 0.05).all(), name
        assert away[0] < 0.05, name
        codes = (found.zero_point - grid.zero_point.round()).abs()
        exact += ((away < 1e-6) & (codes == 0))[own].tolist()
    assert sum(exact) > {"W8A8_N1": 0.95, "W8A8_N4": 0.75}[run] * len(exact)


@pytest.mark.parametrize("run", ["W8A8_N1", "W4A8_N1"])
def test_weight_grids(run: str) -> None:
    _, _, placed = quantized(run, torch.float32)
    wanted = scales_of(f"out/{run}/scales/", placed)
    for name, layer in placed.layers.items():
        grid = layer.find_weight_grids(OFFICIAL)
        for group in range(len(layer.groups)):
            recorded_grid = wanted[f"{name}.weight{group or ''}"]
            torch.testing.assert_close(
                grid.scale[group], recorded_grid.scale, rtol=1e-6, atol=0, msg=name
            )
            assert torch.equal(grid.zero_point[group], recorded_grid.zero_point.round()), name


def take_recorded_grids(run: str, placed: QuantizedNetwork) -> None:
    weights = scales_of(f"out/{run.replace('N4', 'N1')}/scales/", placed)
    inputs = scales_of(f"out/{run}/scales/", placed)
    for name, layer in placed.layers.items():
        parts = [weights[f"{name}.weight{group or ''}"] for group in range(len(layer.groups))]
        layer.quantize_weights(Grid(*(torch.stack(p) for p in zip(*parts, strict=True))))
    for name, quantizer in placed.quantizers().items():
        quantizer.set_grids(*inputs[name])
    placed.switch.mode = "on"


@pytest.mark.parametrize("run", ["W8A8_N1", "W4A8_N1"])
def test_predictions_in_double_precision(run: str) -> None:
    network, clock, placed = quantized(run, torch.float64)
    take_recorded_grids(run, placed)
    with torch.inference_mode():
        found = [at_step(network, clock, i, recorded()["in/fp/x"][i].double()) for i in range(8)]
    wanted = recorded()[f"out/{run}/eps_per_step_fp64"].double()
    torch.testing.assert_close(torch.stack(found), wanted, atol=1e-5, rtol=0)


def test_cached_path_in_double_precision() -> None:
    network, clock, placed = quantized("W8A8_N4", torch.float64)
    take_recorded_grids("W8A8_N4", placed)
    with torch.inference_mode():
        full = at_step(network, clock, 4, recorded()["in/fp/x"][4].double())
        feature = network.feature.clone()
        cached = at_step(network, clock, 5, recorded()["in/fp/x"][5].double())
    place = "out/W8A8_N4/fp64"
    for found, name in (
        (full, "eps_full_step4"),
        (feature, "F_step4"),
        (cached, "eps_cached_step5"),
    ):
        wanted = recorded()[f"{place}/{name}"].double()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("run", RUNS)
def test_trajectories_stay_near_the_recorded_ones(run: str) -> None:
    """In float32 single roundings flip: a third of the quantization error is allowed."""
    network, clock, placed = quantized(run, torch.float32)
    take_recorded_grids(run, placed)
    sampler = ddim(steps=STEPS, spacing="quad")
    found = trajectory(network, sampler, FixedNoise(recorded()["in/x_T"]), clock=clock)
    away = (found - recorded()[f"out/{run}/noiec/x"]).abs()
    limit = oracle("quant_ddpm")[1]["runs"][run]["quant_error_vs_fp_final"] / 3
    assert away[1].max() < limit / 3
    assert away[-1].max() < limit


def test_the_core_of_a_cached_network_is_its_unet() -> None:
    network = original(torch.float32)
    assert core_of(CachedUNet(network, CUT, Clock(2))) is network
