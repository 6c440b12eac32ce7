"""What several tests need: tiny networks, a recording loop, the original DDPM's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser, Step, denoise
from iec_eval.embedded import FASHION_MNIST
from iec_eval.models.base import DiffusionModel
from iec_eval.models.hooks import iec_eval_models
from iec_eval.noise import Noise
from iec_eval.options import BaseOptions, validated
from iec_eval.planning import Plan
from iec_eval.samplers.base import Sampler
from iec_eval.samplers.ddim import DDIM
from iec_eval.schedule import NoiseSchedule
from iec_eval.study import CalibrationSpec, Experiment, ImagesSpec
from iec_eval.testing.tiny import TinyModel

SCHEDULE = NoiseSchedule.from_betas()


def build(cls: type[Any], options: Mapping[str, Any] | None = None, *more: Any) -> Any:
    """A part from its options, as the program builds it."""
    return cls(validated(cls.Options, options or {}, cls.__name__), *more)


def ddim(**options: Any) -> DDIM:
    """A DDIM sampler on the DDPM schedule."""
    sampler: DDIM = build(DDIM, options, SCHEDULE)
    return sampler


def packaged() -> DiffusionModel:
    """The packaged model; skips the test where its weights are not there."""
    if not (FASHION_MNIST / "unet").is_dir():
        pytest.skip("the packaged model's weights are not here")
    cls = next(cls for cls in iec_eval_models() if cls.name == "fashion-mnist")
    model: DiffusionModel = build(cls)
    return model


class FixedNoise(Noise):
    """Starts from a given x_T; later noise is drawn as ever."""

    def __init__(self, start: Tensor, *, seed: int = 0) -> None:
        super().__init__(seed, range(len(start)), start.shape[1:])
        self._start = start

    def initial(self) -> Tensor:
        return self._start


class ConvNet(nn.Module):
    """Two convolutions and a time shift: smooth, nonlinear, works in float64."""

    def __init__(self, seed: int = 0, channels: int = 3, strength: float = 0.5) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(8, channels, 3, 3, generator=random) / 5)
        self.last = nn.Parameter(torch.randn(channels, 8, 3, 3, generator=random) / 8 * strength)

    def forward(self, sample: Tensor, timestep: Tensor, **inputs: Tensor) -> Tensor:
        time = (timestep.to(sample.dtype) / 1000).view(-1, 1, 1, 1)
        hidden = torch.tanh(nn.functional.conv2d(sample, self.first, padding=1) + time)
        output = nn.functional.conv2d(hidden, self.last, padding=1)
        for value in inputs.values():
            output = output + 0.1 * torch.sin(value.to(sample.dtype)).view(-1, 1, 1, 1)
        return output


class ConstantNet(nn.Module):
    """Predicts the same eps everywhere."""

    def __init__(self, value: float = 0.3) -> None:
        super().__init__()
        self.value = value

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.full_like(sample, self.value)


class Spy(nn.Module):
    """Notes the clock and the batch at every call of the network inside."""

    def __init__(self, network: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.network, self.clock = network, clock
        self.calls: list[tuple[int, int, bool, float, list[int] | None]] = []
        self.shown: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        clock, rows = self.clock, self.clock.rows
        listed = None if rows is None else rows.tolist()
        call = (clock.step, clock.evaluation, clock.full, float(timestep[0]), listed)
        self.calls.append(call)
        self.shown.append(sample.clone())
        output = self.network(sample, timestep, **inputs)
        return output if isinstance(output, Tensor) else output[0]


class Recorder(DenoisingCallback):
    """Keeps the state before every step, and the feature a cache holds after it."""

    name = "recorder"

    def __init__(self, network: Any = None) -> None:
        super().__init__(BaseOptions())
        self.network = network
        self.states: list[Tensor] = []
        self.predictions: list[Tensor] = []
        self.features: list[Tensor] = []

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        self.states.append(step.sample.clone())
        self.predictions.append(prediction.clone())
        if self.network is not None and step.full:
            self.features.append(self.network.feature.clone())
        return prediction


def plan_with(sampler: Sampler, callbacks: Sequence[DenoisingCallback] = ()) -> Plan:
    """A row of the tiny model with this sampler, which no study spells out."""
    row = Experiment(
        name="a row", control=False, model={}, sampler={}, efficiency=[], callbacks=[],
        images=ImagesSpec(), calibration=CalibrationSpec(),
    )  # fmt: skip
    return Plan(row, TinyModel(), {}, {}, sampler, [], list(callbacks), "fingerprint")


def run(
    network: nn.Module,
    sampler: Sampler,
    noise: Noise,
    callbacks: Sequence[DenoisingCallback] = (),
    *,
    clock: Clock | None = None,
    condition: Condition | None = None,
) -> Tensor:
    """Final latents of the one loop."""
    clock = clock or Clock(len(sampler.timesteps))
    denoiser = Denoiser(network, condition or Condition(), clock)
    with torch.inference_mode():
        return denoise(sampler, denoiser, noise, callbacks)


def trajectory(
    network: nn.Module,
    sampler: Sampler,
    noise: Noise,
    callbacks: Sequence[DenoisingCallback] = (),
    *,
    clock: Clock | None = None,
) -> Tensor:
    """All states ``[T + 1, B, C, H, W]``, x_T first."""
    recorder = Recorder()
    final = run(network, sampler, noise, [*callbacks, recorder], clock=clock)
    return torch.stack([*recorder.states, final])


def unet(seed: int = 0, **changes: Any) -> Any:
    """A tiny UNet2DModel with random weights, biases and norms, in eval mode."""
    from diffusers import UNet2DModel

    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return randomized(lambda: UNet2DModel(**{**config, **changes}), seed)


def conditional_unet(seed: int = 0, **changes: Any) -> Any:
    """A tiny UNet2DConditionModel with random weights, biases and norms, in eval mode."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return randomized(lambda: UNet2DConditionModel(**{**config, **changes}), seed)


