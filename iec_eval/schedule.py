"""The forward process: cumulative products of a discrete noise schedule (Ho et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear"]


@dataclass(frozen=True)
class NoiseSchedule:
    """``alphas_cumprod[t]`` for the training timesteps t = 0..N-1, float64.

    ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``.
    """

    alphas_cumprod: Tensor

    @classmethod
    def from_betas(
        cls,
        kind: BetaSchedule = "linear",
        start: float = 1e-4,
        end: float = 2e-2,
        timesteps: int = 1000,
    ) -> NoiseSchedule:
        """Betas evenly spaced (``linear``) or with evenly spaced roots (``scaled_linear``)."""
        if kind == "linear":
            betas = torch.linspace(start, end, timesteps, dtype=torch.float64)
        else:
            betas = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
        return cls(torch.cumprod(1 - betas, dim=0))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def abar(self, timestep: int) -> float:
        """The cumulative product at ``timestep``; 1 at -1, the finished image."""
        return 1.0 if timestep < 0 else float(self.alphas_cumprod[timestep])
