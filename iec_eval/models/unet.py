"""Pixel-space diffusion models: a UNet2DModel, unconditional or class-conditional."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from pydantic import Field

from iec_eval.conversion.families import FAMILIES
from iec_eval.embedded import FASHION_MNIST, FASHION_MNIST_UNCONDITIONAL
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.models.conditioning import (
    Classes,
    Conditioner,
    LabelInput,
    LabelOptions,
    Unconditional,
)
from iec_eval.models.files import ModelFiles
from iec_eval.models.folder import FolderModel, FolderOptions


class UNetOptions(FolderOptions, LabelOptions):
    """Options of a model from a folder."""

    unconditional_class: int | None = Field(
        None, ge=0, description="the class that means 'no label', if the network has one"
    )


class PixelModel(FolderModel):
    """A UNet2DModel whose samples are images."""

    def __init__(self, options: LabelOptions, files: ModelFiles, none: int | None) -> None:
        super().__init__(options, files, partial(_labels, options, none))
        if self.first_stage is not None:
            raise Incompatible(
                f"model {files.spec}: has a first stage ({self.first_stage.component}/), so its "
                "samples are latents; use the model latent-diffusion"
            )

    @property
    def classes(self) -> int:
        """Number of real classes, 0 for an unconditional network."""
        return self.conditioner.classes if isinstance(self.conditioner, Classes) else 0


class UNet(PixelModel):
    """A UNet2DModel from a folder in diffusers' layout, unconditional or class-conditional."""

    name = "unet"
    Options = UNetOptions

    def __init__(self, options: UNetOptions) -> None:
        files = ModelFiles(options.path, kind=options.weights)
        super().__init__(options, files, options.unconditional_class)


class FashionMNIST(PixelModel):
    """The packaged model: a class-conditional DDPM on 16x16 Fashion-MNIST, see its data card."""

    name = "fashion-mnist"
    Options = LabelOptions

    def __init__(self, options: LabelOptions) -> None:
        super().__init__(options, ModelFiles(str(FASHION_MNIST)), FASHION_MNIST_UNCONDITIONAL)


class CIFAR10(PixelModel):
    """The DDPM of Ho et al. 2020 on 32x32 CIFAR-10, 35.7 million parameters."""

    name = "ddpm-cifar10"
    Options = FolderOptions

    def __init__(self, options: FolderOptions) -> None:
        files = ModelFiles(options.path, FAMILIES[self.name].layout(), options.weights)
        super().__init__(LabelOptions(), files, None)
        self.options = options


def _labels(
    options: LabelOptions, none: int | None, files: ModelFiles, config: Mapping[str, Any]
) -> Conditioner:
    """For a class-conditional network its classes, of which ``none`` is not a real one."""
    embedded = cast(int, config.get("num_class_embeds") or 0)
    classes = embedded - (none is not None) if embedded else 0
    conditioner = LabelInput(options, classes, none if embedded else None, files.spec)
    if embedded == 0 and (options.labels is not None or none is not None):
        raise Incompatible(
            f"model {files.spec}: its network knows no classes, so labels and unconditional_class "
            "would have no effect; leave them out"
        )
    if none is not None and none != classes:
        raise ConfigError(
            f"model {files.spec}: unconditional_class must be the last of the network's {embedded} "
            f"classes, {classes}, got {none}"
        )
    return conditioner if embedded else Unconditional()


MODELS: tuple[type[PixelModel], ...] = (UNet, FashionMNIST, CIFAR10)
