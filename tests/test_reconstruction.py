"""Reconstruction: learned rounding, what it is learned from, and that nothing else changes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
import torch
from helpers import Recorder, Spy, build, conditional_unet, ddim, run, unet
from safetensors.torch import load, save
from torch import Tensor, nn

from iec_eval.calibration import Bench, Draft
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser
from iec_eval.efficiency import reconstruction
from iec_eval.efficiency.deepcache import CachedUNet, DeepCache, find_cache
from iec_eval.efficiency.error_correction import CacheCorrection, QuantizationCorrection
from iec_eval.efficiency.quantized_layers import (
    ActivationQuantizer,
    GridSearch,
    QuantizedLayer,
    Switch,
)
from iec_eval.efficiency.quantized_network import find_quantized
from iec_eval.efficiency.quantizer import Grid
from iec_eval.efficiency.reconstruction import RATES, Reconstruction, ReconstructionOptions, take
from iec_eval.efficiency.reconstruction_data import (
    Arguments,
    BlockData,
    Items,
    gather_items,
)
from iec_eval.efficiency.soft_rounding import SoftRounding, rectified_sigmoid
from iec_eval.efficiency.timestep_quantizer import TimestepQuantizer
from iec_eval.efficiency.unet_walk import core_of
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Noise
from iec_eval.progress import Progress
from iec_eval.testing import TinyModel, check_efficiency_method
from iec_eval.testing.efficiency import ToyCacher
from iec_eval.testing.tiny import TinyOptions

STEPS = 4
FULL = [0, 2]
QUICK = {"iterations": 3, "items": 16, "batch_size": 4}
DOUBLE = TinyOptions(double=True)
Tensors = dict[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- networks to reconstruct ------------------------------------------------------------------


class Plain(nn.Module):
    """No U-Net, so that it is quick: three layers, the last without bias."""

    config: Mapping[str, Any] = {"sample_size": 6, "in_channels": 3}

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 6, 3, padding=1)
            self.middle = nn.Linear(6, 6)
            self.last = nn.Conv2d(6, 3, 3, padding=1, bias=False)
        self.requires_grad_(False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(sample) + timestep.view(-1, 1, 1, 1) / 1000)
        return self.last(torch.relu(self.middle(hidden)))


class TextModel(TinyModel):
    """Guided by text, in float64."""

    def __init__(self) -> None:
        network = conditional_unet()
        super().__init__(DOUBLE, network=network)
        network.time_embedding.register_forward_pre_hook(lambda _, x: (x[0].double(), *x[1:]))

    def condition(self, images: Any) -> Condition:
        text = torch.stack([random(3, 12, seed=index) for index in images]).double()
        return Condition({"encoder_hidden_states": text}, {"encoder_hidden_states": 0 * text}, 2)


def small_unet(**changes: Any) -> Any:
    """One level, no attention."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return unet(block_out_channels=(8,), add_attention=False, **blocks, **changes)


@cache
def model(kind: str) -> TinyModel:
    """By name; ``classes`` and ``text`` are guided, of batches that hold both halves."""
    if kind == "plain":
        return TinyModel(network=Plain())
    if kind in ("attention", "small"):
        return TinyModel(network=unet() if kind == "attention" else small_unet())
    return TextModel() if kind == "text" else TinyModel(DOUBLE)


def quantized(
    kind: str = "plain",
    *,
    cut: int | None = None,
    images: int = 4,
    seed: int = 1,
    progress: Progress | None = None,
    draft: Draft | None = None,
    **options: Any,
) -> Bench:
    """A bench whose network has four-bit weights, and with ``cut`` a corrected cache."""
    clock = Clock(STEPS, FULL if cut else None)
    network = model(kind).load()
    if cut:
        network = CachedUNet(network, cut, clock)
        lines = some_lines(network.channels)
        build(CacheCorrection).apply(network, clock, lines)
    method = build(TimestepQuantizer, {"weight_bits": 4, **options})
    grids = {name: x.clone() for name, x in found_grids(kind, cut, **options).items()}
    network = method.apply(network, clock, grids).eval()
    more = {"progress": progress or Progress("steps", visible=False), "draft": draft or Draft()}
    return Bench(network, clock, model(kind), ddim(steps=STEPS), seed, images, **more)


@cache
def found_grids(kind: str, cut: int | None, **options: Any) -> Tensors:
    clock = Clock(STEPS, FULL if cut else None)
    network = model(kind).load()
    network = CachedUNet(network, cut, clock) if cut else network
    bench = Bench(network, clock, model(kind), ddim(steps=STEPS), 1, 4)
    return build(TimestepQuantizer, {"weight_bits": 4, **options}).calibrate(bench)


def some_lines(channels: int) -> Tensors:
    """A correction of the cached feature that is another one at every cached step."""
    a, b = 1 + 0.3 * random(STEPS, channels, seed=8), 0.3 * random(STEPS, channels, seed=9)
    a[FULL], b[FULL] = 1.0, 0.0
    return {"a": a, "b": b}


def learn(bench: Bench, **options: Any) -> Tensors:
    made: Tensors = build(Reconstruction, {**QUICK, **options}).calibrate(bench)
    return made


def losses(artifact: Tensors) -> dict[str, list[float]]:
    """Before, with soft rounding and after, of each block in the order they were learned."""
    found = {k: v.tolist() for k, v in artifact.items() if k.endswith(".losses")}
    return {name.removesuffix(".losses"): value for name, value in found.items()}


def kept(artifact: Tensors) -> list[str]:
    """Blocks whose learned rounding was not undone."""
    return [name for name, (before, _, after) in losses(artifact).items() if after <= before]


def within(name: str, block: str) -> bool:
    return f"{name}.".startswith(f"{block}.")


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [k for k in wanted if not torch.equal(found[k], wanted[k])] == []


# --- rounding ---------------------------------------------------------------------------------


