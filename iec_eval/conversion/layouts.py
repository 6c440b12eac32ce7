"""Original configuration to diffusers' configuration, component by component."""

from __future__ import annotations

from typing import Any, Literal

from iec_eval.conversion.original import (
    DDPM,
    GROUPS,
    ClassEmbedderConfig,
    Configuration,
    FirstStageConfig,
    LatentDiffusion,
    TextEncoderConfig,
    UNetParams,
)
from iec_eval.networks import FIXED_HEADS, HEADS

Layout = dict[str, dict[str, Any]]


def layout(original: Configuration, scale_factor: float | None = None) -> Layout:
    """The configuration of every component, under the name of its folder.

    ``unet`` and ``scheduler`` always; ``vae`` or ``vqvae``, ``class_embedder`` and
    ``text_encoder`` as the model has them. ``scale_factor`` is the one found in the checkpoint of
    a model with ``scale_by_std``; without it, that model's ``scaling_factor`` is None.
    """
    if isinstance(original, DDPM):
        return {"unet": ddpm_unet(original), "scheduler": ddpm_scheduler(original)}
    scale = scale_factor if original.scale_by_std else original.scale_factor
    first = original.first_stage_config
    found = {
        "unet": latent_unet(original.unet_config.params, original.image_size),
        "scheduler": latent_scheduler(original),
        "vqvae" if first.quantizes else "vae": first_stage(first, scale),
    }
    return found | _conditioning(original)


def ddpm_unet(original: DDPM) -> dict[str, Any]:
    """The U-Net of Ho et al. 2020: one head, asymmetric padding, sine before cosine."""
    model = original.model
    attended = [original.attended(level) for level in range(len(model.channels))]
    down, up = _plain_blocks(attended)
    return {
        "_class_name": "UNet2DModel",
        "sample_size": original.data.image_size,
        "in_channels": model.in_channels,
        "out_channels": model.out_ch,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": model.channels,
        "layers_per_block": model.num_res_blocks,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-6,
    }


def latent_unet(params: UNetParams, size: int) -> dict[str, Any]:
    """A UNet2DModel, or a UNet2DConditionModel where there are spatial transformers.

    ``size`` is the side of a latent; Stable Diffusion's file has another one in ``params``.
    """
    common = {
        "sample_size": size,
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
        "block_out_channels": params.channels,
        "layers_per_block": params.num_res_blocks,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if params.use_scale_shift_norm else "default",
    }
    specific = _conditional if params.use_spatial_transformer else _unconditional
    return {**specific(params), **common}


def first_stage(config: FirstStageConfig, scaling_factor: float | None) -> dict[str, Any]:
    """An AutoencoderKL or VQModel; diffusers fixes the normalizations as the original has them."""
    params, sizes = config.params, config.params.ddconfig
    found = {
        "_class_name": "VQModel" if config.quantizes else "AutoencoderKL",
        "sample_size": sizes.resolution,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * len(sizes.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(sizes.channels),
        "block_out_channels": sizes.channels,
        "layers_per_block": sizes.num_res_blocks,
        "latent_channels": sizes.z_channels,
        "norm_num_groups": GROUPS,
        "scaling_factor": scaling_factor,
    }
    if not config.quantizes:
        return found
    return {**found, "num_vq_embeddings": params.n_embed, "vq_embed_dim": params.embed_dim}


def ddpm_scheduler(original: DDPM) -> dict[str, Any]:
    """A DDIMScheduler that ends at abar = 1 and does not clip, as the DDIM code samples."""
    diffusion = original.diffusion
    betas = diffusion.beta_start, diffusion.beta_end, diffusion.num_diffusion_timesteps
    kind: Literal["linear", "scaled_linear"] = (
        "linear" if diffusion.beta_schedule == "linear" else "scaled_linear"
    )
    return _scheduler(kind, *betas, set_alpha_to_one=True, steps_offset=0)


def latent_scheduler(original: LatentDiffusion) -> dict[str, Any]:
    """A DDIMScheduler that ends at abar(0), timesteps one later, as latent diffusion samples."""
    betas = original.linear_start, original.linear_end, original.timesteps
    return _scheduler("scaled_linear", *betas, set_alpha_to_one=False, steps_offset=1)


def text_encoder() -> dict[str, Any]:
    """The text half of CLIP ViT-L/14 (Radford et al. 2021), as Stable Diffusion v1 uses it."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _unconditional(params: UNetParams) -> dict[str, Any]:
    attended = [params.attended(level) for level in range(len(params.channels))]
    down, up = _plain_blocks(attended, resnet_resampling=params.resblock_updown)
    resampling = "resnet" if params.resblock_updown else "conv"
    return {
        **_heads(params),
        "down_block_types": down,
        "up_block_types": up,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "downsample_padding": 1,
        "attn_norm_num_groups": GROUPS,
    }


def _heads(params: UNetParams) -> dict[str, Any]:
    """Channels of a head, or how many heads: stock diffusers cannot express the latter.

    It would ignore the number and compute something else, so the file is made unreadable to it:
    nobody's class name, and no channels to divide by.
    """
    if params.num_head_channels != -1:
        return {"_class_name": "UNet2DModel", "attention_head_dim": params.num_head_channels}
    if params.num_heads == 1:
        return {"_class_name": "UNet2DModel", "attention_head_dim": None}
    return {"_class_name": FIXED_HEADS, HEADS: params.num_heads, "attention_head_dim": 0}


def _conditional(params: UNetParams) -> dict[str, Any]:
    attended = [params.attended(level) for level in range(len(params.channels))]
    return {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        "downsample_padding": 1,
        "cross_attention_dim": params.context_dim,
        "transformer_layers_per_block": params.transformer_depth,
        # the number of heads, whatever diffusers calls it
        "attention_head_dim": [params.heads(channels) for channels in params.channels],
    }


def _conditioning(original: LatentDiffusion) -> Layout:
    condition = original.cond_stage_config
    if isinstance(condition, ClassEmbedderConfig):
        sizes = condition.params
        return {"class_embedder": {"num_embeddings": sizes.n_classes, "dim": sizes.embed_dim}}
    return {"text_encoder": text_encoder()} if isinstance(condition, TextEncoderConfig) else {}


def _plain_blocks(
    attended: list[bool], *, resnet_resampling: bool = False
) -> tuple[list[str], list[str]]:
    """Types of the blocks without spatial transformers, down and up."""
    plain = "Resnet{}sampleBlock2D" if resnet_resampling else "{}Block2D"
    kinds = ["Attn{}Block2D" if a else plain for a in attended]
    return [k.format("Down") for k in kinds], [k.format("Up") for k in reversed(kinds)]


def _scheduler(kind: str, start: float, end: float, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": steps,
        "beta_schedule": kind,
        "beta_start": start,
        "beta_end": end,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "clip_sample": False,
        **more,
    }
