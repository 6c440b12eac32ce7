"""DeepCache: the walk through diffusers' U-Nets, what is cached, what is not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from helpers import ConvNet, build, conditional_unet, ddim, run, trajectory, unet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser
from iec_eval.efficiency.deepcache import CachedUNet, DeepCache, uniform_schedule
from iec_eval.efficiency.unet_walk import UNetWalk
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Noise

Inputs = dict[str, Any]
CLASSES = {"class_labels": torch.tensor([1, 3])}
TEXT = {"encoder_hidden_states": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))}
THREE_LEVELS = {"block_out_channels": (8, 16, 16), "sample_size": 8}
CIFAR: Inputs = {
    "sample_size": 16,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}

PLAIN: dict[str, tuple[Inputs, Inputs]] = {
    "attention": ({}, {}),
    "cifar": (CIFAR, {}),
    "asymmetric padding": ({"downsample_padding": 0, "attention_head_dim": None}, {}),
    "scale shift": ({"resnet_time_scale_shift": "scale_shift"}, {}),
    "resnet up and down blocks": (
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
        },
        {},
    ),
    "resnet samplers with attention": (
        {
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        },
        {},
    ),
    "three levels, two resnets": (
        {
            **THREE_LEVELS,
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D",) * 3,
            "up_block_types": ("UpBlock2D",) * 3,
        },
        {},
    ),
    "no middle attention, centred": ({"add_attention": False, "center_input_sample": True}, {}),
    "no middle": ({"mid_block_type": None}, {}),
    "classes": ({"num_class_embeds": 5}, CLASSES),
    "timestep classes": ({"class_embed_type": "timestep"}, CLASSES),
    "identity classes": ({"class_embed_type": "identity"}, {"class_labels": torch.ones(2, 32)}),
    "flipped time": ({"flip_sin_to_cos": False, "freq_shift": 1}, {}),
}
CONDITIONAL: dict[str, tuple[Inputs, Inputs]] = {
    "text": ({}, TEXT),
    "odd sizes": ({"sample_size": (11, 6)}, TEXT),
    "odd sizes, three levels": (
        {
            **THREE_LEVELS,
            "sample_size": 9,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        TEXT,
    ),
    "linear projection, two layers": (
        {"use_linear_projection": True, "transformer_layers_per_block": 2},
        TEXT,
    ),
    "classes": ({"num_class_embeds": 5}, {**TEXT, **CLASSES}),
    "joined classes": (
        {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 6,
            "class_embeddings_concat": True,
        },
        {**TEXT, "class_labels": torch.ones(2, 6)},
    ),
    "size and crop": (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8 + 6 * 4,
        },
        {
            **TEXT,
            "added_cond_kwargs": {"text_embeds": torch.ones(2, 8), "time_ids": torch.ones(2, 6)},
        },
    ),
    "time activation": ({"time_embedding_act_fn": "silu"}, TEXT),
    "projected text": (
        {"encoder_hid_dim": 7, "encoder_hid_dim_type": "text_proj"},
        {"encoder_hidden_states": torch.ones(2, 5, 7)},
    ),
    "no middle": ({"mid_block_type": None}, TEXT),
    "plain middle": ({"mid_block_type": "UNetMidBlock2D"}, TEXT),
    "no text": (
        {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
        },
        {"encoder_hidden_states": None},
    ),
}


def network_and_inputs(family: str, name: str) -> tuple[Any, Inputs]:
    if family == "plain":
        changes, inputs = PLAIN[name]
        return unet(**changes), inputs
    changes, inputs = CONDITIONAL[name]
    return conditional_unet(**changes), inputs


def sample_for(network: Any, seed: int = 0, count: int = 2) -> Tensor:
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Noise(seed, range(count), (network.config.in_channels, height, width)).initial()


ALL = [("plain", name) for name in PLAIN] + [("conditional", name) for name in CONDITIONAL]
TIMES = torch.tensor([500.0, 500.0])


# --- the walk ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), ALL)
@torch.no_grad()
def test_full_forward_is_that_of_diffusers(family: str, name: str) -> None:
    network, inputs = network_and_inputs(family, name)
    x = sample_for(network)
    wanted = network(x, TIMES, **inputs).sample
    for cut in range(1, UNetWalk(network).depth + 1):
        assert torch.equal(CachedUNet(network, cut, Clock(1))(x, TIMES, **inputs), wanted)


@pytest.mark.parametrize(("family", "name"), ALL)
@torch.no_grad()
def test_cached_forward_of_the_same_input_is_the_full_one(family: str, name: str) -> None:
    network, inputs = network_and_inputs(family, name)
    x, other = sample_for(network), sample_for(network, seed=1)
    for cut in range(1, UNetWalk(network).depth + 1):
        clock = Clock(2, [0])
        cached = CachedUNet(network, cut, clock)
        full = cached(x, TIMES, **inputs)
        clock.full = False
        assert torch.equal(cached(x, TIMES, **inputs), full)
        reused = cached(other, TIMES, **inputs)
        assert not torch.allclose(reused, network(other, TIMES, **inputs).sample, atol=1e-3)
        assert not torch.allclose(reused, full, atol=1e-3)


@pytest.mark.parametrize("size", [7, (9, 6)])
@torch.no_grad()
def test_odd_sizes_where_diffusers_has_no_answer(size: Any) -> None:
    """UNet2DModel's own forward cannot join maps of odd size; the walk can."""
    network = unet(sample_size=size)
    x = sample_for(network)
    for cut in range(1, UNetWalk(network).depth + 1):
        clock = Clock(2)
        cached = CachedUNet(network, cut, clock)
        full = cached(x, TIMES)
        assert full.shape == x.shape
        clock.full = False
        assert torch.equal(cached(x, TIMES), full)


