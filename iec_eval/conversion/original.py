"""The configurations the original models were published with, under their own names.

Two families of files: latent diffusion (Rombach et al. 2022; ``model.params`` of the YAML beside
each checkpoint) and the DDPM of the DDIM code (Song et al. 2021; ``model``, ``data`` and
``diffusion``). What changes the computation is read or refused by name; what only concerned
training is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import Field, model_validator

from iec_eval.errors import ConfigError
from iec_eval.options import BaseOptions, validated

GROUPS = 32  # of every group normalization in these networks


class Original(BaseOptions):
    """Base: ``training`` names the keys that do not change what a trained network computes."""

    training: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key not in cls.training}


class UNetParams(Original):
    """``unet_config.params`` of latent diffusion; sizes in channels, resolutions as factors."""

    training = frozenset({"dropout", "use_checkpoint", "use_fp16", "legacy"})

    image_size: int = Field(ge=1)
    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    model_channels: int = Field(multiple_of=GROUPS, ge=GROUPS)
    attention_resolutions: list[int]
    num_res_blocks: int = Field(ge=1)
    channel_mult: list[int] = Field(min_length=1)
    num_heads: int = -1
    num_head_channels: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int = Field(1, ge=1)
    context_dim: int | None = None
    conv_resample: Literal[True] = True
    dims: Literal[2] = 2
    num_classes: None = None
    num_heads_upsample: Literal[-1] = -1
    use_new_attention_order: Literal[False] = False
    n_embed: None = None

    @property
    def channels(self) -> list[int]:
        """Of each level, the highest resolution first."""
        return [self.model_channels * factor for factor in self.channel_mult]

    def attended(self, level: int) -> bool:
        """Whether the resnets of ``level`` are followed by attention."""
        return 2**level in self.attention_resolutions

    def heads(self, channels: int) -> int:
        """Attention heads where there are ``channels``."""
        fixed = self.num_head_channels == -1
        return self.num_heads if fixed else channels // self.num_head_channels

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        _check_first_level("channel_mult", self.channel_mult)
        if self.use_spatial_transformer and self.context_dim is None:
            raise ValueError("use_spatial_transformer without context_dim is not supported")
        if not self.use_spatial_transformer and self.context_dim is not None:
            raise ValueError("context_dim needs use_spatial_transformer: true")
        if self.use_spatial_transformer and self.resblock_updown:
            raise ValueError("resblock_updown with use_spatial_transformer is not supported")
        self._check_heads()
        return self

    def _check_heads(self) -> None:
        per_head = self.num_head_channels
        if (per_head == -1 and self.num_heads < 1) or (per_head != -1 and per_head < 1):
            raise ValueError("num_heads or num_head_channels must be a positive number")
        levels = [c for level, c in enumerate(self.channels) if self.attended(level)]
        for channels in {*levels, self.channels[-1]}:
            divisor = self.num_heads if per_head == -1 else per_head
            if channels % divisor:
                name = "num_heads" if per_head == -1 else "num_head_channels"
                raise ValueError(f"{name} {divisor} does not divide {channels} channels")


class UNetConfig(Original):
    """``unet_config``."""

    target: Literal["ldm.modules.diffusionmodules.openaimodel.UNetModel"] = (
        "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    )
    params: UNetParams


class DDConfig(Original):
    """``ddconfig``: encoder and decoder of a first stage."""

    training = frozenset({"dropout"})

    double_z: bool
    z_channels: int = Field(ge=1)
    resolution: int = Field(ge=1)
    in_channels: int = Field(ge=1)
    out_ch: int = Field(ge=1)
    ch: int = Field(multiple_of=GROUPS, ge=GROUPS)
    ch_mult: list[int] = Field(min_length=1)
    num_res_blocks: int = Field(ge=1)
    attn_resolutions: list[int] = Field(max_length=0)
    resamp_with_conv: Literal[True] = True
    give_pre_end: Literal[False] = False
    tanh_out: Literal[False] = False
    use_linear_attn: Literal[False] = False
    attn_type: Literal["vanilla"] = "vanilla"

    @property
    def channels(self) -> list[int]:
        """Of each level, the highest resolution first."""
        return [self.ch * factor for factor in self.ch_mult]


class FirstStageParams(Original):
    """``first_stage_config.params``; ``n_embed`` codebook vectors, None for a KL autoencoder."""

    training = frozenset(
        {"monitor", "ckpt_path", "lossconfig", "image_key", "ignore_keys", "sane_index_shape"}
    )

    embed_dim: int = Field(ge=1)
    n_embed: int | None = Field(None, ge=1)
    ddconfig: DDConfig
    colorize_nlabels: None = None
    remap: None = None


class FirstStageConfig(Original):
    """``first_stage_config``."""

    target: Literal[
        "ldm.models.autoencoder.AutoencoderKL", "ldm.models.autoencoder.VQModelInterface"
    ]
    params: FirstStageParams

    @property
    def quantizes(self) -> bool:
        """Whether latents are snapped to a codebook before they are decoded."""
        return self.target.endswith("VQModelInterface")

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        params = self.params
        if self.quantizes != (params.n_embed is not None):
            raise ValueError("n_embed must be given for VQModelInterface and for nothing else")
        if self.quantizes == params.ddconfig.double_z:
            raise ValueError("double_z must be true for AutoencoderKL, false for VQModelInterface")
        if not self.quantizes and params.embed_dim != params.ddconfig.z_channels:
            raise ValueError("an AutoencoderKL with embed_dim other than z_channels")
        return self


class ClassEmbedderParams(Original):
    """``cond_stage_config.params`` of a class-conditional model."""

    training = frozenset({"key"})

    embed_dim: int = Field(ge=1)
    n_classes: int = Field(1000, ge=1)


class ClassEmbedderConfig(Original):
    """``cond_stage_config`` of a class-conditional model."""

    target: Literal["ldm.modules.encoders.modules.ClassEmbedder"] = (
        "ldm.modules.encoders.modules.ClassEmbedder"
    )
    params: ClassEmbedderParams


class TextEncoderParams(Original):
    """``cond_stage_config.params`` of Stable Diffusion v1."""

    training = frozenset({"device"})

    version: Literal["openai/clip-vit-large-patch14"] = "openai/clip-vit-large-patch14"
    max_length: Literal[77] = 77


class TextEncoderConfig(Original):
    """``cond_stage_config`` of Stable Diffusion v1."""

    target: Literal["ldm.modules.encoders.modules.FrozenCLIPEmbedder"] = (
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
    )
    params: TextEncoderParams = TextEncoderParams()


class LatentDiffusion(Original):
    """``model.params`` of latent diffusion.

    Its ``linear`` betas have evenly spaced roots. ``scale_by_std``: the latents' scale factor was
    measured in training and is in the checkpoint, else it is ``scale_factor``.
    """

    training = frozenset(
        {
            "base_learning_rate",
            "ckpt_path",
            "concat_mode",
            "cond_stage_forward",
            "cond_stage_key",
            "cond_stage_trainable",
            "first_stage_key",
            "ignore_keys",
            "l_simple_weight",
            "learn_logvar",
            "load_only_unet",
            "log_every_t",
            "logvar_init",
            "loss_type",
            "monitor",
            "num_timesteps_cond",
            "original_elbo_weight",
            "scheduler_config",
            "use_ema",
            "use_positional_encodings",
            "v_posterior",
        }
    )

    linear_start: float = Field(1e-4, gt=0, lt=1)
    linear_end: float = Field(2e-2, gt=0, lt=1)
    timesteps: int = Field(1000, ge=1)
    beta_schedule: Literal["linear"] = "linear"
    given_betas: None = None
    parameterization: Literal["eps"] = "eps"
    image_size: int = Field(ge=1)
    channels: int = Field(ge=1)
    conditioning_key: Literal["crossattn"] | None = None
    scale_factor: float = Field(1.0, gt=0)
    scale_by_std: bool = False
    unet_config: UNetConfig
    first_stage_config: FirstStageConfig
    cond_stage_config: (
        Literal["__is_unconditional__"] | ClassEmbedderConfig | TextEncoderConfig | None
    ) = "__is_unconditional__"

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        unet, first = self.unet_config.params, self.first_stage_config.params
        if {unet.in_channels, unet.out_channels, first.embed_dim} != {self.channels}:
            raise ValueError(
                f"channels {self.channels}, in_channels {unet.in_channels}, out_channels "
                f"{unet.out_channels} and embed_dim {first.embed_dim} must be equal"
            )
        if self.unconditional == unet.use_spatial_transformer:
            raise ValueError("use_spatial_transformer and cond_stage_config need each other")
        self._check_context()
        return self

    @property
    def unconditional(self) -> bool:
        """Whether nothing but the time is told to the network."""
        return self.cond_stage_config is None or isinstance(self.cond_stage_config, str)

    def _check_context(self) -> None:
        wanted, condition = self.unet_config.params.context_dim, self.cond_stage_config
        classes = isinstance(condition, ClassEmbedderConfig)
        given = condition.params.embed_dim if classes else 768  # type: ignore[union-attr]
        if not self.unconditional and wanted != given:
            raise ValueError(f"context_dim {wanted}, but the conditioning gives {given} channels")


class DDPMModel(Original):
    """``model`` of the DDIM code's configuration."""

    training = frozenset({"dropout", "var_type", "ema", "ema_rate"})

    type: Literal["simple"] = "simple"
    in_channels: int = Field(ge=1)
    out_ch: int = Field(ge=1)
    ch: int = Field(multiple_of=GROUPS, ge=GROUPS)
    ch_mult: list[int] = Field(min_length=1)
    num_res_blocks: int = Field(ge=1)
    attn_resolutions: list[int]
    resamp_with_conv: Literal[True] = True

    @property
    def channels(self) -> list[int]:
        """Of each level, the highest resolution first."""
        return [self.ch * factor for factor in self.ch_mult]

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        _check_first_level("ch_mult", self.ch_mult)
        if self.in_channels != self.out_ch:
            raise ValueError(f"out_ch {self.out_ch} must equal in_channels {self.in_channels}")
        return self