def soft_layer(bits: int, search: Any = "max", **options: Any) -> tuple[QuantizedLayer, Any]:
    """A convolution over [h, skip] and its learned rounding, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = nn.Conv2d(5, 4, 3).double().requires_grad_(False)
    weight = inner.weight.clone()
    clock, switch = Clock(1), Switch("on")
    inputs = [ActivationQuantizer(clock, switch, GridSearch(), 8, like=weight) for _ in range(2)]
    layer = QuantizedLayer(inner, inputs, bits, 2)
    layer.quantize_weights(layer.find_weight_grids(GridSearch(search)))
    options = {"train_weights": False, **options}
    return layer, SoftRounding(layer, weight, inner.bias, **options)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_soft_weights_are_the_formula_by_hand(bits: int) -> None:
    layer, soft = soft_layer(bits, "mse")
    assert layer.grid is not None
    soft.rounding.data = 3 * random(4, 5, 3, 3, seed=2).double()
    found = soft.tensors()["weight"]
    for o in range(4):
        for i in range(5):
            d, z = (float(table[int(i >= 2), o]) for table in layer.grid)
            for w, v, got in zip(
                soft.weight[o, i].flatten().tolist(),
                soft.rounding[o, i].flatten().tolist(),
                found[o, i].flatten().tolist(),
                strict=True,
            ):
                h = min(max(1.2 / (1 + math.exp(-v)) - 0.1, 0), 1)
                code = min(max(math.floor(w / d) + h + z, 0), 2**bits - 1)
                assert got == pytest.approx(d * (code - z), abs=1e-10)


@pytest.mark.parametrize("search", ["max", "mse"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_at_first_the_weights_are_those_of_full_precision_up_to_clipping(
    bits: int, search: str
) -> None:
    layer, soft = soft_layer(bits, search)
    assert layer.grid is not None
    parts = []
    for group, d, z in layer.per_group(layer.grid):
        part, top = soft.weight[:, group], 2**bits - 1
        parts.append(torch.minimum(torch.maximum(part, -z * d), (top - z) * d))
    limited = torch.cat(parts, dim=1)
    torch.testing.assert_close(soft.tensors()["weight"], limited, rtol=0, atol=1e-9)
    assert bits > 2 or search == "max" or (limited - soft.weight).abs().max() > 0.01


@pytest.mark.parametrize("search", ["max", "mse"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_what_learned_nothing_rounds_to_the_nearest(bits: int, search: str) -> None:
    layer, soft = soft_layer(bits, search)
    codes, grid = soft.harden()
    assert torch.equal(codes, layer.codes())
    assert layer.grid is not None
    assert torch.equal(grid.scale, layer.grid.scale)
    assert torch.equal(grid.zero_point, layer.grid.zero_point)


def test_decided_roundings_are_the_hard_weights() -> None:
    layer, soft = soft_layer(4)
    assert layer.grid is not None
    soft.rounding.data = 50 * torch.sign(random(4, 5, 3, 3, seed=3)).double()
    soft.zero_point.data += 0.3
    wanted = soft.tensors()["weight"]
    codes, grid = soft.harden()
    assert torch.equal(grid.zero_point, layer.grid.zero_point)  # whole numbers again
    layer.set_codes(codes, grid)
    torch.testing.assert_close(layer.weight.data, wanted.detach())
    assert float(soft.undecided(2.0).detach()) == 0


def test_zero_points_have_a_gradient_where_weights_are_clipped() -> None:
    layer, soft = soft_layer(3, "mse")
    soft.tensors()["weight"].sum().backward()
    assert layer.grid is not None
    assert soft.zero_point.grad is not None
    wanted = torch.zeros_like(soft.zero_point)
    for row, (group, d, z) in enumerate(layer.per_group(layer.grid)):
        exact = soft.weight[:, group] / d + z
        outside = ((exact < -1e-9) | (exact > 7 + 1e-9)).sum((1, 2, 3))
        wanted[row] = -outside * layer.grid.scale[row]
    assert wanted.any()
    torch.testing.assert_close(soft.zero_point.grad, wanted)


def test_trained_weights_have_the_gradient_of_the_identity() -> None:
    _, soft = soft_layer(8, train_weights=True)
    tensors = soft.tensors()
    (tensors["weight"].sum() + tensors["bias"].sum()).backward()
    assert soft.weight.grad is not None
    # with this range a few weights lie at its ends, where rounding may clip them
    assert float((soft.weight.grad - 1).abs().lt(1e-9).double().mean()) > 0.9
    assert torch.equal(soft.bias.grad, torch.ones(4).double())


# --- the regulariser --------------------------------------------------------------------------


def test_regularizer_by_hand() -> None:
    _, soft = soft_layer(4)
    soft.rounding.data = 2 * random(4, 5, 3, 3, seed=4).double()
    for sharpness in (20.0, 7.0, 2.0):
        wanted = 0.0
        for v in soft.rounding.flatten().tolist():
            h = min(max(1.2 / (1 + math.exp(-v)) - 0.1, 0), 1)
            wanted += 1 - abs(2 * h - 1) ** sharpness
        assert float(soft.undecided(sharpness).detach()) == pytest.approx(wanted)


@pytest.fixture
def sharpnesses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The exponents that the regulariser is asked for."""
    seen: list[float] = []
    original = SoftRounding.undecided

    def spy(self: SoftRounding, sharpness: float) -> Tensor:
        seen.append(sharpness)
        return original(self, sharpness)

    monkeypatch.setattr(SoftRounding, "undecided", spy)
    return seen


def test_the_regularizer_acts_after_a_fifth_and_anneals(sharpnesses: list[float]) -> None:
    learn(quantized(), iterations=10)
    assert sharpnesses == pytest.approx(3 * [20, 17.75, 15.5, 13.25, 11, 8.75, 6.5, 4.25])


def test_official_does_not_regularize(sharpnesses: list[float]) -> None:
    learn(quantized(), iterations=10, regularizer="official")
    assert sharpnesses == []


def test_the_regularizer_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The released code's rounding stays soft: hardening it changes much."""
    shares: list[float] = []
    harden = SoftRounding.harden

    def spy(self: SoftRounding) -> Any:
        h = rectified_sigmoid(self.rounding.detach())
        shares.append(float(((h < 0.02) | (h > 0.98)).double().mean()))
        return harden(self)

    monkeypatch.setattr(SoftRounding, "harden", spy)
    annealing: Any = {"regularizer": "annealed", "regularizer_weight": 1.0}
    for regularizer in (annealing, {"regularizer": "official"}):
        learn(quantized(), iterations=100, rounding_rate=0.1, **regularizer)
    annealed, official = shares[:3], shares[3:]
    assert min(annealed) > 0.5
    assert max(official) < 0.35


# --- options ----------------------------------------------------------------------------------

TABLE = {
    "cifar10": (1e-4, 1e-4, 1e-4, 1e-6),
    "cifar10-cachequant": (5e-1, 1e-4, 1e-1, 1e-6),
    "church": (5e-3, 1e-6, 1e-1, 1e-3),
    "bedroom": (5e-3, 1e-6, 1e-1, 1e-3),
    "bedroom-cachequant": (5e-7, 1e-7, 0.0, 1e-4),
    "imagenet": (5e-3, 1e-4, 1e-1, 1e-2),
    "stable-diffusion": (1e-3, 1e-4, 0.0, 1e-3),
}


def rates(options: ReconstructionOptions) -> tuple[float, float, float, float]:
    return options.rounding_rate, options.scale_rate, options.zero_rate, options.weight_rate


def test_defaults() -> None:
    options = ReconstructionOptions()
    assert rates(options) == (1e-2, 1e-4, 0, 0)
    assert (options.iterations, options.batch_size, options.items) == (3000, 32, 1024)
    assert (options.regularizer, options.granularity) == ("annealed", "block")
    assert options.quantized_inputs == 1