def resnets_from_the_output(network: Any) -> list[nn.Module]:
    """u_1, u_2, ...: decoder resnets by their number."""
    return [r for block in reversed(network.up_blocks) for r in reversed(block.resnets)]


@torch.no_grad()
def test_feature_is_what_enters_the_resnet_of_the_cut() -> None:
    network = unet(**CIFAR)
    x = sample_for(network)
    for cut, resnet in enumerate(resnets_from_the_output(network), start=1):
        cached = CachedUNet(network, cut, Clock(1))
        entered: list[Tensor] = []
        handle = resnet.register_forward_pre_hook(
            lambda _, args, into=entered: into.append(args[0])
        )
        cached(x, TIMES)
        handle.remove()
        assert cached.feature is not None
        channels = cached.feature.shape[1]
        assert torch.equal(entered[0][:, :channels], cached.feature)
        assert entered[0].shape[1] > channels


# --- what a cached evaluation costs -----------------------------------------------------------

HEAD = ["time_embedding", "conv_in", "conv_norm_out", "conv_out"]
# for a network with four levels of two resnets (three in the decoder)
RECOMPUTED = {
    1: [*HEAD, "up_blocks.3.resnets.2"],
    2: [*HEAD, "down_blocks.0.resnets.0", "up_blocks.3.resnets.1", "up_blocks.3.resnets.2"],
    3: [*HEAD, "down_blocks.0.resnets", "up_blocks.3"],
    4: [*HEAD, "down_blocks.0", "up_blocks.2.resnets.2", "up_blocks.2.attentions.2",
        "up_blocks.2.upsamplers", "up_blocks.3"],
    6: [*HEAD, "down_blocks.0", "down_blocks.1.resnets", "down_blocks.1.attentions",
        "up_blocks.2", "up_blocks.3"],
}  # fmt: skip


