"""Which layers of a network are quantized: put in place, found again, taken out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from iec_eval.clock import Clock
from iec_eval.efficiency.quantized_layers import (
    ActivationQuantizer,
    GridSearch,
    QuantizedAttention,
    QuantizedLayer,
    QuantizedProduct,
    Switch,
)
from iec_eval.errors import Incompatible

LAYERS = (nn.Conv2d, nn.Conv1d, nn.Linear)


@dataclass(frozen=True)
class Bits:
    """Bits of weights, activations and softmax outputs; other ones for the layers in ``edges``."""

    weights: int = 8
    activations: int = 8
    softmax: int = 8
    edge: int = 8
    edges: frozenset[str] = frozenset()

    def of(self, name: str) -> tuple[int, int]:
        """Weight and activation bits of a layer."""
        if name not in self.edges:
            return self.weights, self.activations
        return max(self.edge, self.weights), max(self.edge, self.activations)


@dataclass
class QuantizedNetwork:
    """The quantized modules of a network, by name, in the order of its definition."""

    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    attentions: dict[str, QuantizedAttention] = field(default_factory=dict)
    switch: Switch = field(default_factory=Switch)

    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """Every activation quantizer by name."""
        named = {}
        for name, layer in self.layers.items():
            for i, quantizer in enumerate(layer.quantizers):
                named[f"{name}.input{i}" if i else f"{name}.input"] = quantizer
        for name, attention in self.attentions.items():
            named[f"{name}.q"] = attention.scores.first
            named[f"{name}.k"] = attention.scores.second
            named[f"{name}.softmax"] = attention.mixture.first
            named[f"{name}.v"] = attention.mixture.second
        return named

    def remove(self, core: nn.Module) -> None:
        """Take the quantized modules out of ``core`` again."""
        for name, layer in self.layers.items():
            _replace(core, name, layer.layer)
        for name, attention in self.attentions.items():
            attention.remove(core.get_submodule(name))


def find_quantized(core: nn.Module) -> QuantizedNetwork:
    """The quantized modules that are in place; none if ``core`` is not quantized."""
    found = QuantizedNetwork()
    for name, module in core.named_modules():
        if isinstance(module, QuantizedLayer):
            found.layers[name] = module
            found.switch = module.quantizers[0].switch
        elif isinstance(processor := getattr(module, "processor", None), QuantizedAttention):
            found.attentions[name] = processor
    return found


def insert_quantizers(
    core: nn.Module,
    clock: Clock,
    bits: Bits,
    search: GridSearch,
    *,
    splits: Mapping[str, int],
    per_channel: bool = False,
) -> QuantizedNetwork:
    """Wrap every layer and attention of ``core``; weights stay as they are, quantizers are off.

    Args:
        core: a network of Conv2d, Conv1d, Linear and diffusers' attention.
        clock: says which step's grids hold.
        bits: of each operand.
        search: how activation quantizers find their grids.
        splits: layers with two groups of input channels, and where the second begins.
        per_channel: one activation grid per input channel instead of one per tensor.

    Call :func:`check_quantizable` first.
    """
    made = QuantizedNetwork()

    def quantizer(like: Tensor, width: int, channels: int | None, dim: int) -> ActivationQuantizer:
        return ActivationQuantizer(
            clock, made.switch, search, width, channels=channels, channel_dim=dim, like=like
        )

    for name, layer in list(core.named_modules()):
        if isinstance(layer, Attention):
            made.attentions[name] = _attention(quantizer, bits, next(layer.parameters()))
        elif isinstance(layer, LAYERS):
            made.layers[name] = _layer(
                quantizer, layer, bits.of(name), splits.get(name), per_channel
            )
    for name, wrapped in made.layers.items():
        _replace(core, name, wrapped)
    for name, attention in made.attentions.items():
        attention.place(core.get_submodule(name))
    return made


def _layer(
    quantizer: Any,
    layer: nn.Module,
    bits: tuple[int, int],
    split: int | None,
    per_channel: bool,
) -> QuantizedLayer:
    weight = cast(Tensor, layer.weight)
    dim = -1 if isinstance(layer, nn.Linear) else 1
    width = weight.shape[1] * cast(int, getattr(layer, "groups", 1))
    widths = [width] if split is None else [split, width - split]
    inputs = [quantizer(weight, bits[1], w if per_channel else None, dim) for w in widths]
    return QuantizedLayer(layer, inputs, bits[0], split)


def _attention(quantizer: Any, bits: Bits, like: Tensor) -> QuantizedAttention:
    q, k, v = (quantizer(like, bits.activations, None, 1) for _ in range(3))
    softmax = quantizer(like, bits.softmax, None, 1)
    return QuantizedAttention(QuantizedProduct(q, k), QuantizedProduct(softmax, v))


def check_quantizable(core: nn.Module) -> None:
    """Raise Incompatible, with the reason, for a network that cannot be quantized here.

    There may be nothing to quantize, it may be quantized already, or an attention may compute
    with its weights in an unknown way.
    """
    modules = dict(core.named_modules())
    if any(isinstance(module, QuantizedLayer) for module in modules.values()):
        raise Incompatible("the network is quantized already")
    if not any(isinstance(module, LAYERS) for module in modules.values()):
        raise Incompatible(
            f"nothing to quantize: {type(core).__name__} has no Conv2d, Conv1d or Linear layer"
        )
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            raise Incompatible(f"{name}: torch's MultiheadAttention cannot be quantized here")
        if isinstance(module, Attention):
            _check_attention(name, module)


def _check_attention(name: str, attention: Any) -> None:
    if type(attention.processor) not in (AttnProcessor, AttnProcessor2_0):
        kind = type(attention.processor).__name__
        raise Incompatible(f"{name}: attention with the processor {kind} cannot be quantized")
    extras = ("spatial_norm", "norm_q", "norm_k", "add_k_proj", "add_q_proj")
    found = [extra for extra in extras if getattr(attention, extra, None) is not None]
    if found:
        raise Incompatible(f"{name}: attention with {', '.join(found)} cannot be quantized")


def _replace(core: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(core.get_submodule(parent), last, module)
