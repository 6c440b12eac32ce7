"""Layers and attentions that compute with fake-quantized weights and activations.

A network keeps its modules; each Conv2d, Conv1d and Linear is wrapped in a :class:`QuantizedLayer`
and each attention gets a processor that quantizes the operands of its two matrix products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from iec_eval.clock import Clock
from iec_eval.efficiency.quantizer import SAMPLES, Grid, Search, fake_quantize, find_grid, levels

Mode = Literal["off", "observe", "on"]


@dataclass
class Switch:
    """What the activation quantizers of one network do: nothing, find their grids, or quantize."""

    mode: Mode = "off"


@dataclass(frozen=True)
class GridSearch:
    """How grids are found; the arguments of :func:`find_grid`."""

    search: Search = "mse"
    percentile: float = 99.0
    official: bool = False
    samples: int | None = SAMPLES

    def grid(self, rows: Tensor, bits: int) -> Grid:
        """The grid of ``rows [rows, n]``."""
        return find_grid(
            rows,
            bits,
            self.search,
            percentile=self.percentile,
            official=self.official,
            samples=self.samples,
        )


@dataclass
class GridSums:
    """Ranges that calibration batches gave to one quantizer at each step; summed, not kept."""

    low: Tensor
    high: Tensor
    batches: Tensor


TOGETHER = 2**28  # attention weights at once, a gigabyte


class ActivationQuantizer(nn.Module):
    """Quantizes an activation with the scale and zero point of the current sampler step.

    ``scale`` and ``zero_point`` are ``[total]``, or ``[total, C]`` for one grid per channel; the
    channels are in dimension ``channel_dim``.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        clock: Clock,
        switch: Switch,
        search: GridSearch,
        bits: int,
        *,
        channels: int | None = None,
        channel_dim: int = 1,
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.switch, self._clock, self._search = bits, switch, clock, search
        self._channels, self._channel_dim = channels, channel_dim
        shape = (clock.total,) if channels is None else (clock.total, channels)
        made = torch.ones(shape) if like is None else like.new_ones(shape)
        self.register_buffer("scale", made)
        self.register_buffer("zero_point", torch.zeros_like(made))
        self._sums: GridSums | None = None
        self._numbers: list[tuple[float, float, float]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid of this step; the same shape."""
        mode = self.switch.mode
        if mode == "off":
            return x
        if mode == "observe":
            return self._observe(x)
        if self.one_grid and not (torch.is_grad_enabled() or x.is_meta):
            scale, low, high = self._plain()[self._clock.step]
            return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)
        return fake_quantize(x, self._at(self.scale, x), self._at(self.zero_point, x), self.bits)

    @property
    def one_grid(self) -> bool:
        """Whether all values are on one grid now, that of the step that all rows are at."""
        return self._channels is None and self._clock.steps is None

    def set_grids(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take the grids of all steps."""
        self.scale, self.zero_point = scale.to(self.scale), zero_point.to(self.zero_point)
        self._numbers = None

    def found(self) -> Grid:
        """The grids that observing gave: the batches' ranges averaged (``max``: joined)."""
        sums = self._sums
        if sums is None:
            raise RuntimeError("this quantizer has not seen any activation")
        seen = torch.where(sums.batches > 0, sums.batches, 1).to(sums.low.dtype)
        weight = seen.view(-1, *[1] * (sums.low.dim() - 1))
        low, high = sums.low / weight, sums.high / weight
        scale = (high - low) / levels(self.bits)
        grid = Grid(scale, (-low / scale).round())
        self._fill_unseen(grid, sums.batches)
        self._sums = None
        return grid

    def _fill_unseen(self, grid: Grid, batches: Tensor) -> None:
        """A step that never ran this layer (a cached one, say) is given the last before that did.

        It may run there after all: a callback may ask for a full evaluation.
        """
        ran = (batches > 0).tolist()
        last = ran.index(True)
        for step, own in enumerate(ran):
            last = step if own else last
            for table in grid:
                table[step] = table[last]

    def _observe(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        grid = self._search.grid(rows, self.bits)
        self._note(grid)
        shape = [1] * x.dim()
        if self._channels is not None:
            shape[self._channel_dim] = self._channels
        return fake_quantize(x, grid.scale.view(shape), grid.zero_point.view(shape), self.bits)

    def _note(self, grid: Grid) -> None:
        if self._sums is None:
            empty = torch.zeros_like(self.scale, dtype=torch.float64)
            batches = torch.zeros(len(empty), dtype=torch.int64, device=empty.device)
            self._sums = GridSums(empty, empty.clone(), batches)
        sums, step = self._sums, self._clock.step
        scale, zero = grid.scale.double(), grid.zero_point.double()
        low, high = -zero * scale, (levels(self.bits) - zero) * scale
        low, high = low.view(sums.low[step].shape), high.view(sums.low[step].shape)
        if self._search.search == "max" and sums.batches[step] > 0:
            sums.low[step] = torch.minimum(sums.low[step], low)
            sums.high[step] = torch.maximum(sums.high[step], high)
            return
        sums.low[step] += low
        sums.high[step] += high
        sums.batches[step] += 1

    def _rows(self, x: Tensor) -> Tensor:
        if self._channels is None:
            return x.reshape(1, -1)
        return x.movedim(self._channel_dim, 0).reshape(self._channels, -1)

    def _at(self, table: Tensor, x: Tensor) -> Tensor:
        entry = self._clock.at(table, x)
        return entry if self._channels is None else entry.movedim(1, self._channel_dim)

    def _plain(self) -> list[tuple[float, float, float]]:
        """Scale and clipping limits of every step as numbers: no look-up on the device."""
        if self._numbers is None:
            zeros = self.zero_point.round()
            limits = zip(self.scale.tolist(), zeros.tolist(), strict=True)
            self._numbers = [(d, -z, levels(self.bits) - z) for d, z in limits]
        return self._numbers


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with quantized weights and inputs.

    The weights are quantized once, by :meth:`quantize_weights`. A layer over [h, skip] has two
    groups of input channels, each with grids of its own.

    Attributes:
        layer: the layer itself; its weight holds the quantized values.
        groups: the input channels of each group.
        inputs: the activation quantizer of each group.
        weight_bits: of every weight.
        grid: of the weights, ``[groups, O]`` each, once they are quantized.
        learned: what to compute with instead of the weights, while they are being learned.
        correction: computes the output in the layer's place, from the layer and its quantized
            input; None where nothing is corrected.
    """

    def __init__(
        self, layer: nn.Module, inputs: Sequence[ActivationQuantizer], bits: int, split: int | None
    ) -> None:
        super().__init__()
        self.layer, self.weight_bits = layer, bits
        self.inputs = nn.ModuleList(inputs)
        weight = self.weight
        edges = [0, weight.shape[1]] if split is None else [0, split, weight.shape[1]]
        self.groups = [slice(a, b) for a, b in pairwise(edges)]
        self.grid: Grid | None = None
        self.learned: LearnedWeights | None = None
        self.correction: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.layer.weight)

    @property
    def bits_per_mac(self) -> int:
        """Product of the operands' bits: bit operations of one multiply-accumulate."""
        return self.weight_bits * cast(ActivationQuantizer, self.inputs[0]).bits

    @property
    def stored_bytes(self) -> int:
        """Bytes of the layer at these bits: codes, grids of weights and inputs, bias in float."""
        weight, steps = self.weight, sum(q.scale.numel() for q in self.quantizers)
        grids = len(self.groups) * len(weight) + steps
        bias = cast(Tensor | None, self.layer.bias)
        tables = [] if self.correction is None else self.correction.buffers()
        floats = grids + (0 if bias is None else bias.numel()) + sum(t.numel() for t in tables)
        return -(-weight.numel() * self.weight_bits // 8) + 4 * floats + grids

    @property
    def quantizers(self) -> list[ActivationQuantizer]:
        return [cast(ActivationQuantizer, quantizer) for quantizer in self.inputs]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for its input quantized."""
        quantized = self.quantize_input(x)
        if self.correction is not None:
            return cast(Tensor, self.correction(self.layer, quantized))
        if self.learned is None:
            return cast(Tensor, self.layer(quantized))
        return cast(Tensor, functional_call(self.layer, self.learned.tensors(), (quantized,)))

    def quantize_input(self, x: Tensor) -> Tensor:
        """``x`` with each group of its channels on its own grid."""
        if len(self.groups) == 1:
            return cast(Tensor, self.inputs[0](x))
        parts = [q(x[:, g]) for q, g in zip(self.inputs, self.groups, strict=True)]
        return torch.cat(parts, dim=1)

    def find_weight_grids(self, search: GridSearch) -> Grid:
        """Scale and zero point of every output channel, ``[groups, O]`` each."""
        rows = [self.weight[:, group].flatten(1) for group in self.groups]
        grids = [replace(search, samples=None).grid(part, self.weight_bits) for part in rows]
        return Grid(*(torch.stack(found) for found in zip(*grids, strict=True)))

    def quantize_weights(self, grid: Grid) -> None:
        """Replace the weights by their values on ``grid``, ``[groups, O]`` each."""
        with torch.no_grad():
            parts = [
                fake_quantize(self.weight[:, g], d, z, self.weight_bits)
                for g, d, z in self.per_group(grid)
            ]
        self._set(torch.cat(parts, dim=1), grid)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The weights as whole numbers from 0 to 2^b - 1, in their shape."""
        assert self.grid is not None
        parts = [
            (self.weight[:, group] / scale).round() + zero.round()
            for group, scale, zero in self.per_group(self.grid)
        ]
        return torch.cat(parts, dim=1)

    def set_codes(self, codes: Tensor, grid: Grid, bias: Tensor | None = None) -> None:
        """Take the weights that ``codes`` stand for on ``grid``, and the bias if given."""
        values = codes.to(self.weight)
        parts = [(values[:, g] - z.round()) * d for g, d, z in self.per_group(grid)]
        self._set(torch.cat(parts, dim=1), grid)
        if bias is not None:
            self.layer.bias = nn.Parameter(bias.to(self.weight), requires_grad=False)

    def per_group(self, grid: Grid) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each group's channels with its scale and zero point, shaped to act on the weight."""
        shape = (-1, *[1] * (self.weight.dim() - 1))
        scales, zeros = grid.scale.to(self.weight), grid.zero_point.to(self.weight)
        for group, scale, zero in zip(self.groups, scales, zeros, strict=True):
            yield group, scale.view(shape), zero.view(shape)

    def _set(self, weight: Tensor, grid: Grid) -> None:
        self.layer.weight = nn.Parameter(weight, requires_grad=False)
        self.grid = Grid(grid.scale.to(weight), grid.zero_point.to(weight))


class LearnedWeights(ABC):
    """What a layer computes with while its weights are being learned."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The layer's parameters by name, as functions of what is learned."""


class QuantizedProduct(nn.Module):
    """A matrix product of two quantized operands."""

    def __init__(self, first: ActivationQuantizer, second: ActivationQuantizer) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def bits_per_mac(self) -> int:
        return self.first.bits * self.second.bits

    @property
    def acts_on_rows(self) -> bool:
        """Whether a row comes out the same, whichever others are there and however they order."""
        return self.first.one_grid and self.first.switch.mode != "observe"

    @property
    def stored_bytes(self) -> int:
        """Bytes of the grids: a float scale and a zero point of one byte."""
        return 5 * (self.first.scale.numel() + self.second.scale.numel())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``Q(a) @ Q(b)^T`` for ``a [..., n, d]`` and ``b [..., m, d]``."""
        return cast(Tensor, self.first(a) @ self.second(b).transpose(-1, -2))


class QuantizedAttention:
    """Attention processor (diffusers) with q, k, v and the softmax output quantized.

    The two products are modules of the attention, as ``quantized_scores`` and
    ``quantized_mixture``; diffusers wants the processor itself to be a plain callable.
    """

    def __init__(self, scores: QuantizedProduct, mixture: QuantizedProduct) -> None:
        self.scores, self.mixture = scores, mixture
        self._before: Any = None

    def place(self, attention: Any) -> None:
        """Make ``attention`` compute this way."""
        self._before = attention.processor
        attention.quantized_scores, attention.quantized_mixture = self.scores, self.mixture
        attention.set_processor(self)

    def remove(self, attention: Any) -> None:
        """Make ``attention`` compute as before :meth:`place`."""
        del attention.quantized_scores, attention.quantized_mixture
        attention.set_processor(self._before)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What ``AttnProcessor`` computes, ``[B, N, C]`` or ``[B, C, H, W]`` as given."""
        residual, tokens = hidden_states, _as_tokens(hidden_states)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = attn.to_q(tokens), attn.to_k(context), attn.to_v(context)
        mixed = self._mix(attn, q, k, v, attention_mask)
        output = attn.to_out[1](attn.to_out[0](mixed)).to(residual.dtype)
        if residual.dim() == 4:
            output = output.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            output = output + residual
        return cast(Tensor, output / attn.rescale_output_factor)

    def _mix(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(Q(q) Q(k)^T / sqrt(d)), quantized, times Q(v), over all heads.

        In parts of a batch where all of it would take much memory: fixed grids act on each row.
        """
        rows = max(1, TOGETHER // (attn.heads * q.shape[1] * k.shape[1]))
        if len(q) <= rows or mask is not None or not self.mixture.acts_on_rows:
            return self._mix_rows(attn, q, k, v, mask)
        parts = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
        return torch.cat([self._mix_rows(attn, *part, None) for part in parts])

    def _mix_rows(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (_split_heads(x, attn.heads) for x in (q, k, v))
        scores = self.scores(q, k) * attn.scale
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, k.shape[-2], len(q))
            scores = scores + mask.view(len(q), attn.heads, -1, mask.shape[-1])
        weights = scores.softmax(dim=-1)
        mixed = self.mixture(weights, v.transpose(-1, -2))
        return cast(Tensor, mixed.transpose(1, 2).flatten(2))


def _as_tokens(hidden: Tensor) -> Tensor:
    return hidden if hidden.dim() == 3 else hidden.flatten(2).transpose(1, 2)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)