@pytest.mark.parametrize("preset", TABLE)
def test_presets_fill_in_rates_and_given_ones_win(preset: str) -> None:
    assert rates(build(Reconstruction, {"preset": preset}).options) == TABLE[preset]
    given = {"preset": preset, "zero_rate": 0.25, "rounding_rate": 0.125}
    found = rates(build(Reconstruction, given).options)
    assert found == (0.125, TABLE[preset][1], 0.25, TABLE[preset][3])
    again = build(Reconstruction, build(Reconstruction, given).options.model_dump(mode="json"))
    assert rates(again.options) == found


def test_every_preset_may_be_named() -> None:
    kinds = get_args(ReconstructionOptions.model_fields["preset"].annotation)
    named = {name for kind in kinds for name in get_args(kind)}
    assert named == set(RATES) == set(TABLE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "cifar"}, "preset: .*'cifar10'.*got 'cifar'"),
        ({"preset": ["cifar10"]}, r"preset: .*got \['cifar10'\]"),
        ({"granularity": "network"}, "granularity: .*'block' or 'layer'.*got 'network'"),
        ({"regularizer": "none"}, "regularizer: .*'annealed' or 'official'.*got 'none'"),
        ({"iterations": 0}, "iterations: .*greater than or equal to 1, got 0"),
        ({"batch_size": 0}, "batch_size: .*greater than or equal to 1, got 0"),
        ({"items": 0}, "items: .*greater than or equal to 1, got 0"),
        ({"images": 0}, "images: .*greater than or equal to 1, got 0"),
        ({"items": 2.5}, "items: .*integer, got 2.5"),
        ({"rounding_rate": -1e-3}, "rounding_rate: .*greater than or equal to 0"),
        ({"scale_rate": "1e-4"}, "scale_rate: .*number, got '1e-4'"),
        ({"zero_rate": -1.0}, "zero_rate: .*greater than or equal to 0"),
        ({"weight_rate": -1.0}, "weight_rate: .*greater than or equal to 0"),
        ({"regularizer_weight": 0}, "regularizer_weight: .*greater than 0, got 0"),
        (
            {"regularizer": "official", "regularizer_weight": 0.1},
            "regularizer_weight has no effect on the regularizer official",
        ),
        ({"quantized_inputs": 1.5}, "quantized_inputs: .*less than or equal to 1, got 1.5"),
        ({"learning_rate": 0.1}, "unknown key 'learning_rate'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Reconstruction, options)


# --- where it fits ----------------------------------------------------------------------------


def test_it_needs_a_quantized_network() -> None:
    method = build(Reconstruction, QUICK)
    with pytest.raises(Incompatible, match="needs a quantized network: put a quantizer before it"):
        method.apply(unet(), Clock(STEPS), {})
    bench = Bench(model("plain").load(), Clock(STEPS), model("plain"), ddim(steps=STEPS), 1, 4)
    with pytest.raises(Incompatible, match="needs a quantized network: put a quantizer before it"):
        method.calibrate(bench)


def test_it_does_not_follow_the_correction_of_quantized_layers() -> None:
    bench = quantized("classes", cut=2)
    build(QuantizationCorrection, {}).apply(bench.network, bench.clock, {})
    for call in (
        lambda: learn(bench),
        lambda: build(Reconstruction).apply(bench.network, bench.clock, {}),
    ):
        with pytest.raises(Incompatible, match=r"up_blocks.1.resnets.0.conv1 was fitted to; put"):
            call()


@pytest.mark.parametrize("cut", [None, 2])
def test_skeleton(cut: int | None) -> None:
    """Structure and costs without weights: an empty artifact, on the meta device."""
    clock, network = Clock(STEPS, FULL), model("classes").skeleton()
    network = CachedUNet(network, cut, clock) if cut else network
    quantizer = build(TimestepQuantizer, {"weight_bits": 4})
    placed = quantizer.apply(network, clock, {})
    assert build(Reconstruction).apply(placed, clock, {}) is placed
    denoiser = Denoiser(placed, model("classes").condition([0]).to(torch.device("meta")), clock)
    assert denoiser(torch.empty(1, 3, 8, 8, device="meta"), 5.0).shape == (1, 3, 8, 8)


BLOCKS = [
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "conv_in",
    "down_blocks.0.resnets.0",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0",
    "down_blocks.1.attentions.0",
    "mid_block.resnets.0",
    "mid_block.attentions.0",
    "mid_block.resnets.1",
    "up_blocks.0.resnets.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.resnets.1",
    "up_blocks.0.attentions.1",
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.resnets.0",
    "up_blocks.1.resnets.1",
    "conv_out",
]


def test_blocks_are_learned_in_the_order_they_run() -> None:
    artifact = learn(quantized("attention"), iterations=1)
    assert list(losses(artifact)) == BLOCKS
    placed = find_quantized(quantized("attention").network)
    assert {f"{name}.codes" for name in placed.layers} <= artifact.keys()
    assert {f"{name}.scale" for name in placed.quantizers()} <= artifact.keys()


def test_text_blocks_are_transformers_with_their_resnets() -> None:
    artifact = learn(quantized("text"), iterations=1)
    found = [name for name in losses(artifact) if "attn" in name or "attentions" in name]
    assert found == [
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    ]


def test_single_layers() -> None:
    bench = quantized("attention")
    layers = set(find_quantized(bench.network).layers)
    artifact = learn(bench, iterations=1, granularity="layer")
    assert set(losses(artifact)) == layers
    first = [name for name in losses(artifact) if name.startswith("down_blocks.1.attentions.0")]
    assert [name.rsplit(".attentions.0.")[1] for name in first] == [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    ]


# --- items ------------------------------------------------------------------------------------


def trajectories(bench: Bench, cut: int, images: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of full precision, each step's network input and what enters u_cut without its skip."""
    network = bench.model.load()
    channels = CachedUNet(network, cut, Clock(1)).channels
    consumer = [r for block in network.up_blocks for r in block.resnets][-cut]
    entered: list[Tensor] = []
    consumer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0][:, :channels]))
    spy = Spy(network, Clock(STEPS))
    noise = Noise(bench.seed, range(images), bench.model.shape, calibration=True)
    condition = bench.model.condition(range(images))
    run(spy, bench.sampler, noise, clock=spy.clock, condition=condition)
    return spy.shown, [feature.clone() for feature in entered]


def row_of(sample: Tensor, batch: Tensor, labels: Tensor, label: Tensor) -> int:
    """Where in the batch a sample with that condition is."""
    same = (batch == sample).flatten(1).all(1) & (labels == label)
    assert int(same.sum()) == 1
    return int(same.nonzero())


