"""Latent diffusion models (Rombach et al., CVPR 2022): a U-Net on the latents of a first stage."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from iec_eval.conversion.families import FAMILIES
from iec_eval.errors import Incompatible
from iec_eval.models.conditioning import (
    ClassEmbedding,
    Conditioner,
    Guidance,
    LabelOptions,
    PromptOptions,
    TextEncoding,
    Unconditional,
)
from iec_eval.models.files import ModelFiles
from iec_eval.models.folder import FolderModel, FolderOptions

LABELS = ("label", "labels")
UNCONDITIONAL: tuple[str, ...] = ("UNet2DModel", "FixedHeadsUNet2DModel")
PROMPTS = ("prompt", "prompts", "negative_prompt")


class LatentOptions(FolderOptions, PromptOptions, LabelOptions):
    """Options of a latent model; those of its condition are labels or prompts."""


class LatentModel(FolderModel):
    """A U-Net on latents; the condition is what the folder has an embedder or encoder for."""

    networks: ClassVar[tuple[str, ...]] = (*UNCONDITIONAL, "UNet2DConditionModel")

    def __init__(
        self, options: FolderOptions, files: ModelFiles, condition: LatentOptions | None = None
    ) -> None:
        super().__init__(options, files, partial(_conditioner, condition))
        if self.first_stage is None:
            raise Incompatible(
                f"model {files.spec}: has no first stage (vae/ or vqvae/) that would decode its "
                "latents; use the model unet"
            )


class LatentDiffusion(LatentModel):
    """Any latent diffusion model from a folder: unconditional, by class or by text."""

    name = "latent-diffusion"
    Options = LatentOptions

    def __init__(self, options: LatentOptions) -> None:
        super().__init__(options, ModelFiles(options.path, kind=options.weights), options)


class LSUNChurches(LatentModel):
    """LDM-8 on 256x256 LSUN-Churches: KL first stage, 8 attention heads at every level."""

    name = "ldm-lsun-churches"
    networks = UNCONDITIONAL
    Options = FolderOptions

    def __init__(self, options: FolderOptions) -> None:
        super().__init__(options, _published(self.name, options))


class LSUNBedrooms(LatentModel):
    """LDM-4 on 256x256 LSUN-Bedrooms: vector-quantized first stage."""

    name = "ldm-lsun-bedrooms"
    networks = UNCONDITIONAL
    Options = FolderOptions

    def __init__(self, options: FolderOptions) -> None:
        super().__init__(options, _published(self.name, options))


class ImageNetOptions(FolderOptions, LabelOptions):
    """Options of the class-conditional ImageNet model."""

    guidance: Guidance = 1.5


class ImageNet(LatentModel):
    """LDM-4 on 256x256 ImageNet (cin256-v2), class-conditional; class 1000 means none."""

    name = "ldm-imagenet"
    Options = ImageNetOptions

    def __init__(self, options: ImageNetOptions) -> None:
        chosen = LatentOptions(**options.model_dump())
        super().__init__(options, _published(self.name, options), chosen)


class StableDiffusionOptions(FolderOptions, PromptOptions):
    """Options of Stable Diffusion."""

    guidance: Guidance = 7.5


class StableDiffusion(LatentModel):
    """Stable Diffusion 1.x, 512x512, text-conditional."""

    name = "stable-diffusion-v1"
    Options = StableDiffusionOptions

    def __init__(self, options: StableDiffusionOptions) -> None:
        chosen = LatentOptions(**options.model_dump())
        super().__init__(options, _published(self.name, options), chosen)


def _published(name: str, options: FolderOptions) -> ModelFiles:
    """The files of a published model, whose structure is known without them."""
    return ModelFiles(options.path, FAMILIES[name].layout(), options.weights)


def _conditioner(
    options: LatentOptions | None, files: ModelFiles, config: Mapping[str, Any]
) -> Conditioner:
    if options is None:
        return Unconditional()
    if files.has("class_embedder"):
        _refuse(options, PROMPTS, files, "is told classes")
        return ClassEmbedding(options, files)
    if files.has("text_encoder"):
        _refuse(options, LABELS, files, "is told texts")
        return TextEncoding(options, files)
    if config.get("_class_name") == "UNet2DConditionModel":
        raise Incompatible(
            f"model {files.spec}: its network reads a condition, and there is neither "
            "class_embedder/ nor text_encoder/ with tokenizer/"
        )
    _refuse(options, (*PROMPTS, *LABELS, "guidance"), files, "is unconditional")
    return Unconditional()


def _refuse(options: LatentOptions, names: tuple[str, ...], files: ModelFiles, reason: str) -> None:
    """Raise Incompatible for an option that would have no effect."""
    fields = LatentOptions.model_fields
    given = [name for name in names if getattr(options, name) != fields[name].default]
    if given:
        raise Incompatible(
            f"model {files.spec}: {reason}, so {', '.join(given)} would have no effect; leave it "
            "out"
        )


MODELS: tuple[type[LatentModel], ...] = (
    LatentDiffusion,
    LSUNChurches,
    LSUNBedrooms,
    ImageNet,
    StableDiffusion,
)
