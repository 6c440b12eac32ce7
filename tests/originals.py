"""Checkpoints in the original layout with random weights, made by the key maps' inverse."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from iec_eval.conversion.components import ema_name
from iec_eval.conversion.key_maps import (
    KeyMap,
    as_matrix,
    ddpm_unet_map,
    first_stage_map,
    latent_unet_map,
    text_encoder_shapes,
)
from iec_eval.conversion.layouts import layout
from iec_eval.conversion.original import DDPM, LatentDiffusion
from iec_eval.networks import build_first_stage, build_network
from iec_eval.options import validated
from iec_eval.schedule import NoiseSchedule

DDPM_VALUES: dict[str, Any] = {
    "model": {
        "type": "simple",
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "ema": True,
    },
    "data": {"dataset": "CIFAR10", "image_size": 8, "channels": 3},
    "diffusion": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "training": {"batch_size": 128},
}
CHURCH_VALUES: dict[str, Any] = {
    "linear_start": 0.0015,
    "linear_end": 0.0155,
    "image_size": 8,
    "channels": 4,
    "scale_by_std": True,
    "monitor": "val/loss_simple_ema",
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "attention_resolutions": [1],
            "num_res_blocks": 1,
            "channel_mult": [1, 2],
            "num_heads": 8,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
    },
    "first_stage_config": {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": 4,
            "lossconfig": {"target": "torch.nn.Identity"},
            "ddconfig": {
                "double_z": True,
                "z_channels": 4,
                "resolution": 16,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        },
    },
    "cond_stage_config": "__is_unconditional__",
}
SCALE = 0.7306
SD_VALUES: dict[str, Any] = {
    **CHURCH_VALUES,
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "scale_by_std": False,
    "scale_factor": 0.18215,
    "conditioning_key": "crossattn",
    "use_ema": False,
    "unet_config": {
        "params": {
            "image_size": 32,  # "unused", says the published file
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "attention_resolutions": [1],
            "num_res_blocks": 1,
            "channel_mult": [1, 1],
            "num_heads": 8,
            "use_spatial_transformer": True,
            "context_dim": 768,
            "use_checkpoint": True,
            "legacy": False,
        }
    },
    "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
}


def church() -> LatentDiffusion:
    """A tiny model shaped like the one for LSUN churches."""
    return validated(LatentDiffusion, CHURCH_VALUES, "church")


def ddpm() -> DDPM:
    """A tiny DDPM."""
    return validated(DDPM, DDPM_VALUES, "ddpm")


def write_config(folder: Path, kind: str) -> Path:
    """The YAML of one of them, as it was published."""
    path = folder / f"{kind}.yaml"
    values = DDPM_VALUES
    if kind == "church":
        values = {"model": {"base_learning_rate": 5.0e-5, "params": CHURCH_VALUES}, "data": {}}
    path.write_text(yaml.safe_dump(values))
    return path


def inverted(origins: KeyMap, shapes: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random original tensors from which a network with ``shapes`` can be taken."""
    random = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        origin, value = origins[name], torch.randn(tuple(shape), generator=random)
        if isinstance(origin.take, partial):
            rows, heads = shape[0], origin.take.keywords["heads"]
            empty = torch.zeros(3 * rows, *shape[1:], *([1] if len(shape) > 1 else []))
            joint = found.setdefault(origin.name, empty)
            grouped = joint.view(heads, 3, rows // heads, *joint.shape[1:])
            grouped[:, origin.take.keywords["part"]] = value.reshape(grouped[:, 0].shape)
        elif origin.take is as_matrix and value.dim() > 1:
            found[origin.name] = value[..., None, None]
        else:
            found[origin.name] = value
    return found


def shapes(network: Any) -> dict[str, torch.Size]:
    """Of a network's tensors."""
    return {name: value.shape for name, value in network.state_dict().items()}


@cache
def ddpm_state(seed: int = 0) -> dict[str, Tensor]:
    """A flat state dict; not to be changed."""
    original = ddpm()
    with torch.device("meta"):
        network = build_network(layout(original)["unet"])
    return inverted(ddpm_unet_map(original), shapes(network), seed)


@cache
def church_state(*, ema: bool = True) -> dict[str, Tensor]:
    """The state dict of a whole latent diffusion checkpoint; not to be changed."""
    original = church()
    configs = layout(original)
    with torch.device("meta"):
        unet = shapes(build_network(configs["unet"]))
        first = shapes(build_first_stage(configs["vae"]))
    origins = latent_unet_map(original.unet_config.params)
    sizes = original.first_stage_config.params.ddconfig
    raw, averaged = inverted(origins, unet, 1), inverted(origins, unet, 2)
    state = {f"model.diffusion_model.{name}": value for name, value in raw.items()}
    if ema:
        state |= {ema_name(name): value for name, value in averaged.items()}
        state |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    vae = inverted(first_stage_map(sizes), first, 3)
    state |= {f"first_stage_model.{name}": value for name, value in vae.items()}
    return state | buffers()


def sd_state(text: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a Stable Diffusion checkpoint, with a text encoder as ``text`` says."""
    original = validated(LatentDiffusion, SD_VALUES, "sd")
    with torch.device("meta"):
        unet = shapes(build_network(layout(original)["unet"]))
    raw = inverted(latent_unet_map(original.unet_config.params), unet, 1)
    state = {f"model.diffusion_model.{name}": value for name, value in raw.items()}
    church = church_state(ema=False)
    state |= {k: v for k, v in church.items() if k.startswith("first_stage_model.")}
    prefix = "cond_stage_model.transformer."
    state |= {prefix + k: torch.randn(shape) for k, shape in text_encoder_shapes(text).items()}
    return state | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def buffers() -> dict[str, Tensor]:
    """What latent diffusion keeps beside its weights."""
    abar = NoiseSchedule.from_betas("scaled_linear", 0.0015, 0.0155).alphas_cumprod
    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2
    return {
        "betas": betas.float(),
        "alphas_cumprod": abar.float(),
        "sqrt_alphas_cumprod": abar.sqrt().float(),
        "posterior_variance": betas.float(),
        "logvar": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "scale_factor": torch.tensor(SCALE),
    }