def belongs(name: str, places: list[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@contextmanager
def noting_layers(network: nn.Module) -> Iterator[set[str]]:
    """Names of the layers with weights that run inside the block."""
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in network.named_modules()
        if module._parameters
    ]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("cut", RECOMPUTED)
@torch.no_grad()
def test_only_the_shallow_part_runs(cut: int) -> None:
    network, clock = unet(**CIFAR), Clock(2, [0])
    cached = CachedUNet(network, cut, clock)
    x = sample_for(network)
    layers = {name for name, module in network.named_modules() if module._parameters}
    with noting_layers(network) as ran:
        cached(x, TIMES)
    assert ran == layers
    clock.full = False
    with noting_layers(network) as ran:
        cached(x, TIMES)
    assert ran == {name for name in layers if belongs(name, RECOMPUTED[cut])}


@pytest.mark.parametrize("cut", RECOMPUTED)
@torch.no_grad()
def test_cost_is_that_of_the_recomputed_modules(cut: int) -> None:
    network, clock = unet(**CIFAR), Clock(2, [0])
    x = sample_for(network)
    with FlopCounterMode(display=False) as whole:
        network(x, TIMES)
    cached = CachedUNet(network, cut, clock)
    cached(x, TIMES)
    clock.full = False
    with FlopCounterMode(display=False) as counter:
        cached(x, TIMES)
    per_module = whole.get_flop_counts()
    # ModuleLists have no forward, so no count of their own: sum over what is directly inside
    layers = [
        name
        for name, module in network.named_modules()
        if module._parameters or is_attention(module)
    ]
    chosen = [name for name in outermost(layers) if belongs(name, RECOMPUTED[cut])]
    wanted = sum(sum(per_module[f"UNet2DModel.{name}"].values()) for name in chosen
                 if f"UNet2DModel.{name}" in per_module)  # fmt: skip
    assert counter.get_total_flops() == wanted
    assert 0 < wanted < whole.get_total_flops()


def is_attention(module: nn.Module) -> bool:
    return type(module).__name__ == "Attention"


def outermost(names: list[str]) -> list[str]:
    """Names that are not inside another of them: an attention counts once, with its products."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def test_cut_of_the_cifar_network_costs_what_was_derived() -> None:
    """6.22 G multiply-accumulates full, 3.38 G at cut 4, 2.24 G at 3, 0.49 G at 1."""
    with torch.device("meta"):
        network: Any = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=CIFAR["down_block_types"],
            up_block_types=CIFAR["up_block_types"],
            attention_head_dim=None,
            downsample_padding=0,
        )
        x, when = torch.empty(1, 3, 32, 32), torch.zeros(1)
    found = {}
    for cut in (4, 3, 1):
        clock = Clock(2)
        cached = CachedUNet(network, cut, clock)
        for clock.full in (True, False):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                cached(x, when)
            found[cut if not clock.full else "full"] = counter.get_total_flops() / 2e9
    assert found == pytest.approx({"full": 6.22, 4: 3.38, 3: 2.24, 1: 0.49}, rel=0.01)


# --- in the loop ------------------------------------------------------------------------------


def cached_run(network: Any, options: Inputs, noise: Noise, steps: int = 6) -> tuple[Tensor, Clock]:
    method: DeepCache = build(DeepCache, options)
    clock = Clock(steps, method.full_steps(steps, {}))
    latents = run(method.apply(network, clock, {}), ddim(steps=steps), noise, clock=clock)
    return latents, clock


def test_interval_one_is_the_network_itself() -> None:
    network, noise = unet(), Noise(1, [0, 7], (3, 8, 8))
    latents, clock = cached_run(network, {"interval": 1, "cut": 2}, noise)
    assert torch.equal(latents, run(network, ddim(steps=6), noise))
    assert (clock.evaluations.full, clock.evaluations.cached) == (12, 0)


def test_every_nth_step_is_full() -> None:
    network, noise = unet(), Noise(1, [0, 7], (3, 8, 8))
    latents, clock = cached_run(network, {"interval": 4, "cut": 2}, noise)
    assert (clock.evaluations.full, clock.evaluations.cached) == (4, 8)
    assert not torch.allclose(latents, run(network, ddim(steps=6), noise), atol=1e-3)
    assert uniform_schedule(10, 3) == [0, 3, 6, 9]
    assert uniform_schedule(9, 3) == [0, 3, 6]


def test_states_equal_those_of_a_loop_by_hand() -> None:
    network, noise, cut = unet(), Noise(1, [0, 7], (3, 8, 8)), 3
    clock = Clock(5, [0, 3])
    states = trajectory(CachedUNet(network, cut, clock), ddim(steps=5), noise, clock=clock)
    sampler, entered = ddim(steps=5), list[Tensor]()
    resnet = resnets_from_the_output(network)[cut - 1]
    state = sampler.start(noise.initial())
    for index, timestep in enumerate(sampler.timesteps):
        with torch.no_grad(), reusing(resnet, entered, fresh=index in (0, 3)):
            eps = network(state.sample, torch.full((2,), float(timestep))).sample
        state = sampler.step(state, index, eps, noise.draw(index))
        assert torch.equal(states[index + 1], state.sample)


@contextmanager
def reusing(resnet: nn.Module, kept: list[Tensor], *, fresh: bool) -> Iterator[None]:
    """Run the whole network, but put the kept feature where the cut is."""
    skip_channels = 8

    def swap(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # what enters the resnet is the state of the cut, then the skip
        state, skip = args[0][:, :-skip_channels], args[0][:, -skip_channels:]
        if fresh:
            kept[:] = [state]
        return (torch.cat([kept[0], skip], 1), *args[1:])

    handle = resnet.register_forward_pre_hook(swap)
    yield
    handle.remove()


# --- rows, guidance, storing ------------------------------------------------------------------


@torch.no_grad()
def test_guidance_and_rows_equal_separate_evaluations() -> None:
    network = unet(num_class_embeds=5)
    labels, nothing = torch.tensor([0, 1, 2]), torch.full((3,), 4)
    x, later = sample_for(network, 0, 3), sample_for(network, 1, 3)
    clock = Clock(2, [0])
    guided = Condition({"class_labels": labels}, {"class_labels": nothing}, 2.5)
    denoiser = Denoiser(CachedUNet(network, 2, clock), guided, clock)
    one_by_one = Separate(network, labels, nothing, scale=2.5)
    torch.testing.assert_close(denoiser(x, 500.0), one_by_one.full(x, [0, 1, 2], 500.0))
    assert clock.batch == 6
    rows = torch.tensor([2, 0])
    clock.evaluation = 1
    found = denoiser(later[rows], 500.0, rows=rows)
    torch.testing.assert_close(found, one_by_one.full(later[rows], [2, 0], 500.0))
    clock.step, clock.evaluation, clock.full = 1, 0, False
    found = denoiser(later, 400.0)
    torch.testing.assert_close(found, one_by_one.cached(later, [0, 1, 2], 400.0))
    found = denoiser(x[rows], 400.0, rows=rows)
    torch.testing.assert_close(found, one_by_one.cached(x[rows], [2, 0], 400.0))
    assert (clock.evaluations.full, clock.evaluations.cached) == (5, 5)


class Separate:
    """A network and cache for every image and half of its guidance."""

    def __init__(self, network: Any, labels: Tensor, nothing: Tensor, *, scale: float) -> None:
        self.scale = scale
        self.clocks = [Clock(2) for _ in labels for _ in range(2)]
        caches = [CachedUNet(network, 2, clock) for clock in self.clocks]
        self.pairs = list(zip(caches[::2], caches[1::2], strict=True))
        self.told = list(zip(labels, nothing, strict=True))

    def full(self, x: Tensor, images: list[int], timestep: float) -> Tensor:
        return self._run(x, images, timestep, full=True)

    def cached(self, x: Tensor, images: list[int], timestep: float) -> Tensor:
        return self._run(x, images, timestep, full=False)

    def _run(self, x: Tensor, images: list[int], timestep: float, *, full: bool) -> Tensor:
        for clock in self.clocks:
            clock.full = full
        rows, when = [], torch.tensor([timestep])
        for row, image in zip(x, images, strict=True):
            (with_label, without), (label, nothing) = self.pairs[image], self.told[image]
            conditional = with_label(row[None], when, class_labels=label[None])
            free = without(row[None], when, class_labels=nothing[None])
            rows.append(free + self.scale * (conditional - free))
        return torch.cat(rows)


@torch.no_grad()
def test_scale_one_runs_the_condition_alone() -> None:
    network = unet(num_class_embeds=5)
    labels, nothing = torch.tensor([0, 1]), torch.full((2,), 4)
    clock, x = Clock(1), sample_for(network)
    condition = Condition({"class_labels": labels}, {"class_labels": nothing}, 1.0)
    found = Denoiser(network, condition, clock)(x, 500.0)
    assert clock.batch == 2
    assert torch.equal(found, network(x, TIMES, class_labels=labels).sample)


@torch.no_grad()
def test_rows_replace_only_their_own_features() -> None:
    network, clock = unet(), Clock(2, [0])
    cached, when = CachedUNet(network, 2, clock), torch.full((3,), 500.0)
    cached(sample_for(network, 0, 3), when)
    assert cached.feature is not None
    before = cached.feature.clone()
    clock.evaluation, clock.rows = 1, torch.tensor([1])
    cached(sample_for(network, 1, 1), when[:1])
    assert torch.equal(cached.feature[[0, 2]], before[[0, 2]])
    assert not torch.allclose(cached.feature[1], before[1], atol=1e-3)


@torch.no_grad()
def test_an_evaluation_that_may_not_store_does_not() -> None:
    network, clock = unet(), Clock(2, [0])
    cached = CachedUNet(network, 2, clock)
    cached(sample_for(network), TIMES)
    assert cached.feature is not None
    before = cached.feature.clone()
    clock.evaluation, clock.store = 1, False
    cached(sample_for(network, 1), TIMES)
    assert torch.equal(cached.feature, before)
    # a step's own evaluation always stores
    clock.evaluation = 0
    cached(sample_for(network, 1), TIMES)
    assert not torch.equal(cached.feature, before)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [(ConvNet, "UNet2DModel or UNet2DConditionModel, got ConvNet"),
     (lambda: unet(down_block_types=("SkipDownBlock2D", "DownBlock2D")), "SkipDownBlock2D"),
     (lambda: unet(time_embedding_type="fourier"), "Fourier"),
     (lambda: freely(conditional_unet()), "FreeU"),
     (lambda: conditional_unet(
         down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
         up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
         mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "SimpleCrossAttn")],
)  # fmt: skip
def test_networks_that_cannot_be_walked(make: Any, message: str) -> None:
    with pytest.raises(Incompatible, match=message):
        CachedUNet(make(), 1, Clock(1))


def freely(network: Any) -> Any:
    network.enable_freeu(s1=0.9, s2=0.2, b1=1.1, b2=1.2)
    return network


def test_cut_deeper_than_the_network() -> None:
    assert UNetWalk(unet()).depth == 4
    with pytest.raises(ConfigError, match="cut 5 wanted, this network has 4 at most"):
        CachedUNet(unet(), 5, Clock(1))


def test_interval_longer_than_the_run() -> None:
    method: DeepCache = build(DeepCache, {"interval": 7})
    with pytest.raises(ConfigError, match="interval 7 is longer than the run of 6"):
        method.full_steps(6, {})


@pytest.mark.parametrize("options", [{}, {"interval": 0}, {"interval": 2, "cut": 0}])
def test_wrong_options(options: Inputs) -> None:
    with pytest.raises(ConfigError):
        build(DeepCache, options)


def test_nothing_to_recall_yet() -> None:
    network, clock = unet(), Clock(1)
    clock.full = False
    with pytest.raises(RuntimeError, match="step 0 must be full"):
        CachedUNet(network, 2, clock)(sample_for(network), TIMES)