def labels_of(bench: Bench, images: int) -> Tensor:
    condition = bench.model.condition(range(images))
    assert condition.unconditional is not None
    return torch.cat([condition.unconditional["class_labels"], condition.inputs["class_labels"]])


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_features_are_those_of_the_same_trajectory_at_its_latest_full_step(cut: int) -> None:
    bench = quantized("classes", cut=cut, images=5)
    items = gather_items(bench, bench.model.load(), cut, 30)
    shown, entered = trajectories(bench, cut, 5)
    labels, rows = labels_of(bench, 5), set[int]()
    assert len(items.steps) == 30
    assert items.features is not None
    assert len(items.features) == 30 - items.first_cached
    for index, step in enumerate(items.steps.tolist()):
        sample, time = (x[index] for x in items.arguments.positional)
        assert float(time) == bench.sampler.timesteps[step]
        row = row_of(sample, shown[step], labels, items.arguments.named["class_labels"][index])
        rows.add(row)
        assert (step in FULL) == (index < items.first_cached)
        if step not in FULL:
            latest = max(full for full in FULL if full <= step)
            feature = items.features[index - items.first_cached]
            torch.testing.assert_close(feature, entered[latest][row])
    assert rows == set(range(10))  # every image, with its condition and without


def test_items_are_of_every_step_and_none_twice() -> None:
    bench = quantized("classes", cut=2, images=5)
    items = gather_items(bench, bench.model.load(), 2, 30)
    counts = torch.bincount(items.steps, minlength=STEPS)
    assert counts.sum() == 30
    assert 7 <= counts.min() <= counts.max() <= 8
    labels = items.arguments.named["class_labels"]
    pairs = [x.flatten().tolist() for x in items.arguments.positional[0]]
    keys = {(*pair, int(label)) for pair, label in zip(pairs, labels, strict=True)}
    assert len(keys) == 30
    assert not any(x.is_inference() for x in (items.steps, labels, items.features))


@pytest.mark.parametrize(("wanted", "given"), [(100, 100), (260, 260), (500, 260)])
def test_as_many_items_as_wanted_also_of_unequal_batches(wanted: int, given: int) -> None:
    """65 images make a batch of 64 and one of a single image."""
    bench = quantized(images=65)
    items = gather_items(bench, bench.model.load(), None, wanted)
    assert len(items.steps) == items.first_cached == given
    assert items.features is None
    counts = torch.bincount(items.steps, minlength=STEPS)
    assert counts.max() - counts.min() <= 2


def test_items_are_drawn_anew_for_another_seed_alone() -> None:
    first, again, other = (
        gather_items(quantized(seed=seed), model("plain").load(), None, 6) for seed in (1, 1, 2)
    )
    assert torch.equal(first.arguments.positional[0], again.arguments.positional[0])
    assert not torch.equal(first.arguments.positional[0], other.arguments.positional[0])


def test_only_so_many_images_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    condition = TinyModel.condition
    monkeypatch.setattr(
        TinyModel, "condition", lambda self, x: asked.append(max(x)) or condition(self, x)
    )
    learn(quantized(images=9), images=6, iterations=1)
    assert max(asked) == 5


def test_a_cache_of_another_kind_leaves_the_full_steps() -> None:
    bench = quantized()
    bench.clock.full_steps = frozenset(ToyCacher.full_steps(None, STEPS, {}))  # type: ignore[arg-type]
    items = gather_items(bench, bench.model.load(), None, 8)
    assert len(items.steps) == items.first_cached == 8
    assert set(items.steps.tolist()) == {0, 2}


def test_too_few_items_to_have_one_of_a_full_step() -> None:
    bench, refused = quantized("classes", cut=2), 0
    for seed in range(6):
        other = replace(bench, seed=seed)
        if gather_items(other, bench.model.load(), 2, 1).first_cached == 0:
            refused += 1
            with pytest.raises(ConfigError, match="none of the 1 items is of a full step"):
                learn(other, items=1)
    assert refused > 0


# --- what a block is given and should give ----------------------------------------------------