class DDPMData(Original):
    """``data`` of the DDIM code's configuration, of which only the resolution matters here."""

    training = frozenset(
        {
            "category",
            "dataset",
            "gaussian_dequantization",
            "logit_transform",
            "num_workers",
            "random_flip",
            "total_samples",
            "uniform_dequantization",
        }
    )

    image_size: int = Field(ge=1)
    channels: int = Field(3, ge=1)
    rescaled: Literal[True] = True


class DDPMDiffusion(Original):
    """``diffusion`` of the DDIM code's configuration; ``quad`` betas have evenly spaced roots."""

    beta_schedule: Literal["linear", "quad"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(2e-2, gt=0, lt=1)
    num_diffusion_timesteps: int = Field(1000, ge=1)


class DDPM(Original):
    """The DDIM code's configuration file."""

    training = frozenset({"training", "sampling", "optim"})

    model: DDPMModel
    data: DDPMData
    diffusion: DDPMDiffusion = DDPMDiffusion()

    def attended(self, level: int) -> bool:
        """Whether the resnets of ``level`` are followed by attention."""
        return self.data.image_size // 2**level in self.model.attn_resolutions

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        if self.data.channels != self.model.in_channels:
            channels = f"{self.data.channels} and in_channels {self.model.in_channels}"
            raise ValueError(f"data.channels {channels} must be equal")
        return self


Configuration = DDPM | LatentDiffusion
Kind = TypeVar("Kind", DDPM, LatentDiffusion)


def read_original(path: Path, kind: type[Kind]) -> Kind:
    """Read the YAML file that a checkpoint was published with.

    Raises ConfigError if it cannot be read or holds anything that is not supported, by name.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration {path}: cannot be read ({error})") from error
    if kind is LatentDiffusion:
        values = _latent_diffusion_params(path, values)
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path}: wanted a mapping, got {type(values).__name__}")
    return validated(kind, values, f"configuration {path}")


def _latent_diffusion_params(path: Path, values: Any) -> Any:
    """What is under ``model.params``; the rest of the file concerns data and training."""
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("params"), dict):
        raise ConfigError(f"configuration {path}: wanted the key model.params, as published")
    target = model.get("target", "LatentDiffusion")
    if not str(target).endswith("LatentDiffusion"):
        raise ConfigError(f"configuration {path}: wanted a LatentDiffusion model, got {target!r}")
    return model["params"]


def _check_first_level(name: str, factors: list[int]) -> None:
    if factors[0] != 1:
        raise ValueError(f"{name} must begin with 1 (the first convolution has those channels)")
    if min(factors) < 1:
        raise ValueError(f"{name} must be positive")