def randomized(make: Callable[[], Any], seed: int) -> Any:
    """Every parameter moved at random, so that a bias or norm left out would show."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = make()
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.eval().requires_grad_(False)


def tiny_clip(folder: Path, *, seed: int = 0, limit: int = 12) -> Path:
    """A transformers CLIP with random weights that reads texts of ``limit`` tokens, on disk."""
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    shared |= {"num_hidden_layers": 2, "projection_dim": 8}
    vocabulary = _clip_vocabulary()
    ends = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END]}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": limit, **ends}
    vision = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(
        text_config={**shared, **text, "pad_token_id": vocabulary[END]},
        vision_config={**shared, **vision},
        projection_dim=8,
    )
    model = randomized(lambda: CLIPModel(config), seed)
    for name, parameter in model.named_parameters():
        if "patch_embedding" in name or "token_embedding" in name:
            parameter *= 30  # else all images and all texts look alike to it
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(CLIP_MERGES) + "\n")
    written = {
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": limit},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
        },
    }
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content))
    return folder


START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>"]


def _clip_vocabulary() -> dict[str, int]:
    """Every byte, within a word and at its end, what merges make of them, and the two ends."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in CLIP_MERGES]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *merged, START, END]
    return {piece: number for number, piece in enumerate(pieces)}


def random_backbone(path: Path, net: str = "squeeze") -> dict[str, Tensor]:
    """Random weights of the torchvision network that LPIPS calls ``net``, written to ``path``."""
    from torchvision import models

    from iec_eval.metrics.lpips import BACKBONES

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(models, BACKBONES[net])(weights=None)
    state: dict[str, Tensor] = network.state_dict()
    torch.save(state, path)
    return state


# --- the recorded numbers ---------------------------------------------------------------------


def oracle(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Recorded tensors, float32 and int64, and their description; skips where there are none."""
    folder = os.environ.get("IEC_EVAL_ORACLES")
    if folder is None:
        pytest.skip("IEC_EVAL_ORACLES is unset: no recorded numbers to compare with")
    tensors = load_file(Path(folder) / f"{name}.safetensors")
    about = json.loads((Path(folder) / f"{name}.json").read_text())
    return {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }, about


def original_ddpm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
    """The DDPM U-Net as a UNet2DModel, from weights in the layout of the original code."""
    from diffusers import UNet2DModel

    channels, levels = config["ch"], len(config["ch_mult"])
    sides = [config["resolution"] // 2**level for level in range(levels)]
    attends = [side in config["attn_resolutions"] for side in sides]
    network: Any = UNet2DModel(
        sample_size=config["resolution"],
        in_channels=config["in_channels"],
        out_channels=config["out_ch"],
        layers_per_block=config["num_res_blocks"],
        block_out_channels=tuple(channels * factor for factor in config["ch_mult"]),
        down_block_types=tuple("AttnDownBlock2D" if at else "DownBlock2D" for at in attends),
        up_block_types=tuple("AttnUpBlock2D" if at else "UpBlock2D" for at in attends[::-1]),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    network.load_state_dict(original_to_diffusers(state, levels))
    return network.eval().requires_grad_(False)


PLACES = {"temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2"}
MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
PARTS = {
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def original_to_diffusers(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Rename the original code's weights; 1x1 convolutions of attention become linear."""
    return {_new_name(key, levels): _linear(key, value) for key, value in state.items()}


def _new_name(key: str, levels: int) -> str:
    module, kind = key.rsplit(".", 1)
    words = module.split(".")
    if words[0] in ("down", "up"):
        level = int(words[1]) if words[0] == "down" else levels - 1 - int(words[1])
        return f"{words[0]}_blocks.{level}.{_inner(words[2:])}.{kind}"
    if words[0] == "mid":
        return f"mid_block.{MIDDLE[words[1]]}.{PARTS.get(words[2], words[2])}.{kind}"
    top = {"norm_out": "conv_norm_out", **PLACES}
    return f"{top.get(module, module)}.{kind}"


def _inner(words: Sequence[str]) -> str:
    if words[0] in ("downsample", "upsample"):
        return f"{words[0]}rs.0.conv"
    family = {"block": "resnets", "attn": "attentions"}[words[0]]
    return f"{family}.{words[1]}.{PARTS.get(words[2], words[2])}"


def _linear(key: str, value: Tensor) -> Tensor:
    attention = ".attn" in key and key.endswith(".weight") and value.ndim == 4
    return value.flatten(1) if attention else value


def original_ldm(name: str) -> Any:
    """A recorded latent-diffusion U-Net, from weights in the layout of the original code."""
    from iec_eval.conversion.key_maps import latent_unet_map
    from iec_eval.conversion.layouts import latent_unet
    from iec_eval.conversion.original import UNetParams
    from iec_eval.networks import build_network

    tensors, about = oracle(f"ldm_unet_{name}")
    params = validated(UNetParams, about["config"]["unet_config"], name)
    network: Any = build_network(latent_unet(params, about["config"]["unet_config"]["image_size"]))
    origins = latent_unet_map(params)
    state = {
        key: origins[key].take(tensors[f"ckpt/{origins[key].name}"].float())
        for key in network.state_dict()
    }
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