def one(arguments: Arguments, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a single row."""
    row = arguments.rows(slice(index, index + 1), torch.device("cpu"))
    return row.positional, dict(row.named)


@torch.no_grad()
def watched(network: nn.Module, block: nn.Module, arguments: Any) -> tuple[Any, Any] | None:
    """What the block is given and gives in an evaluation of the network; None if not called."""
    seen: list[tuple[Any, Any]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        seen.append(((args, kwargs), tensor))

    handle = block.register_forward_hook(note, with_kwargs=True)
    network(*arguments[0], **arguments[1])
    handle.remove()
    return seen[0] if seen else None


def given_by_hand(bench: Bench, items: Items, name: str) -> Iterator[tuple[Any, Any]]:
    """Input in the quantized network and output in the other, item by item at its own step."""
    teacher, clock, cached = bench.model.load(), bench.clock, find_cache(bench.network)
    block = core_of(bench.network).get_submodule(name)
    for index, step in enumerate(items.steps.tolist()):
        clock.step, clock.full = step, clock.is_full(step)
        if cached is not None and not clock.full:
            assert items.features is not None
            cached.feature = items.features[index - items.first_cached][None]
        arguments = one(items.arguments, index)
        inside = watched(bench.network, block, arguments)
        if inside is not None:
            wanted = watched(teacher, teacher.get_submodule(name), arguments)
            assert wanted is not None
            yield inside[0], (step, wanted[1])


def block_data(bench: Bench, items: Items, name: str, share: float = 1.0) -> BlockData:
    teacher = bench.model.load()
    block = core_of(bench.network).get_submodule(name)
    return items.of_block(bench, teacher, block, teacher.get_submodule(name), share)


DEEP = ["mid_block.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.0"]
SHALLOW = ["conv_in", "time_embedding.linear_2", "up_blocks.1.resnets.0", "conv_out"]


@pytest.mark.parametrize(
    ("kind", "cut", "blocks"),
    [
        ("classes", None, [*DEEP, *SHALLOW]),
        ("classes", 2, [*DEEP, *SHALLOW]),
        ("text", 2, [*DEEP, *SHALLOW, "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]),
        ("text", 1, ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]),
    ],
)
def test_rows_at_mixed_steps_are_as_each_row_at_its_own_step(
    kind: str, cut: int | None, blocks: list[str]
) -> None:
    bench = quantized(kind, cut=cut)
    items = gather_items(bench, bench.model.load(), cut, 8)
    assert 0 < items.first_cached < 8 or cut is None
    for name in blocks:
        data = block_data(bench, items, name)
        rows = list(given_by_hand(bench, items, name))
        assert len(data) == len(rows)
        for index, ((args, kwargs), (step, output)) in enumerate(rows):
            positional, named = one(data.arguments, index)
            torch.testing.assert_close(positional, args, rtol=1e-9, atol=1e-9)
            tensors = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
            for key, value in tensors.items():
                torch.testing.assert_close(named[key], value, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(data.target[index][None], output, rtol=1e-9, atol=1e-9)
            assert data.steps[index] == step


def test_deep_blocks_learn_from_full_steps_alone() -> None:
    bench = quantized("classes", cut=2)
    items = gather_items(bench, bench.model.load(), 2, 16)
    for name in DEEP:
        assert set(block_data(bench, items, name).steps.tolist()) == set(FULL)
    for name in SHALLOW:
        assert set(block_data(bench, items, name).steps.tolist()) == set(range(STEPS))


def test_the_block_itself_runs_at_the_rows_steps() -> None:
    """Of a batch in any order, its quantizers take the grids of each row's step."""
    bench = quantized("text", cut=2)
    items = gather_items(bench, bench.model.load(), 2, 12)
    for name in ("up_blocks.1.attentions.0", "up_blocks.1.resnets.1", "conv_out"):
        block = core_of(bench.network).get_submodule(name)
        data, apart = block_data(bench, items, name), []
        rows = torch.tensor([11, 0, 5, 5, 9])
        batch = data.batch(rows, torch.device("cpu"), torch.Generator())
        bench.clock.steps = batch.steps
        with torch.no_grad():
            found = batch.run(block)
        bench.clock.steps = None
        for row in rows.tolist():
            bench.clock.step = int(data.steps[row])
            args, kwargs = one(data.arguments, row)
            with torch.no_grad():
                output = block(*args, **kwargs)
            apart.append(output if isinstance(output, Tensor) else output[0])
        torch.testing.assert_close(found, torch.cat(apart), rtol=1e-9, atol=1e-9)
        assert torch.equal(batch.target, data.target[rows])


def test_loss_is_the_mean_over_all_rows() -> None:
    bench = quantized(images=64)
    items = gather_items(bench, bench.model.load(), None, 70)  # more than run together
    data = block_data(bench, items, "first")
    total = 0.0
    for index, step in enumerate(data.steps.tolist()):
        bench.clock.step = step
        args, _ = one(data.arguments, index)
        with torch.no_grad():
            output = bench.network.first(*args)  # type: ignore[operator]
        total += float((output - data.target[index]).square().sum(1).mean())
    assert data.loss(bench, bench.network.first) == pytest.approx(total / 70, rel=1e-4)  # type: ignore[arg-type]


def test_some_rows_are_given_without_the_errors_of_earlier_blocks() -> None:
    bench = quantized("text", cut=2)
    items = gather_items(bench, bench.model.load(), 2, 12)
    name, rows = "up_blocks.1.attentions.0", torch.arange(12).repeat(20)
    exact = {}
    teacher = bench.model.load()
    for index in range(12):
        seen = watched(teacher, teacher.get_submodule(name), one(items.arguments, index))
        assert seen is not None
        exact[index] = seen[0][0][0]
    for share in (0.0, 0.5, 0.9):
        data = block_data(bench, items, name, share)
        batch = data.batch(rows, torch.device("cpu"), torch.Generator().manual_seed(0))
        (hidden,), given = batch.arguments.positional, 0
        for row, found in zip(rows.tolist(), hidden, strict=True):
            quantized_input = data.arguments.positional[0][row]
            if torch.equal(found, quantized_input):
                given += 1
            else:
                torch.testing.assert_close(found[None], exact[row], rtol=1e-9, atol=1e-9)
        assert given / 240 == pytest.approx(share, abs=0.1)


def test_inputs_have_the_errors_of_the_learned_blocks_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, BlockData] = {}
    of_block = Items.of_block

    def spy(self: Items, bench: Bench, teacher: Any, student: Any, *rest: Any) -> BlockData:
        names = {module: name for name, module in core_of(bench.network).named_modules()}
        seen[names[student]] = made = of_block(self, bench, teacher, student, *rest)
        return made

    monkeypatch.setattr(Items, "of_block", spy)
    bench = quantized("attention", cut=2)
    artifact = learn(bench, rounding_rate=0.05)
    monkeypatch.undo()
    items = gather_items(bench, bench.model.load(), 2, QUICK["items"])
    plain = block_data(bench, items, "conv_out").arguments.positional[0]
    done: Tensors = {}
    for name in losses(artifact):
        take(find_quantized(core_of(bench.network)), done)
        found = block_data(bench, items, name)
        assert torch.equal(found.arguments.positional[0], seen[name].arguments.positional[0])
        assert torch.equal(found.target, seen[name].target)
        done |= {k: v for k, v in artifact.items() if within(k, name)}
    assert not torch.allclose(plain, seen["conv_out"].arguments.positional[0], atol=1e-3)


def test_the_share_of_such_rows_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    of_block = Items.of_block

    def spy(self: Items, *rest: Any) -> BlockData:
        shares.append(rest[-1])
        return of_block(self, *rest)

    monkeypatch.setattr(Items, "of_block", spy)
    learn(quantized(), iterations=1, quantized_inputs=0.25)
    assert shares == [0.25] * 3


# --- learning ---------------------------------------------------------------------------------


def applied(artifact: Tensors, kind: str = "plain", **options: Any) -> Bench:
    """A new bench whose network has what was learned."""
    bench = quantized(kind, **options)
    method = build(Reconstruction)
    assert method.apply(bench.network, bench.clock, artifact) is bench.network
    return bench


def contents(network: nn.Module) -> Tensors:
    """Every parameter and buffer."""
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


@torch.no_grad()
def error(bench: Bench, items: Items) -> float:
    """Of the network's outputs for the items, relative to those of full precision."""
    teacher, clock = bench.model.load(), bench.clock
    args = items.arguments.positional
    clock.steps = items.steps
    found, wanted = bench.network(*args).sample, teacher(*args).sample
    clock.steps = None
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bits", "options"),
    [
        ("attention", 4, {"iterations": 60, "rounding_rate": 0.05}),
        ("small", 3, {"iterations": 40, "rounding_rate": 0.1, "granularity": "layer"}),
    ],
)
def test_the_whole_network_comes_closer_to_full_precision(
    kind: str, bits: int, options: dict[str, Any]
) -> None:
    bench = quantized(kind, images=8, weight_bits=bits)
    artifact = learn(bench, items=32, batch_size=8, **options)
    items = gather_items(bench, bench.model.load(), None, 32)
    after = error(applied(artifact, kind, weight_bits=bits), items)
    assert after < 0.9 * error(bench, items)


@pytest.mark.parametrize("rate", [0.05, 20.0])
def test_no_block_ends_worse_than_before(rate: float) -> None:
    """With a rate beyond reason most are: these are undone."""
    bench = quantized("attention", cut=2)
    artifact = learn(bench, rounding_rate=rate, regularizer="official")
    assert (len(kept(artifact)) > 9) == (rate < 1)
    items = gather_items(bench, bench.model.load(), 2, QUICK["items"])
    done: Tensors = {}
    for name, (before, _, after) in losses(artifact).items():
        take(find_quantized(core_of(bench.network)), done)
        data, block = block_data(bench, items, name), core_of(bench.network).get_submodule(name)
        assert data.loss(bench, block) == before
        done |= {k: v for k, v in artifact.items() if within(k, name)}
        take(find_quantized(core_of(bench.network)), done)
        assert data.loss(bench, block) == min(before, after)


