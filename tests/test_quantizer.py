"""Grids, fake quantization and the timestep-wise quantizer as a method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from helpers import SCHEDULE, build, conditional_unet, ddim, unet
from torch import Tensor, nn

from iec_eval.calibration import Bench
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser
from iec_eval.efficiency import quantized_layers
from iec_eval.efficiency.deepcache import CachedUNet
from iec_eval.efficiency.quantized_layers import (
    ActivationQuantizer,
    GridSearch,
    QuantizedAttention,
    QuantizedLayer,
    Switch,
)
from iec_eval.efficiency.quantized_network import find_quantized
from iec_eval.efficiency.quantizer import SHRINKS, fake_quantize, find_grid
from iec_eval.efficiency.timestep_quantizer import TimestepQuantizer
from iec_eval.efficiency.unet_walk import skip_splits
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Noise
from iec_eval.study import CalibrationSpec
from iec_eval.testing import TinyModel, check_efficiency_method
from iec_eval.testing.tiny import TinyOptions

STEPS = 4
FINE = {"weight_bits": 16, "activation_bits": 16, "softmax_bits": 16, "search": "max"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- grids ------------------------------------------------------------------------------------


def test_min_max_per_channel_is_torchs_own() -> None:
    weight = random(7, 40)
    grid = find_grid(weight, 8, "max")
    wanted = torch.fake_quantize_per_channel_affine(
        weight, grid.scale, grid.zero_point.int(), 0, 0, 255
    )
    found = fake_quantize(weight, grid.scale[:, None], grid.zero_point[:, None], 8)
    assert torch.equal(found, wanted)


def test_min_max_per_tensor_is_torchs_own() -> None:
    x = random(3, 4, 5, 5) + 0.7
    grid = find_grid(x.reshape(1, -1), 8, "max")
    scale, zero = float(grid.scale), int(grid.zero_point)
    wanted = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
    assert torch.equal(fake_quantize(x, grid.scale, grid.zero_point, 8), wanted)


def test_min_max_spans_the_range_by_hand() -> None:
    grid = find_grid(torch.tensor([[-1.0, 0.25, 2.0]]), 2, "max")
    assert torch.equal(grid.scale, torch.tensor([1.0]))
    assert torch.equal(grid.zero_point, torch.tensor([1.0]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_least_error_search_equals_trying_every_shrink(bits: int) -> None:
    x = random(2, 300, seed=bits).pow(3)
    grid = find_grid(x, bits, "mse")
    for row in range(2):
        best = min(SHRINKS, key=lambda s: shrunk_error(x[row].double().numpy(), s, bits))
        low, high = best * float(x[row].min()), best * float(x[row].max())
        assert float(grid.scale[row]) == pytest.approx((high - low) / (2**bits - 1), rel=1e-5)


def shrunk_error(x: Any, shrink: float, bits: int) -> float:
    """Straight from the definition, in numpy."""
    top = 2**bits - 1
    low, high = shrink * x.min(), shrink * x.max()
    scale = (high - low) / top
    zero = np.clip(-np.round(low / scale), 0, top)
    quantized = (np.clip(np.round(x / scale) + zero, 0, top) - zero) * scale
    return float(np.mean(np.abs(x - quantized) ** 2.4))


def test_percentiles_clip_outliers() -> None:
    x = torch.cat([torch.linspace(-1, 1, 1001), torch.tensor([1000.0])])[None]
    grid = find_grid(x, 8, "percentile", percentile=99.0)
    assert float(grid.scale) * 255 == pytest.approx(1.96, rel=0.02)


def test_error_is_half_a_level_inside_the_range() -> None:
    x = random(1, 5000)
    grid = find_grid(x, 8, "max")
    error = (fake_quantize(x, grid.scale, grid.zero_point, 8) - x).abs()
    assert error.max() <= grid.scale / 2 * 1.01


@pytest.mark.parametrize("search", ["mse", "max", "percentile"])
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_a_constant_tensor_keeps_its_value(search: Any, official: bool, value: float) -> None:
    x = torch.full((1, 20), value)
    grid = find_grid(x, 8, search, official=official)
    assert grid.scale.isfinite().all()
    torch.testing.assert_close(fake_quantize(x, grid.scale, grid.zero_point, 8), x)


@pytest.mark.parametrize("search", ["mse", "max"])
@pytest.mark.parametrize("sign", [1, -1])
def test_single_signed_ranges_hold_zero(search: Any, sign: int) -> None:
    x = sign * (torch.rand(1, 400, generator=torch.Generator().manual_seed(1)) + 5)
    grid = find_grid(x, 8, search)
    assert 0 <= float(grid.zero_point) <= 255
    assert (fake_quantize(x, grid.scale, grid.zero_point, 8) - x).abs().max() < 0.05 * 6


def test_a_huge_tensor_is_scored_by_a_fixed_sample() -> None:
    x = random(1, 100_000)
    once, again = find_grid(x, 4), find_grid(x.clone(), 4)
    assert torch.equal(once.scale, again.scale)
    whole = find_grid(x, 4, samples=None)
    assert float(once.scale / whole.scale) == pytest.approx(1, abs=0.06)


def test_rounding_passes_gradients() -> None:
    x = random(1, 50).requires_grad_()
    scale = torch.tensor([0.1], requires_grad=True)
    fake_quantize(x, scale, torch.tensor([8.0]), 4).sum().backward()
    codes = (x / scale).round() + 8
    inside = codes.clamp(0, 15) == codes
    assert x.grad is not None
    assert torch.equal(x.grad != 0, inside)
    assert scale.grad is not None


# --- activation quantizers --------------------------------------------------------------------


def quantizer(clock: Clock, switch: Switch, **search: Any) -> ActivationQuantizer:
    return ActivationQuantizer(clock, switch, GridSearch(samples=None, **search), 8)


def test_each_step_has_its_own_grid_and_batches_are_averaged() -> None:
    clock, switch = Clock(2), Switch("observe")
    one = quantizer(clock, switch)
    batches = [random(4, 6, seed=seed) for seed in range(4)]
    for number, batch in enumerate(batches):
        clock.step = number % 2
        one(batch)
    grid = one.found()
    for step in range(2):
        parts = [find_grid(batches[i].reshape(1, -1), 8, samples=None) for i in (step, step + 2)]
        mean = (parts[0].scale + parts[1].scale) / 2
        torch.testing.assert_close(grid.scale[step], mean[0].double())


def test_the_largest_range_of_all_batches_is_kept() -> None:
    clock = Clock(1)
    one = quantizer(clock, Switch("observe"), search="max")
    parts = [random(2, 9, seed=seed) for seed in range(3)]
    for part in parts:
        one(part)
    whole = find_grid(torch.cat(parts).reshape(1, -1), 8, "max")
    spacing = float(whole.scale)
    assert float(one.found().scale) == pytest.approx(spacing, rel=0.01)


def test_rows_of_different_steps_get_their_own_grids() -> None:
    clock, switch = Clock(3), Switch("on")
    one = quantizer(clock, switch)
    one.set_grids(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([10.0, 20.0, 30.0]))
    x = random(4, 2, 3)
    steps = [2, 0, 1, 2]
    apart = []
    for row, step in enumerate(steps):
        clock.step = step
        apart.append(one(x[row]))
    clock.steps = torch.tensor(steps)
    torch.testing.assert_close(one(x), torch.stack(apart))


# --- the method -------------------------------------------------------------------------------


def calibrated(model: TinyModel, clock: Clock | None = None, **options: Any) -> tuple[Any, Any]:
    method = build(TimestepQuantizer, options)
    clock = clock or Clock(STEPS)
    bench = Bench(model.load(), clock, model, ddim(steps=STEPS), 1, 4)
    return method, method.calibrate(bench)


def first_prediction(network: Any, model: TinyModel, clock: Clock, *, size: float = 1.0) -> Tensor:
    """Of the calibration images at the first step, where their inputs are the noise itself."""
    noise = size * Noise(1, range(4), model.shape, calibration=True).initial()
    clock.step, clock.full = 0, True
    with torch.inference_mode():
        denoiser = Denoiser(network, model.condition(range(4)), clock)
        return denoiser(noise, ddim(steps=STEPS).timesteps[0])


@pytest.mark.parametrize("search", ["mse", "max", "percentile"])
@pytest.mark.parametrize("size", [1.0, 1.4])
def test_sixteen_bits_are_full_precision(search: str, size: float) -> None:
    """Also for inputs that go beyond those of the calibration."""
    model, clock = TinyModel(), Clock(STEPS)
    method, artifact = calibrated(model, **{**FINE, "search": search})
    network = method.apply(model.load(), clock, artifact)
    found = first_prediction(network, model, clock, size=size)
    wanted = first_prediction(model.load(), model, clock, size=size)
    assert (found - wanted).norm() / wanted.norm() < 1e-3


def test_fewer_bits_are_worse() -> None:
    model, clock, errors = TinyModel(), Clock(STEPS), []
    wanted = first_prediction(model.load(), model, clock)
    for bits in (8, 6, 4, 2):
        method, artifact = calibrated(model, weight_bits=bits, edge_bits=bits)
        found = first_prediction(method.apply(model.load(), clock, artifact), model, clock)
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors == sorted(errors)
    assert errors[0] < 0.1


@pytest.mark.parametrize(("there", "most", "taken"), [(1, 64, 1), (512, 3, 3), (70, 70, 70)])
def test_any_number_of_calibration_images_will_do(there: int, most: int, taken: int) -> None:
    """As many are denoised as the option says, in batches whose ranges are averaged."""
    model, clock, seen = TinyModel(), Clock(STEPS), list[int]()

    class Counting(Bench):
        def run(self, callbacks: Any, *, images: int | None = None, **more: Any) -> None:
            seen.append(min(self.images, images or self.images))
            super().run(callbacks, images=images, **more)

    method = build(TimestepQuantizer, {"search": "max", "images": most})
    artifact = method.calibrate(Counting(model.load(), clock, model, ddim(steps=STEPS), 1, there))
    assert seen == [taken]
    assert all(table.isfinite().all() for table in artifact.values())
    assert first_prediction(method.apply(model.load(), clock, artifact), model, clock).std() > 0


def processors_of(network: nn.Module) -> list[type[Any]]:
    return [type(m.processor) for m in network.modules() if isinstance(m, Attention)]


def test_calibration_leaves_the_network_as_it_was() -> None:
    model, network = TinyModel(), TinyModel().load()
    before = {name: type(module) for name, module in network.named_modules()}
    processors = processors_of(network)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    build(TimestepQuantizer).calibrate(Bench(network, Clock(STEPS), model, ddim(steps=STEPS), 1, 2))
    assert {name: type(module) for name, module in network.named_modules()} == before
    assert processors_of(network) == processors
    after = network.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_every_layer_and_attention_is_quantized() -> None:
    network = unet()
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    placed = find_quantized(build(TimestepQuantizer).apply(network, Clock(STEPS), {}))
    assert list(placed.layers) == layers
    assert len(placed.attentions) == len(processors_of(network)) > 1
    assert len(placed.quantizers()) > len(layers) + 3 * len(placed.attentions)


def test_edges_keep_eight_bits_and_may_be_named() -> None:
    method = build(TimestepQuantizer, {"weight_bits": 4, "activation_bits": 6})
    placed = find_quantized(method.apply(unet(), Clock(STEPS), {}))
    bits = {name: (x.weight_bits, x.quantizers[0].bits) for name, x in placed.layers.items()}
    assert bits.pop("conv_in") == bits.pop("conv_out") == (8, 8)
    assert set(bits.values()) == {(4, 6)}
    named = build(TimestepQuantizer, {"weight_bits": 4, "edge_layers": ["time_embedding.linear_1"]})
    layers = find_quantized(named.apply(unet(), Clock(STEPS), {})).layers
    assert [n for n, x in layers.items() if x.weight_bits == 8] == ["time_embedding.linear_1"]
    with pytest.raises(ConfigError, match="edge_layers names conv_first, which UNet2DModel does"):
        build(TimestepQuantizer, {"edge_layers": ["conv_first"]}).apply(unet(), Clock(STEPS), {})


@pytest.mark.parametrize("make", [unet, conditional_unet])
def test_decoder_convolutions_are_split_where_the_skip_begins(make: Any) -> None:
    network = make(layers_per_block=2)
    splits, seen = skip_splits(network), {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name] = args[0].shape[1]

        return hook

    decoder = [
        n for n, _ in network.named_modules() if n.startswith("up_blocks") and "resnets" in n
    ]
    assert {name.rsplit(".", 1)[0] for name in splits} == {
        name for name in decoder if name.split(".")[-2] == "resnets"
    }
    hiddens = {}
    cat = torch.cat

    def spy(tensors: Any, dim: int = 0) -> Tensor:
        hiddens.setdefault("sizes", []).append(tensors[0].shape[1])
        return cat(tensors, dim=dim)

    for name in splits:
        network.get_submodule(name).register_forward_pre_hook(note(name))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "cat", spy)
        run_once(network)
    order = [name for name in seen if name.endswith("conv1")]
    joined = [size for size in hiddens["sizes"] if size][-len(order) :]
    assert [splits[name] for name in order] == joined


def run_once(network: Any) -> Tensor:
    sample = torch.zeros(1, network.config.in_channels, 8, 8)
    if "cross_attention_dim" in network.config:
        return network(sample, torch.tensor([5.0]), torch.zeros(1, 3, 12)).sample
    return network(sample, torch.tensor([5.0])).sample


def test_the_split_can_be_switched_off() -> None:
    method = build(TimestepQuantizer, {"split_skips": False})
    placed = find_quantized(method.apply(unet(), Clock(STEPS), {}))
    assert all(len(layer.groups) == 1 for layer in placed.layers.values())


def test_one_grid_per_channel() -> None:
    model = TinyModel()
    method, artifact = calibrated(model, activations="channel", search="max")
    channels = model.load().conv_in.in_channels
    assert artifact["conv_in.input.scale"].shape == (STEPS, channels)
    clock = Clock(STEPS)
    found = first_prediction(method.apply(model.load(), clock, artifact), model, clock)
    wanted = first_prediction(model.load(), model, clock)
    assert (found - wanted).norm() / wanted.norm() < 0.1


class Plain(nn.Module):
    """No U-Net: convolutions over a sequence, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 6, 3, padding=1)
        self.last = nn.Linear(8, 8)
        self.out = nn.Conv1d(6, 3, 1, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.out(self.last(torch.relu(self.first(sample.flatten(2)))))[..., :8]


def test_any_network_of_layers_can_be_quantized() -> None:
    torch.manual_seed(0)
    network, clock = Plain().eval().requires_grad_(False), Clock(2)
    sample = random(2, 3, 8)
    wanted = network(sample, torch.zeros(2))
    placed = build(TimestepQuantizer).apply(network, clock, {})
    found = find_quantized(placed)
    for layer in found.layers.values():
        layer.quantize_weights(layer.find_weight_grids(GridSearch()))
    found.switch.mode = "observe"
    with torch.no_grad():
        placed(sample, torch.zeros(2))
        for one in found.quantizers().values():
            one.set_grids(*one.found())
        found.switch.mode = "on"
        error = (placed(sample, torch.zeros(2)) - wanted).norm() / wanted.norm()
    assert 0 < error < 0.05


def test_unfit_networks_are_refused() -> None:
    method, clock = build(TimestepQuantizer), Clock(2)
    with pytest.raises(Incompatible, match="Tanh has no Conv2d, Conv1d or Linear"):
        method.apply(nn.Tanh(), clock, {})
    with pytest.raises(Incompatible, match="MultiheadAttention cannot be quantized"):
        method.apply(nn.ModuleList([nn.Linear(2, 2), nn.MultiheadAttention(4, 2)]), clock, {})
    with pytest.raises(Incompatible, match="quantized already"):
        method.apply(method.apply(unet(), clock, {}), clock, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 99.9}, "percentile has no effect on the search mse"),
        ({"search": "max", "percentile": 99.0}, "percentile has no effect on the search max"),
        ({"search": "max", "search_samples": 5}, "search_samples .* take search mse or percentile"),
        (
            {"search": "percentile", "official_ranges": True},
            "official_ranges .* take search mse or max",
        ),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TimestepQuantizer, options)


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "softmax_bits", "edge_bits"])
@pytest.mark.parametrize("bits", [1, 0, 9, 15, 17, -8])
def test_bits_out_of_range_are_refused(name: str, bits: int) -> None:
    with pytest.raises(
        ConfigError, match=f"{name}: wanted 2 to 8 bits, or 16 to debug, got {bits}"
    ):
        build(TimestepQuantizer, {name: bits})


