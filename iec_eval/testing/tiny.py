"""The tiny network that contracts are checked on."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from pydantic import Field
from torch import nn

from iec_eval.denoising import Condition
from iec_eval.models.base import DiffusionModel
from iec_eval.options import BaseOptions
from iec_eval.schedule import NoiseSchedule


class TinyOptions(BaseOptions):
    """Options of the tiny model."""

    seed: int = Field(0, ge=0, description="of the random weights")
    guidance: float = Field(2.0, ge=0, description="classifier-free guidance scale")
    double: bool = Field(
        False,
        description="compute in float64: there another batch does not flip a quantizer's rounding",
    )


class TinyModel(DiffusionModel):
    """A class-conditional UNet2DModel with random weights; or the UNet2DModel ``network``."""

    name = "tiny"
    Options = TinyOptions

    def __init__(
        self, options: TinyOptions | None = None, *, network: nn.Module | None = None
    ) -> None:
        chosen = options or TinyOptions()
        super().__init__(chosen)
        self._network = (_tiny_unet(chosen.seed) if network is None else network).eval()
        if chosen.double:
            _in_double_precision(self._network)
        self._guidance, config = chosen.guidance, self._config
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (config["in_channels"], height, width)
        self.schedule = NoiseSchedule.from_betas()

    def skeleton(self) -> nn.Module:
        return self.load().to("meta")

    def load(self) -> nn.Module:
        return deepcopy(self._network)

    def identity(self) -> dict[str, str]:
        return {"network": f"random weights {self.options.model_dump()}"}

    def condition(self, images: Sequence[int]) -> Condition:
        classes = self._config.get("num_class_embeds")
        if not classes:
            return Condition()
        labels = {"class_labels": torch.tensor([index % (classes - 1) for index in images])}
        nothing = {"class_labels": torch.full((len(images),), classes - 1)}
        return Condition(labels, nothing, self._guidance)

    @property
    def _config(self) -> Any:
        return self._network.config


def _in_double_precision(network: Any) -> None:
    """The first convolution takes the float32 noise, all that follows from it is float64."""
    network.double()
    network.conv_in.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))


def _tiny_unet(seed: int) -> Any:
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=5,
        )