def test_what_is_undone_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later blocks are given what they would be if it had never been tried."""
    bench, found = quantized("classes", cut=2), list[Tensors]()
    of_block = Items.of_block

    def spy(self: Items, bench: Bench, *rest: Any) -> BlockData:
        found.append(contents(bench.network))
        return of_block(self, bench, *rest)

    monkeypatch.setattr(Items, "of_block", spy)
    wanted = contents(bench.network)
    artifact = learn(bench, scale_rate=3.0, zero_rate=50.0, weight_rate=3.0)
    assert kept(artifact) == []
    assert len(found) == len(losses(artifact))
    for state in (*found, contents(applied(artifact, "classes", cut=2).network)):
        assert_equal(state, wanted)


def test_what_diverged_is_undone() -> None:
    bench = quantized("attention", cut=2)
    artifact = learn(bench, weight_rate=1e36)
    diverged = [name for name, (_, _, after) in losses(artifact).items() if math.isnan(after)]
    assert diverged
    plain = learn(bench, iterations=1, rounding_rate=0, scale_rate=0)
    tensors = [k for k in plain if not k.endswith(".losses") and within(k, diverged[0])]
    assert all(torch.equal(artifact[key], plain[key]) for key in tensors)
    biases = [key for key in artifact if key.endswith(".bias")]
    assert biases
    assert all(artifact[key].isfinite().all() for key in biases)


def test_without_rates_nothing_is_learned() -> None:
    bench = quantized("classes", cut=2)
    artifact = learn(bench, rounding_rate=0, scale_rate=0)
    assert all(before == after for before, _, after in losses(artifact).values())
    assert_equal(contents(applied(artifact, "classes", cut=2).network), contents(bench.network))


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_codes_of_any_bits(bits: int) -> None:
    artifact = learn(quantized(weight_bits=bits), rounding_rate=0.3)
    placed = find_quantized(applied(artifact, weight_bits=bits).network)
    for name, layer in placed.layers.items():
        codes = artifact[f"{name}.codes"]
        assert codes.dtype == (torch.int32 if bits == 16 else torch.uint8)
        assert 0 <= int(codes.min()) < int(codes.max()) <= 2**bits - 1
        shape = (-1, *[1] * (codes.dim() - 1))
        scale, zero = (artifact[f"{name}.weight_{key}"][0].view(shape) for key in Grid._fields)
        assert torch.equal(layer.weight, (codes.float() - zero) * scale)
    assert kept(artifact) or bits == 16  # there, little is left to learn


def test_one_activation_grid_per_channel() -> None:
    options = {"activations": "channel", "activation_bits": 4}
    bench = quantized("attention", **options)
    artifact = learn(bench, zero_rate=1e-2)
    assert artifact["up_blocks.1.resnets.0.conv1.input.scale"].shape == (STEPS, 16)
    assert artifact["up_blocks.1.resnets.0.conv1.input1.scale"].shape == (STEPS, 8)
    assert artifact["down_blocks.1.attentions.0.to_q.input.zero_point"].shape == (STEPS, 16)
    before = found_grids("attention", None, **options)
    for table in ("scale", "zero_point"):
        names = [k for k in artifact if k.endswith(f"input.{table}")]
        assert sum(not torch.equal(artifact[k], before[k]) for k in names) > 20
    assert len(kept(artifact)) > 9


@pytest.fixture
def rates_used(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, float]]]:
    """For each optimiser step the number of tensors and the learning rate of every group."""
    used: list[list[tuple[int, float]]] = []
    step = torch.optim.Adam.step

    def spy(self: Any, *args: Any) -> Any:
        used.append([(len(group["params"]), group["lr"]) for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    return used


@pytest.mark.parametrize("regularizer", ["annealed", "official"])
def test_rates_fall_along_a_cosine_but_for_the_annealed_rounding(
    rates_used: list[list[tuple[int, float]]], regularizer: str
) -> None:
    bench = quantized()
    rates = {"rounding_rate": 0.02, "zero_rate": 0.3, "scale_rate": 0.05}
    learn(bench, iterations=4, regularizer=regularizer, **rates)
    scales = [layer.quantizers[0].scale for layer in find_quantized(bench.network).layers.values()]
    assert len(rates_used) == 3 * 4
    for number, groups in enumerate(rates_used):
        fall = (1 + math.cos(math.pi * (number % 4) / 4)) / 2
        rounding = 1.0 if regularizer == "annealed" else fall
        mean = float(scales[number // 4].mean())
        assert [count for count, _ in groups] == [1, 2, 1]
        assert [rate for _, rate in groups] == pytest.approx(
            [0.02 * rounding, 0.3 * fall, 0.05 * mean * fall]
        )


def test_the_regulariser_leaves_little_to_hardening() -> None:
    """What is learned is decided while it is learned; without it hardening loses much of it."""
    options: Any = {"iterations": 300, "rounding_rate": 0.05}
    decided = losses(learn(quantized(), **options, regularizer_weight=0.3))
    assert all(hard < 1.15 * soft for _, soft, hard in decided.values())
    left = losses(learn(quantized(), **options, regularizer="official"))
    assert any(hard > 1.5 * soft for _, soft, hard in left.values())


def test_nothing_is_learned_at_a_rate_of_zero(rates_used: list[list[tuple[int, float]]]) -> None:
    learn(quantized(), iterations=1, rounding_rate=0.02, scale_rate=0, zero_rate=0)
    assert rates_used == [[(1, 0.02)]] * 3


@pytest.mark.parametrize(("scale_rate", "zero_rate"), [(1e-3, 0.0), (0.0, 1e-2), (1e-3, 1e-2)])
def test_scales_and_zero_points_of_activations_are_learned(
    scale_rate: float, zero_rate: float
) -> None:
    """Adam's first step is the rate itself, times the mean scale for scales."""
    few = {"activation_bits": 4}
    rest = {"iterations": 1, "rounding_rate": 0, "batch_size": 64, "regularizer": "official"}
    artifact = learn(quantized(**few), scale_rate=scale_rate, zero_rate=zero_rate, **rest)
    before = found_grids("plain", None, **few)
    assert kept(artifact)
    for name in kept(artifact):
        for key, rate in (
            (f"{name}.input.scale", scale_rate * float(before[f"{name}.input.scale"].mean())),
            (f"{name}.input.zero_point", zero_rate),
        ):
            change = (artifact[key] - before[key]).abs()
            # less by what Adam adds to the size of a small gradient
            torch.testing.assert_close(change.max(), torch.tensor(rate), rtol=1e-2, atol=1e-9)


BEHIND = ["up_blocks.1.resnets.0", "up_blocks.1.resnets.1", "conv_out"]