def test_bytes_at_the_bits_by_hand() -> None:
    clock, switch = Clock(10), Switch()
    layer = nn.Conv2d(3, 5, 3)
    inputs = [ActivationQuantizer(clock, switch, GridSearch(), 8)]
    quantized = QuantizedLayer(layer, inputs, 4, None)
    codes, bias, grids = 5 * 3 * 9 // 2 + 1, 4 * 5, (5 + 10) * (4 + 1)
    assert quantized.stored_bytes == codes + bias + grids
    assert quantized.bits_per_mac == 32


def test_large_attention_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clock = TinyModel(), Clock(STEPS)
    method = build(TimestepQuantizer)
    artifact = method.calibrate(Bench(model.load(), clock, model, ddim(steps=STEPS), 1, 4))
    network = method.apply(model.load(), clock, artifact)
    whole, rows = first_prediction(network, model, clock), list[int]()
    mix = QuantizedAttention._mix_rows

    def noted(self: Any, attn: Any, q: Tensor, *rest: Any) -> Tensor:
        rows.append(len(q))
        return mix(self, attn, q, *rest)

    monkeypatch.setattr(QuantizedAttention, "_mix_rows", noted)
    monkeypatch.setattr(quantized_layers, "TOGETHER", 1)
    assert torch.equal(first_prediction(network, model, clock), whole)
    assert set(rows) == {1}
    # what is seen decides the grids: all of a batch has to be seen at once
    rows.clear()
    again = method.calibrate(Bench(model.load(), clock, model, ddim(steps=STEPS), 1, 4))
    assert 8 in rows  # both halves of guidance
    assert all(torch.equal(again[name], artifact[name]) for name in artifact)


