"""First stages: the autoencoder whose latents a latent diffusion model denoises.

Two kinds (Rombach et al., CVPR 2022): KL-regularised, and vector-quantized, whose decoder takes
each latent to the nearest entry of its codebook first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from iec_eval.errors import ConfigError
from iec_eval.models.files import ModelFiles
from iec_eval.networks import build_first_stage, load_strictly

KINDS = ("vae", "vqvae")
STABLE_DIFFUSION = 0.18215  # scaling_factor of diffusers' AutoencoderKL, where a folder has none
TOGETHER = 8  # images decoded at once: at 512 pixels each takes a gigabyte on the way


class FirstStage:
    """Decodes latents. Made from the configuration; weights are read when first needed.

    Attributes:
        component: the folder it is in, ``vae`` (KL) or ``vqvae``.
        scale: what latents were multiplied with for the diffusion model; some are learned, so it
            is known only where the files are.
    """

    def __init__(self, files: ModelFiles, component: str) -> None:
        self._files, self.component = files, component
        self._config = files.config(component)
        if files.present:
            self.scale = self._scale()
        self._network: Any = None

    @classmethod
    def of(cls, files: ModelFiles) -> FirstStage | None:
        """The first stage among ``files``, if there is one."""
        found = [component for component in KINDS if files.has(component)]
        return cls(files, found[0]) if found else None

    def image_shape(self, latent: Sequence[int]) -> tuple[int, int, int]:
        """Of an image ``(C, H, W)`` from a latent's shape ``(c, h, w)``."""
        factor = 2 ** (len(self._config["block_out_channels"]) - 1)
        channels = cast(int, self._config.get("out_channels", 3))
        return channels, factor * latent[1], factor * latent[2]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` from ``latents [B, c, h, w]``, about in [-1, 1], float32."""
        network = self._load().to(latents.device)
        parts = (latents.float() / self.scale).split(TOGETHER)
        return torch.cat([network.decode(part).sample for part in parts])

    def _scale(self) -> float:
        # folders saved before diffusers wrote the key down: what its class then has
        default = 1.0 if self.component == "vqvae" else STABLE_DIFFUSION
        scale = self._config.get("scaling_factor", default)
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ConfigError(
                f"model {self._files.spec}: {self.component}/config.json must say scaling_factor, "
                f"a positive number, got {scale!r}"
            )
        return float(scale)

    def _load(self) -> Any:
        if self._network is None:
            network = cast(nn.Module, build_first_stage(self._config))
            load_strictly(network, self._files.weights(self.component))
            self._network = network.eval().requires_grad_(False)
        return self._network
