"""Weights whose rounding is learned (Nagel et al., "Up or Down?", ICML 2020).

    w_q = d (clamp(floor(w / d) + h(v) + z, 0, 2^b - 1) - z),
    h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)

with one v per weight, decided when the learning is over.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from iec_eval.efficiency.quantized_layers import LearnedWeights, QuantizedLayer
from iec_eval.efficiency.quantizer import Grid, clip, levels, round_through


class SoftRounding(LearnedWeights):
    """The weights of a layer with a learned rounding.

    Args:
        layer: the quantized layer; its grids are kept, zero points learned.
        weight: full-precision weights.
        bias: full-precision bias, or None.
        train_weights: whether weight and bias are learned too.
    """

    def __init__(
        self, layer: QuantizedLayer, weight: Tensor, bias: Tensor | None, *, train_weights: bool
    ) -> None:
        assert layer.grid is not None
        self._layer = layer
        self.zero_point = nn.Parameter(layer.grid.zero_point.clone().to(weight))
        self.scale = layer.grid.scale.to(weight)
        self.weight = nn.Parameter(weight.clone(), requires_grad=train_weights)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), train_weights)
        fraction = torch.cat([w / d - (w / d).floor() for w, d, _ in self._groups()], dim=1)
        self.rounding = nn.Parameter(inverse_rectified_sigmoid(fraction))

    def tensors(self) -> dict[str, Tensor]:
        parts, start = [], 0
        share = rectified_sigmoid(self.rounding)
        for weight, scale, zero in self._groups():
            h = share[:, start : start + weight.shape[1]]
            start += weight.shape[1]
            z, ratio = round_through(zero), weight / scale
            lower = ratio + (ratio.floor() - ratio).detach()
            codes = clip(lower + h + z, self._layer.weight_bits)
            parts.append((codes - z) * scale)
        return {"weight": torch.cat(parts, dim=1), **self._bias()}

    @torch.no_grad()
    def harden(self) -> tuple[Tensor, Grid]:
        """The codes with every rounding decided, and the grid they are on."""
        up, start, parts = (self.rounding >= 0), 0, []
        for weight, scale, zero in self._groups():
            part = up[:, start : start + weight.shape[1]]
            start += weight.shape[1]
            codes = (weight / scale).floor() + part + zero.round()
            parts.append(codes.clamp(0, levels(self._layer.weight_bits)))
        return torch.cat(parts, dim=1), Grid(self.scale, self.zero_point.detach().round())

    def undecided(self, sharpness: float) -> Tensor:
        """Sum of 1 - |2h - 1|^sharpness: zero when every rounding is 0 or 1."""
        share = rectified_sigmoid(self.rounding)
        return (1 - (2 * share - 1).abs().pow(sharpness)).sum()

    def _groups(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        grid = Grid(self.scale, self.zero_point)
        for group, scale, zero in self._layer.per_group(grid):
            yield self.weight[:, group], scale, zero

    def _bias(self) -> dict[str, Tensor]:
        return {} if self.bias is None else {"bias": self.bias}


def rectified_sigmoid(x: Tensor) -> Tensor:
    """h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)."""
    return torch.clamp(1.2 * torch.sigmoid(x) - 0.1, 0, 1)


def inverse_rectified_sigmoid(share: Tensor) -> Tensor:
    """The v with h(v) = share, for shares from 0 to 1."""
    return -torch.log(1.2 / (share + 0.1) - 1)
