"""Models from files in diffusers' layout: a U-Net with its schedule, condition and first stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from iec_eval.denoising import Condition
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.models.base import DiffusionModel, Prediction, to_uint8
from iec_eval.models.conditioning import Conditioner
from iec_eval.models.files import SCHEDULER, Kind, ModelFiles, fetch_files
from iec_eval.models.first_stage import FirstStage
from iec_eval.networks import build_network, load_strictly
from iec_eval.options import NOT_DECISIVE, BaseOptions
from iec_eval.schedule import NoiseSchedule

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
}

BETAS = ("beta_schedule", "beta_start", "beta_end")


class FolderOptions(BaseOptions):
    """Where a model's files are."""

    path: Annotated[str, NOT_DECISIVE] = Field(
        description="folder in diffusers' layout, or hub:owner/name[@revision] to download one"
    )
    weights: Annotated[Kind | None, NOT_DECISIVE] = Field(
        None, description="ema or raw: refuse a converted folder that holds the others"
    )


class FolderModel(DiffusionModel):
    """A U-Net from files, of one of the classes ``networks``, with what belongs to it.

    Args:
        options: the model's.
        files: where it is.
        conditioner: makes its conditioner from the files and the U-Net's configuration.
    """

    networks: ClassVar[tuple[str, ...]] = ("UNet2DModel", "FixedHeadsUNet2DModel")

    def __init__(
        self,
        options: BaseOptions,
        files: ModelFiles,
        conditioner: Callable[[ModelFiles, Mapping[str, Any]], Conditioner],
    ) -> None:
        super().__init__(options)
        self.files, self.config = files, files.config("unet")
        if self.config.get("_class_name") not in self.networks:
            raise Incompatible(
                f"model {files.spec}: wanted a {' or '.join(self.networks)}, got "
                f"{self.config.get('_class_name')}"
            )
        self.shape = _shape(files, self.config)
        self.schedule, self.prediction = _schedule(files)
        self.first_stage = FirstStage.of(files)
        self.conditioner = conditioner(files, self.config)

    def skeleton(self) -> nn.Module:
        return deepcopy(self._skeleton)

    def load(self) -> nn.Module:
        network = self._build()
        load_strictly(network, self.files.weights("unet"))
        return network.eval().requires_grad_(False)

    def identity(self) -> dict[str, str]:
        lists = self.conditioner.missing()
        if lists:
            raise ConfigError("; ".join(lists))
        return {**self.files.identity(self.components), **self.conditioner.identity()}

    def missing(self) -> list[str]:
        return [*self.files.missing(self.components), *self.conditioner.missing()]

    @classmethod
    def fetch(cls, options: BaseOptions) -> None:
        path = getattr(options, "path", None)
        if isinstance(path, str):
            fetch_files(path)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.conditioner.device = device

    @property
    def components(self) -> list[str]:
        """The parts whose files decide an image."""
        stages = [] if self.first_stage is None else [self.first_stage.component]
        return ["unet", SCHEDULER, *stages, *self.conditioner.components]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.shape if self.first_stage is None else self.first_stage.image_shape(self.shape)

    def condition(self, images: Sequence[int]) -> Condition:
        return self.conditioner.condition(images)

    def calibration_condition(self, images: Sequence[int]) -> Condition:
        return self.conditioner.calibration(images)

    def skeleton_condition(self) -> Condition:
        return self.conditioner.skeleton().to(torch.device("meta"))

    def captions(self, images: Sequence[int]) -> list[str] | None:
        return self.conditioner.captions(images)

    def decode(self, latents: Tensor) -> Tensor:
        return to_uint8(latents if self.first_stage is None else self.first_stage.decode(latents))

    @cached_property
    def _skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return self._build()

    def _build(self) -> nn.Module:
        try:
            return cast(nn.Module, build_network(self.config))
        except ConfigError as error:
            raise ConfigError(f"model {self.files.spec}: unet/config.json: {error}") from error


def _schedule(files: ModelFiles) -> tuple[NoiseSchedule, Prediction]:
    """The forward process that the scheduler's configuration describes, and what is predicted."""
    from diffusers import DDPMScheduler

    config = files.config(SCHEDULER)
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise Incompatible(f"model {files.spec}: prediction_type {kind!r}, wanted {known}")
    lacking = [key for key in BETAS if key not in config]
    if lacking and config.get("trained_betas") is None:
        raise ConfigError(
            f"model {files.spec}: scheduler/scheduler_config.json does not say "
            f"{', '.join(lacking)}: {config.get('_class_name')} describes no noise schedule of "
            "discrete timesteps, which this needs"
        )
    try:
        betas = DDPMScheduler.from_config(config).betas.double()
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model {files.spec}: scheduler/scheduler_config.json describes no noise schedule "
            f"({error})"
        ) from error
    abar = torch.cumprod(1 - betas, dim=0)
    if not bool(((abar > 0) & (abar <= 1)).all()):
        raise ConfigError(
            f"model {files.spec}: scheduler/scheduler_config.json has betas outside 0..1"
        )
    return NoiseSchedule(abar), PREDICTIONS[kind]


def _shape(files: ModelFiles, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of a sample, from the network's configuration."""
    channels, size = config.get("in_channels"), config.get("sample_size")
    sides = [size, size] if isinstance(size, int) else list(size or [])
    if not isinstance(channels, int) or len(sides) != 2:
        raise ConfigError(
            f"model {files.spec}: unet/config.json must say in_channels and sample_size, "
            f"got {channels!r} and {size!r}"
        )
    return channels, sides[0], sides[1]