@pytest.mark.parametrize(("cut", "trained"), [(None, []), (1, BEHIND[1:]), (2, BEHIND)])
def test_weights_and_biases_are_trained_behind_the_cache(
    cut: int | None, trained: list[str], rates_used: list[list[tuple[int, float]]]
) -> None:
    bench = quantized("classes", cut=cut)
    artifact = learn(bench, iterations=1, scale_rate=0, weight_rate=1e-3, regularizer="official")
    biases = [key for key in artifact if key.endswith(".bias")]
    assert {name for name in losses(artifact) if any(within(k, name) for k in biases)} == {*trained}
    groups = dict(zip(losses(artifact), rates_used, strict=True))
    for name, used in groups.items():
        layers = [k for k in artifact if k.endswith(".codes") and within(k, name)]
        assert used[1:] == ([(2 * len(layers), 1e-3)] if name in trained else [])
    exact = dict(bench.model.load().named_parameters())
    learned = [key for key in biases if any(within(key, name) for name in kept(artifact))]
    assert bool(learned) == bool(trained)
    for key in learned:
        change = (artifact[key] - exact[key].detach()).abs().max()
        assert float(change) == pytest.approx(1e-3, rel=0.01)
    placed = find_quantized(core_of(applied(artifact, "classes", cut=cut).network)).layers
    for key in biases:
        assert torch.equal(placed[key.removesuffix(".bias")].layer.bias, artifact[key])


def test_layers_without_bias_are_trained_behind_the_cache() -> None:
    bench = quantized("text", cut=2)
    artifact = learn(bench, iterations=1, weight_rate=1e-5)
    place = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    assert f"{place}.to_q.codes" in artifact
    assert f"{place}.to_q.bias" not in artifact
    assert f"{place}.to_out.0.bias" in artifact
    assert applied(artifact, "text", cut=2)


def test_presets_run() -> None:
    for preset in TABLE:
        assert losses(learn(quantized(), preset=preset, iterations=1))


def test_the_largest_seed() -> None:
    assert losses(learn(quantized(seed=2**63 - 1), iterations=1))


# --- what is left behind ----------------------------------------------------------------------


class Stopped(BaseException):
    """Like the interruption of a user."""


