"""Pixel-space diffusion models: a folder in diffusers' layout with a UNet2DModel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from iec_eval.denoising import Condition
from iec_eval.embedded import FASHION_MNIST, FASHION_MNIST_UNCONDITIONAL
from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.models.base import DiffusionModel, Prediction
from iec_eval.options import BaseOptions
from iec_eval.schedule import NoiseSchedule
from iec_eval.storage import load_weights, sha256

NETWORK_CONFIG = "unet/config.json"
NETWORK_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
}


class LabelOptions(BaseOptions):
    """How class-conditional models are told their class."""

    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance scale; 1 is none, at single cost"
    )
    label: int | None = Field(
        None, ge=0, description="one class for every image; null: image i has class i mod classes"
    )


class UNetOptions(LabelOptions):
    """Options of a model from a folder."""

    path: str = Field(description="folder with unet/ and scheduler/, as diffusers saves them")
    unconditional_class: int | None = Field(
        None, ge=0, description="the class that means 'no label', if the network has one"
    )


class FolderModel(DiffusionModel):
    """A UNet2DModel from ``folder``, unconditional or class-conditional."""

    options: LabelOptions

    def __init__(
        self, options: LabelOptions, folder: Path, unconditional_class: int | None
    ) -> None:
        super().__init__(options)
        self.folder, self.unconditional_class = folder, unconditional_class
        config = _read_json(self.folder / NETWORK_CONFIG)
        if config.get("_class_name") != "UNet2DModel":
            raise Incompatible(
                f"model {self.folder}: wanted a UNet2DModel, got {config.get('_class_name')}"
            )
        self.config = config
        self.shape = _shape(self.folder, config)
        self._read_schedule()
        self._check_labels()

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            network: nn.Module = self._build()
        return network

    def load(self) -> nn.Module:
        network: nn.Module = self._build()
        load_strictly(network, self.folder / NETWORK_WEIGHTS)
        return network.eval().requires_grad_(False)

    def identity(self) -> dict[str, str]:
        files = (NETWORK_CONFIG, NETWORK_WEIGHTS, SCHEDULER_CONFIG)
        missing = [name for name in files if not (self.folder / name).is_file()]
        if missing:
            raise ConfigError(f"model {self.folder}: {', '.join(missing)} not found there")
        return {name: sha256(self.folder / name) for name in files}

    def condition(self, images: Sequence[int]) -> Condition:
        classes = self.classes
        if classes == 0:
            return Condition()
        fixed = self.options.label
        labels = [index % classes if fixed is None else fixed for index in images]
        inputs = {"class_labels": torch.tensor(labels)}
        if self.options.guidance == 1.0:
            return Condition(inputs)
        assert self.unconditional_class is not None  # checked at construction
        nothing = torch.full((len(images),), self.unconditional_class)
        return Condition(inputs, {"class_labels": nothing}, self.options.guidance)

    @property
    def classes(self) -> int:
        """Number of real classes, 0 for an unconditional network."""
        embedded = self.config.get("num_class_embeds") or 0
        return embedded - (self.unconditional_class is not None) if embedded else 0

    def _build(self) -> Any:
        from diffusers import UNet2DModel

        try:
            return UNet2DModel.from_config(self.config)
        except Exception as error:  # diffusers checks some values, others fail anywhere
            raise ConfigError(
                f"model {self.folder}: {NETWORK_CONFIG} describes no UNet2DModel ({error})"
            ) from error

    def _read_schedule(self) -> None:
        from diffusers import DDPMScheduler

        config = _read_json(self.folder / SCHEDULER_CONFIG)
        kind = config.get("prediction_type", "epsilon")
        if kind not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise Incompatible(f"model {self.folder}: prediction_type {kind!r}, wanted {known}")
        try:
            betas = DDPMScheduler.from_config(config).betas.double()
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ConfigError(
                f"model {self.folder}: {SCHEDULER_CONFIG} describes no noise schedule ({error})"
            ) from error
        self.schedule = NoiseSchedule(torch.cumprod(1 - betas, dim=0))
        self.prediction = PREDICTIONS[kind]

    def _check_labels(self) -> None:
        options = self.options
        if options.guidance != 1.0 and (self.classes == 0 or self.unconditional_class is None):
            raise Incompatible(
                f"model {self.folder}: guidance needs a class-conditional network and "
                "unconditional_class, the class it was trained to take for 'no label'"
            )
        if options.label is not None and options.label >= self.classes:
            raise ConfigError(f"label {options.label}: the model has {self.classes} classes")


class UNet(FolderModel):
    """A UNet2DModel from a folder in diffusers' layout, unconditional or class-conditional."""

    name = "unet"
    Options = UNetOptions

    def __init__(self, options: UNetOptions) -> None:
        super().__init__(options, Path(options.path), options.unconditional_class)


class FashionMNIST(FolderModel):
    """The packaged model: a class-conditional DDPM on 16x16 Fashion-MNIST, see its data card."""

    name = "fashion-mnist"
    Options = LabelOptions

    def __init__(self, options: LabelOptions) -> None:
        super().__init__(options, FASHION_MNIST, FASHION_MNIST_UNCONDITIONAL)


def load_strictly(network: nn.Module, path: Path) -> None:
    """Load weights that must fit exactly.

    Raises CorruptFile naming the file, the key, the wanted shape and the one found.
    """
    found = load_weights(path)
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for key, shape in wanted.items():
        if key not in found:
            raise CorruptFile(f"weights {path}: key {key!r} is missing, wanted shape {shape}")
        if tuple(found[key].shape) != shape:
            raise CorruptFile(
                f"weights {path}: key {key!r} has shape {tuple(found[key].shape)}, wanted {shape}"
            )
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        raise CorruptFile(f"weights {path}: unknown keys {unknown[:3]}, {len(unknown)} in all")
    network.load_state_dict(found)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"model: {path} not found; wanted a folder with unet/ and scheduler/")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFile(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CorruptFile(f"{path}: wanted a JSON object, got {type(values).__name__}")
    return values


def _shape(folder: Path, config: dict[str, Any]) -> tuple[int, int, int]:
    """Of a sample, from the network's configuration."""
    channels, size = config.get("in_channels"), config.get("sample_size")
    sides = [size, size] if isinstance(size, int) else list(size or [])
    if not isinstance(channels, int) or len(sides) != 2:
        raise ConfigError(
            f"model {folder}: {NETWORK_CONFIG} must say in_channels and sample_size, "
            f"got {channels!r} and {size!r}"
        )
    return channels, sides[0], sides[1]
