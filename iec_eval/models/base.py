"""What a diffusion model is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from iec_eval.denoising import Condition
from iec_eval.options import BaseOptions
from iec_eval.schedule import NoiseSchedule

Prediction = Literal["epsilon", "v", "sample", "flow"]


class DiffusionModel(ABC):
    """A network with everything around it: schedule, conditions, decoding.

    Construction reads configuration only, so that ``iec-eval show`` costs nothing; weights are
    read by :meth:`load`. Attributes:

        name: what studies call it.
        version: raise it when the same options and files would give other images than before.
        prediction: what the network predicts.
        shape: of one latent, ``(C, H, W)``.
        schedule: the forward process it was trained with.
        device: where encoders of conditions run.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BaseOptions]] = BaseOptions
    version: ClassVar[int] = 1
    prediction: Prediction = "epsilon"
    shape: tuple[int, int, int]
    schedule: NoiseSchedule
    device = torch.device("cpu")

    def __init__(self, options: BaseOptions) -> None:
        self.options = options

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The network on the meta device: its structure, without weights or memory."""

    @abstractmethod
    def load(self) -> nn.Module:
        """The network with its weights, in eval mode on the CPU.

        It is called ``network(sample, timestep, **inputs)``.

        Raises CorruptFile or ConfigError, naming the file, when the weights cannot be read.
        """

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """What makes this model this model: a hash for each of its files.

        It decides images beside the options; those that only say where files are should be marked
        NOT_DECISIVE, or a model that is moved is another.
        """

    def missing(self) -> list[str]:
        """What must be had before the model can run, one line each; then it can still be shown."""
        return []

    @classmethod  # noqa: B027 - most have nothing to get
    def fetch(cls, options: BaseOptions) -> None:
        """Download what the options name by an id, as far as it is not here; before construction.

        Raises ConfigError if it cannot be had.
        """

    def to(self, device: torch.device) -> None:
        """Run encoders of conditions on ``device``; :meth:`decode` follows its latents."""
        self.device = device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one decoded image, ``(C', H', W')``; the latent's unless there is a decoder."""
        return self.shape

    def condition(self, images: Sequence[int]) -> Condition:
        """Labels or prompts of these images, a function of the index alone."""
        return Condition()

    def calibration_condition(self, images: Sequence[int]) -> Condition:
        """Those of calibration images; where the first images are all alike, more varied ones."""
        return self.condition(images)

    def skeleton_condition(self) -> Condition:
        """The condition of one image on the meta device, to count an evaluation's cost with."""
        return self.condition([0]).to(torch.device("meta"))

    def captions(self, images: Sequence[int]) -> list[str] | None:
        """What these images were asked to show, in words, for metrics that compare with it.

        A function of the index alone, as :meth:`condition`; None where there is no text.
        """
        return None

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, H, W]`` to uint8 ``[B, C', H', W']``, from [-1, 1], round to nearest."""
        return to_uint8(latents)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, to uint8 0..255, rounded to nearest."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