class Witness(Progress):
    """Notes what it is told; stops the work at its n-th unit of the n-th stretch."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        super().__init__("steps", visible=False)
        self.totals: list[int] = []
        self.done: list[float] = []
        self._stop = stop

    def start(self, total: int) -> None:
        self.totals.append(total)
        self.done.append(0)

    def advance(self, amount: float) -> None:
        self.done[-1] += amount
        if self._stop == (len(self.done), self.done[-1]):
            raise Stopped


class Memory:
    """Keeps artifacts as their files would be; fails at the n-th attempt to save."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.attempts, self.fails_at = 0, fails_at

    def load(self, key: str) -> Tensors | None:
        return load(self.files[key]) if key in self.files else None

    def save(self, key: str, artifact: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
        self.attempts += 1
        if self.attempts == self.fails_at:
            raise Stopped
        self.files[key] = save(dict(artifact))

    def discard(self, key: str) -> None:
        self.files.pop(key, None)


def test_progress_is_told_of_everything_to_do() -> None:
    witness = Witness()
    artifact = learn(quantized("classes", cut=2, progress=witness), iterations=2)
    assert witness.totals == witness.done == [STEPS, 2 * len(losses(artifact))]


TRAINED = {"iterations": 2, "weight_rate": 1e-4, "zero_rate": 1e-2, "quantized_inputs": 0.5}


@cache
def undisturbed() -> Tensors:
    return learn(quantized("classes", cut=2), **TRAINED)


@pytest.mark.parametrize(
    ("stop", "fails_at", "finished"),
    [
        ((1, 2), None, 0),
        ((2, 1), None, 0),
        ((2, 7), None, 3),
        ((2, 29), None, 14),
        (None, 1, 0),
        (None, 14, 13),
        (None, 15, 14),
    ],
)
def test_a_stopped_calibration_goes_on_after_its_finished_blocks(
    stop: tuple[int, int] | None,
    fails_at: int | None,
    finished: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconstruction, "PATIENCE", 0)  # saves each block, however quick
    memory = Memory(fails_at)
    draft = Draft(memory, "draft")
    with pytest.raises(Stopped):
        learn(quantized("classes", cut=2, progress=Witness(stop), draft=draft), **TRAINED)
    saved = losses(draft.load())
    assert set(saved) == set([*losses(undisturbed())][:finished])
    witness = Witness()
    found = learn(quantized("classes", cut=2, progress=witness, draft=draft), **TRAINED)
    assert witness.totals[1] == witness.done[1] == 2 * (15 - finished)
    assert_equal(found, undisturbed())


def test_saving_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are written each time: after every quick block it would never end."""
    memory, saves = Memory(), list[float]()

    def slow(self: Any, key: str, tensors: Any, about: Any) -> None:
        saves.append(time.perf_counter())
        time.sleep(0.2)

    monkeypatch.setattr(Memory, "save", slow)
    began = time.perf_counter()
    learn(quantized("classes", cut=2, draft=Draft(memory, "draft")), **TRAINED)
    assert 1 <= len(saves) <= 2 + (time.perf_counter() - began) / (20 * 0.2)


def test_a_finished_draft_is_the_artifact() -> None:
    memory, witness = Memory(), Witness()
    draft = Draft(memory, "draft")
    draft.save(undisturbed())
    found = learn(quantized("classes", cut=2, progress=witness, draft=draft), **TRAINED)
    assert_equal(found, undisturbed())
    assert witness.totals[1] == witness.done[1] == 0


def situation(bench: Bench) -> dict[str, Any]:
    """All that calibration could leave behind in the bench."""
    network = bench.network
    layers = find_quantized(core_of(network)).layers
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    cached = find_cache(network)
    return {
        "contents": save(contents(network)),  # bit by bit
        "trained": [k for k, v in network.state_dict(keep_vars=True).items() if v.requires_grad],
        "learned": [name for name, layer in layers.items() if layer.learned is not None],
        "grids": {name: [x.tolist() for x in layer.grid or ()] for name, layer in layers.items()},
        "hooks": sum(len(getattr(m, kind)) for m in network.modules() for kind in hooks),
        "clock": deepcopy(vars(bench.clock)),
        "feature": None if cached is None else cached.feature,
        "training": [name for name, module in network.named_modules() if module.training],
    }


def disturb(bench: Bench, method: str, where: str, patch: pytest.MonkeyPatch) -> None:
    """Let the calibration stop there."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Stopped

    if method == "nothing":
        return
    owner: Any = {"Items": Items, "BlockData": BlockData, "SoftRounding": SoftRounding}[method]
    patch.setattr(owner, where, stop)


@pytest.mark.parametrize(
    ("kind", "cut", "stop", "owner", "where"),
    [
        ("classes", 2, None, "nothing", ""),
        ("plain", None, None, "nothing", ""),
        ("classes", 2, (1, 3), "nothing", ""),
        ("classes", 2, (2, 1), "nothing", ""),
        ("classes", 2, (2, 28), "nothing", ""),
        ("classes", 2, None, "Items", "called_when_cached"),
        ("classes", 2, None, "Items", "of_block"),
        ("classes", 2, None, "Items", "_run"),
        ("classes", 2, None, "BlockData", "loss"),
        ("classes", 2, None, "SoftRounding", "harden"),
        ("classes", 2, None, "SoftRounding", "tensors"),
    ],
)
def test_the_bench_is_left_as_it_was(
    kind: str,
    cut: int | None,
    stop: tuple[int, int] | None,
    owner: str,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also by what was stopped, after blocks were taken over from a draft."""
    draft = Draft(Memory(), "draft")
    if kind == "classes" and stop is None and owner != "nothing":
        draft.save({k: v for k, v in undisturbed().items() if "_blocks" not in k})
    bench = quantized(kind, cut=cut, progress=Witness(stop), draft=draft)
    clock, cached = bench.clock, find_cache(bench.network)
    clock.step, clock.evaluation, clock.batch, clock.store = 2, 3, 7, False
    clock.full, clock.rows = False, torch.tensor([1, 0])
    clock.evaluations.full = 5
    if cached is not None:
        cached.feature = random(2, cached.channels, 4, 4)
    before = situation(bench)
    disturb(bench, owner, where, monkeypatch)
    if stop is None and owner == "nothing":
        assert losses(learn(bench, **TRAINED))
    else:
        with pytest.raises(Stopped):
            learn(bench, **TRAINED)
    monkeypatch.undo()
    after = situation(bench)
    assert after.pop("feature") is before.pop("feature")
    rows, kept_rows = after["clock"].pop("rows"), before["clock"].pop("rows")
    assert torch.equal(rows, kept_rows)
    counted, kept_count = (vars(x["clock"].pop("evaluations")) for x in (after, before))
    assert counted == kept_count
    assert after == before


def test_artifacts_that_are_in_use_are_not_changed() -> None:
    """Neither the quantizer's nor that of an earlier reconstruction."""
    clock, network = Clock(STEPS), model("plain").load()
    grids = {key: value.clone() for key, value in found_grids("plain", None).items()}
    network = build(TimestepQuantizer, {"weight_bits": 4}).apply(network, clock, grids)
    bench = Bench(network, clock, model("plain"), ddim(steps=STEPS), 1, 4)
    rates = {"scale_rate": 0.1, "zero_rate": 0.5}
    first = learn(bench, **rates)
    copy = {key: value.clone() for key, value in first.items()}
    build(Reconstruction).apply(network, clock, first)
    learn(bench, **rates)
    assert_equal(grids, found_grids("plain", None))
    assert_equal(first, copy)
    assert not any(x.requires_grad for x in (*grids.values(), *first.values()))


def test_calibrating_does_not_depend_on_what_the_clock_showed() -> None:
    bench = quantized("classes", cut=2)
    bench.clock.step, bench.clock.full, bench.clock.evaluation = 3, False, 2
    bench.clock.store, bench.clock.rows = False, torch.tensor([0])
    with torch.inference_mode():
        found = learn(bench, **TRAINED)
    assert_equal(found, undisturbed())
    assert not any(x.requires_grad or x.is_inference() for x in found.values())


# --- as a method among others -----------------------------------------------------------------


@pytest.mark.parametrize("cut", [None, 2])
def test_saved_and_loaded_is_direct(cut: int | None) -> None:
    bench = quantized("classes", cut=cut)
    artifact = learn(bench, **TRAINED)
    loaded = load(save(artifact))
    assert_equal(loaded, artifact)
    direct, again = (applied(x, "classes", cut=cut) for x in (artifact, loaded))
    assert_equal(contents(direct.network), contents(again.network))
    noise = Noise(3, range(2), bench.model.shape)
    condition = bench.model.condition(range(2))
    recorders = [Recorder(), Recorder()]
    for one_of, recorder in zip((direct, again), recorders, strict=True):
        run(
            one_of.network,
            bench.sampler,
            noise,
            [recorder],
            clock=one_of.clock,
            condition=condition,
        )
    pairs = zip(recorders[0].predictions, recorders[1].predictions, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(x.isfinite().all() for x in recorders[0].predictions)


@pytest.mark.slow
def test_contract_on_a_cached_network() -> None:
    before = [
        build(DeepCache, {"interval": 2, "cut": 1}),
        build(CacheCorrection),
        build(TimestepQuantizer, {"weight_bits": 4, "search": "max"}),
    ]
    options = {"iterations": 1, "items": 8, "batch_size": 2, "weight_rate": 1e-4}
    check_efficiency_method(
        Reconstruction,
        options,
        before=before,
        model=TinyModel(DOUBLE, network=small_unet(num_class_embeds=5)),
        images=4,
        skip=["composition"],
    )


def test_contract_also_with_a_cache_of_another_kind() -> None:
    check_efficiency_method(
        Reconstruction,
        {"iterations": 2, "items": 8, "batch_size": 4},
        before=[build(TimestepQuantizer, {"weight_bits": 4, "search": "max"})],
        model=TinyModel(DOUBLE, network=small_unet()),
        images=4,
    )


def test_layers_must_have_their_names_in_the_original_network() -> None:
    """Where earlier methods wrapped a network that is no U-Net they have others."""

    class Wrapped(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            output: Tensor = self.inside(sample, timestep)
            return output

    bench = quantized()
    bench = replace(bench, network=Wrapped(bench.network))
    with pytest.raises(Incompatible, match=r"original network has no inside\.first"):
        learn(bench)


def test_arguments_belong_together_by_name_or_else_by_order() -> None:
    """diffusers' own blocks name some arguments that a walk along the layers gives by place."""
    x, y, t, s = (torch.full((2, 1, 1), value) for value in (1.0, 2.0, 3.0, 4.0))
    mine = torch.tensor([True, False])
    walked = Arguments((x, t), {"scale": 5})
    called = Arguments((y,), {"scale": 5, "temb": s})
    found = walked.mixed(called, mine)
    assert [value.flatten().tolist() for value in found.positional] == [[1, 2], [3, 4]]
    assert found.named == {"scale": 5}
    back = called.mixed(walked, mine)
    assert back.positional[0].flatten().tolist() == [2, 1]
    assert back.named["temb"].flatten().tolist() == [4, 3]
    swapped = Arguments((), {"b": s, "a": y}).mixed(Arguments((), {"a": x, "b": t}), mine)
    assert swapped.named["b"].flatten().tolist() == [4, 3]
    assert swapped.named["a"].flatten().tolist() == [2, 1]
