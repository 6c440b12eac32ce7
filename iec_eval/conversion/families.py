"""The published models the paper evaluates: their true-size original configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from iec_eval.conversion.layouts import Layout, layout
from iec_eval.conversion.original import (
    DDPM,
    ClassEmbedderConfig,
    ClassEmbedderParams,
    Configuration,
    DDConfig,
    DDPMData,
    DDPMModel,
    FirstStageConfig,
    FirstStageParams,
    LatentDiffusion,
    TextEncoderConfig,
    UNetConfig,
    UNetParams,
)

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class Family:
    """A published model.

    Attributes:
        original: its configuration, in the published naming.
        source: where its checkpoint is to be had.
        known: MD5 of published files that do not say themselves which weights they hold.
    """

    name: str
    original: Configuration
    source: str
    known: Mapping[str, Weights] = field(default_factory=dict)

    def layout(self) -> Layout:
        """The configuration of every component, exactly as the converter writes it.

        Keys among ``unet``, ``scheduler``, ``vae``, ``vqvae``, ``class_embedder`` and
        ``text_encoder``. A ``scaling_factor`` that was measured in training (LSUN churches) is
        None here, and in a converted folder what the checkpoint says.
        """
        return layout(self.original)


def _first_stage(width: list[int], channels: int, codebook: int | None) -> FirstStageConfig:
    """The first stages of Rombach et al. 2022 for 256 x 256 images, KL or VQ."""
    kind = "AutoencoderKL" if codebook is None else "VQModelInterface"
    sizes = DDConfig(
        double_z=codebook is None,
        z_channels=channels,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=width,
        num_res_blocks=2,
        attn_resolutions=[],
    )
    params = FirstStageParams(embed_dim=channels, n_embed=codebook, ddconfig=sizes)
    target = f"ldm.models.autoencoder.{kind}"
    return FirstStageConfig.model_validate({"target": target, "params": params})


_KL_F8 = _first_stage([1, 2, 4, 4], 4, None)
_VQ_F4 = _first_stage([1, 2, 4], 3, 8192)

_DDPM_CIFAR10 = DDPM(
    model=DDPMModel(
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=[1, 2, 2, 2],
        num_res_blocks=2,
        attn_resolutions=[16],
    ),
    data=DDPMData(image_size=32),
)

_CHURCHES = LatentDiffusion(
    linear_start=0.0015,
    linear_end=0.0155,
    image_size=32,
    channels=4,
    scale_by_std=True,
    unet_config=UNetConfig(
        params=UNetParams(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=192,
            attention_resolutions=[1, 2, 4, 8],
            num_res_blocks=2,
            channel_mult=[1, 2, 2, 4, 4],
            num_heads=8,
            use_scale_shift_norm=True,
            resblock_updown=True,
        )
    ),
    first_stage_config=_KL_F8,
)

_BEDROOMS = LatentDiffusion(
    linear_start=0.0015,
    linear_end=0.0195,
    image_size=64,
    channels=3,
    unet_config=UNetConfig(
        params=UNetParams(
            image_size=64,
            in_channels=3,
            out_channels=3,
            model_channels=224,
            attention_resolutions=[8, 4, 2],
            num_res_blocks=2,
            channel_mult=[1, 2, 3, 4],
            num_head_channels=32,
        )
    ),
    first_stage_config=_VQ_F4,
)

_IMAGENET = LatentDiffusion(
    linear_start=0.0015,
    linear_end=0.0195,
    image_size=64,
    channels=3,
    conditioning_key="crossattn",
    unet_config=UNetConfig(
        params=UNetParams(
            image_size=64,
            in_channels=3,
            out_channels=3,
            model_channels=192,
            attention_resolutions=[8, 4, 2],
            num_res_blocks=2,
            channel_mult=[1, 2, 3, 5],
            num_heads=1,
            use_spatial_transformer=True,
            context_dim=512,
        )
    ),
    first_stage_config=_VQ_F4,
    cond_stage_config=ClassEmbedderConfig(
        params=ClassEmbedderParams(embed_dim=512, n_classes=1001)
    ),
)

_STABLE_DIFFUSION = LatentDiffusion(
    linear_start=0.00085,
    linear_end=0.012,
    image_size=64,
    channels=4,
    conditioning_key="crossattn",
    scale_factor=0.18215,
    unet_config=UNetConfig(
        params=UNetParams(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            attention_resolutions=[4, 2, 1],
            num_res_blocks=2,
            channel_mult=[1, 2, 4, 4],
            num_heads=8,
            use_spatial_transformer=True,
            context_dim=768,
        )
    ),
    first_stage_config=_KL_F8,
    cond_stage_config=TextEncoderConfig(),
)

_ALL = (
    Family(
        "ddpm-cifar10",
        _DDPM_CIFAR10,
        "pesser/pytorch_diffusion, ema_diffusion_cifar10_model/model-790000.ckpt",
        {"1fa350b952534ae442b1d5235cce5cd3": "ema", "82ed3067fd1002f5cf4c339fb80c4669": "raw"},
    ),
    Family("ldm-lsun-churches", _CHURCHES, "CompVis/latent-diffusion, lsun_churches.zip"),
    Family("ldm-lsun-bedrooms", _BEDROOMS, "CompVis/latent-diffusion, lsun_bedrooms.zip"),
    Family("ldm-imagenet", _IMAGENET, "CompVis/latent-diffusion, cin256-v2/model.ckpt"),
    Family("stable-diffusion-v1", _STABLE_DIFFUSION, "CompVis/stable-diffusion, sd-v1-4.ckpt"),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ALL})
