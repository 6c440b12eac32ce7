"""Fake quantization: numbers on an affine grid of 2^b levels, kept as floats.

    Q(x) = d (clamp(round(x / d) + z, 0, 2^b - 1) - z)

with scale d and zero point z. Everything here is a function of tensors ``[rows, n]``: a row is
what one (d, z) serves, an output channel of a weight or a whole activation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Search = Literal["mse", "max", "percentile"]
DEBUG_BITS = 16
SHRINKS = tuple(round(1 - 0.02 * i, 2) for i in range(40))  # 1.00, 0.98, ..., 0.22
POWER = 2.4
SAMPLES = 4096
CELLS = 2**18  # candidates are scored in groups that need no more numbers than this at once


class Grid(NamedTuple):
    """Scale d > 0 and zero point z (a whole number), both ``[rows]``."""

    scale: Tensor
    zero_point: Tensor


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Q(x) of any shape, with scale and zero point broadcast over it.

    Rounding passes gradients straight through, so all three tensors may be trained.
    """
    if torch.is_grad_enabled():
        zero = round_through(zero_point)
        return (clip(round_through(x / scale) + zero, bits) - zero) * scale
    zero = zero_point.round()
    return torch.div(x, scale).round_().clamp_(-zero, levels(bits) - zero).mul_(scale)


def levels(bits: int) -> int:
    """The largest code, 2^b - 1."""
    return (1 << bits) - 1


def clip(codes: Tensor, bits: int) -> Tensor:
    """Codes clamped to 0 .. 2^b - 1, with a gradient inside that range, its ends included."""
    top = levels(bits)
    inside = (codes >= 0) & (codes <= top)
    return torch.where(inside, codes, codes.detach().clamp(0, top))


def round_through(x: Tensor) -> Tensor:
    """Round to the nearest integer; the gradient is that of the identity."""
    return x.round().detach() + (x - x.detach())


@torch.no_grad()
def find_grid(
    x: Tensor,
    bits: int,
    search: Search = "mse",
    *,
    percentile: float = 99.0,
    official: bool = False,
    samples: int | None = SAMPLES,
) -> Grid:
    """The grid for the rows of ``x [rows, n]``.

    Args:
        x: what will be quantized.
        bits: of the codes. With 16, for debugging, twice the range is spanned whatever the search:
            there are levels enough, and nothing near the range is clipped.
        search: ``max`` spans the whole range [min, max]; ``percentile`` the range between the
            percentiles ``100 - p`` and ``p``; ``mse`` the range [s min, s max] whose rounding
            error, the mean of |x - Q(x)|^2.4, is least among s = 1.00, 0.98, ..., 0.22.
        percentile: p.
        official: ranges as the released code takes them. There, a row whose values have one sign
            gets a range without zero (``mse``) or too short a one (``max``). Otherwise ranges
            always hold zero, so that zero points are codes.
        samples: score with at most so many values of a row, at fixed pseudo-random places; the
            minimum and maximum are always those of all values. None: with all of them.
    """
    low, high = _range(x)
    if bits >= DEBUG_BITS:
        return _grid(2 * low, 2 * high, bits)
    if search == "max":
        return _official_span(low, high, bits) if official else _grid(low, high, bits)
    drawn = _some(x, samples)
    if search == "percentile":
        share = percentile / 100
        limits = torch.quantile(drawn, drawn.new_tensor([1 - share, share]), dim=1)
        return _grid(limits[0], limits[1], bits)
    shrink = _best_shrink(drawn, low, high, bits)
    if official:
        return _official_shrunk(shrink, low, high, bits)
    return _grid(shrink * low, shrink * high, bits)


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row; for one row in the way that is fast on the CPU."""
    if len(x) > 1:
        return torch.aminmax(x, dim=1)
    low, high = torch.aminmax(x)
    return low[None], high[None]


def _grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """The grid that spans [low, high], stretched to hold zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _positive((high - low) / levels(bits))
    return Grid(scale, (-(low / scale).round()).clamp(0, levels(bits)))


def _official_span(low: Tensor, high: Tensor, bits: int) -> Grid:
    """``max`` as released: right when the range holds zero, too short a range otherwise."""
    scale = _positive((high - low) / levels(bits), high)
    return Grid(scale, (-low.clamp(max=0) / scale).round())


def _official_shrunk(shrink: Tensor, low: Tensor, high: Tensor, bits: int) -> Grid:
    """``mse`` as released: scored with a range that holds zero, returned with the bare one."""
    scale = _positive(shrink * (high - low) / levels(bits), high)
    constant = high == low
    return Grid(scale, torch.where(constant, 0.0, (-shrink * low / scale).round()))


def _positive(scale: Tensor, instead: Tensor | None = None) -> Tensor:
    """The scale, or for a constant row (scale 0) ``instead``, or 1: zero needs no scale."""
    if instead is not None:
        scale = torch.where(scale > 0, scale, instead)
    return torch.where(scale != 0, scale, torch.ones_like(scale))


def _best_shrink(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """For each row the s with the least error, the largest such s if several have it."""
    shrinks = x.new_tensor(SHRINKS)
    at_once = max(1, CELLS // max(1, x.numel()))
    scores = [_errors(x, s, low, high, bits) for s in shrinks.split(at_once)]
    return shrinks[torch.cat(scores).argmin(dim=0)]


def _errors(x: Tensor, shrinks: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Mean |x - Q_s(x)|^2.4, ``[shrinks, rows]``."""
    s = shrinks[:, None]
    scale, zero = _grid(s * low, s * high, bits)
    scale, zero = scale[..., None], zero[..., None]
    codes = torch.div(x, scale).round_()
    quantized = torch.clamp(codes, -zero, levels(bits) - zero, out=codes).mul_(scale)
    return quantized.sub_(x).abs_().pow_(POWER).mean(dim=-1)


def _some(x: Tensor, samples: int | None) -> Tensor:
    """At most ``samples`` columns of ``x``, the same ones every time."""
    if samples is None or x.shape[1] <= samples:
        return x
    return x[:, _places(x.shape[1], samples).to(x.device)]


@lru_cache(maxsize=256)
def _places(count: int, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(count, (samples,), generator=generator)