def test_the_batch_of_calibration_is_an_option() -> None:
    assert "batch_size" not in CalibrationSpec().identity()  # what all had before it was one
    assert CalibrationSpec(batch_size=4).identity()["batch_size"] == 4
    model, clock, sizes = TinyModel(), Clock(STEPS), list[int]()
    network = model.load()
    network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    Bench(network, clock, model, ddim(steps=STEPS), 1, 5, batch_size=2).run([])
    assert set(sizes) == {4, 2}  # both halves of guidance


def test_the_same_grids_serve_a_cached_network() -> None:
    model, clock = TinyModel(), Clock(STEPS, [0, 2])
    method = build(TimestepQuantizer)
    cached = CachedUNet(model.load(), 2, clock)
    artifact = method.calibrate(Bench(cached, clock, model, ddim(steps=STEPS), 1, 4))
    deep = next(name for name in artifact if name.startswith("mid_block") and "input.scale" in name)
    # never run at a cached step, unless a callback asks for it: then as at the last full one
    for step in range(STEPS):
        last = max(full for full in clock.full_steps if full <= step)
        assert torch.equal(artifact[deep][step], artifact[deep][last])
    assert not torch.equal(artifact[deep][2], artifact[deep][0])
    applied = method.apply(cached, clock, artifact)
    assert applied is cached
    assert first_prediction(applied, model, clock).isfinite().all()


# A rounding may flip between batch sizes, where kernels sum in another order, and shifts what
# comes after it by up to a level: 8 bits of the tiny network's ranges are a few per cent.
FLIPS = 0.2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_bits": 4, "search": "max"},
        {"weight_bits": 2, "activation_bits": 3, "search": "percentile", "split_skips": False},
        {"activations": "channel", "official_ranges": True, "search": "max"},
    ],
)
def test_contract(options: dict[str, Any]) -> None:
    # in float64, where another batch does not make a level more of a rounding
    check_efficiency_method(TimestepQuantizer, options, model=TinyModel(TinyOptions(double=True)))


def test_contract_with_text() -> None:
    class Text(TinyModel):
        def condition(self, images: Any) -> Condition:
            text = torch.stack([random(3, 12, seed=index) for index in images])
            return Condition(
                {"encoder_hidden_states": text}, {"encoder_hidden_states": 0 * text}, 2
            )

    model = Text(network=conditional_unet())
    assert model.schedule is not SCHEDULE
    check_efficiency_method(TimestepQuantizer, model=model, tolerance=FLIPS)
