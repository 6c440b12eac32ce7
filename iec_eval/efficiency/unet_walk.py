"""Walk diffusers' U-Nets layer by layer instead of in one forward.

The decoder of a U-Net consumes, last in first out, exactly the hidden states its encoder pushed.
So the network is a list of encoder units (each pushes one) and as many decoder units (each takes
one), with the middle block between. Whatever runs a part of the network needs only this list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from iec_eval.errors import Incompatible

BLOCKS = frozenset(
    {
        "DownBlock2D",
        "AttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "ResnetDownsampleBlock2D",
        "UpBlock2D",
        "AttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D",
        "UNetMidBlock2D",
        "UNetMidBlock2DCrossAttn",
    }
)


@dataclass(frozen=True)
class Context:
    """What every layer is given beside the hidden state: time embedding and text states."""

    embedding: Tensor
    text: Tensor | None


@dataclass(frozen=True)
class EncoderUnit:
    """A resnet with its attention, or a downsampler; its output is pushed on the skip stack."""

    layer: nn.Module
    attention: nn.Module | None = None

    def __call__(self, hidden: Tensor, context: Context) -> Tensor:
        hidden = _run_layer(self.layer, hidden, context)
        return _attend(self.attention, hidden, context)


@dataclass(frozen=True)
class DecoderUnit:
    """A resnet on [hidden, skip] with its attention and, last in its block, the upsampler."""

    resnet: nn.Module
    attention: nn.Module | None
    upsamplers: Sequence[nn.Module]

    def __call__(
        self, hidden: Tensor, skip: Tensor, below: Tensor | None, context: Context
    ) -> Tensor:
        """``below`` is the skip that the next unit will take; it sets the size to upsample to."""
        hidden = self.resnet(torch.cat([hidden, skip], dim=1), context.embedding)
        hidden = _attend(self.attention, hidden, context)
        for upsampler in self.upsamplers:
            hidden = _upsample(upsampler, hidden, below, context)
        return hidden


class UNetWalk:
    """The parts of a UNet2DModel or UNet2DConditionModel, in the order they run.

    ``depth`` is the number of skip connections, which is the largest meaningful cut.

    Raises Incompatible for other networks and for block types whose order it does not know.
    """

    def __init__(self, network: nn.Module) -> None:
        if not isinstance(network, UNet2DModel | UNet2DConditionModel):
            raise Incompatible(
                f"caching needs diffusers' UNet2DModel or UNet2DConditionModel, "
                f"got {type(network).__name__}"
            )
        self.unet = cast(Any, network)
        self._check()
        self.encoder = [unit for block in self.unet.down_blocks for unit in _encoder_units(block)]
        self.decoder = [unit for block in self.unet.up_blocks for unit in _decoder_units(block)]
        self.depth = len(self.decoder)

    def begin(
        self, sample: Tensor, timestep: Tensor, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Context]:
        """Embed time and condition, and run the first convolution."""
        if self.unet.config.center_input_sample:
            sample = 2 * sample - 1.0
        if isinstance(self.unet, UNet2DConditionModel):
            context = _embed_conditional(self.unet, sample, timestep, **inputs)
        else:
            context = _embed_plain(self.unet, timestep, **inputs)
        return self.unet.conv_in(sample), context

    def middle(self, hidden: Tensor, context: Context) -> Tensor:
        """The block between encoder and decoder, if there is one."""
        block = self.unet.mid_block
        if block is None:
            return hidden
        if getattr(block, "has_cross_attention", False):
            return cast(
                Tensor, block(hidden, context.embedding, encoder_hidden_states=context.text)
            )
        return cast(Tensor, block(hidden, context.embedding))

    def decode(
        self, hidden: Tensor, skips: list[Tensor], context: Context, first: int, stop: int
    ) -> Tensor:
        """Run decoder units ``first`` to ``stop - 1``, taking their skips off the stack."""
        for unit in self.decoder[first:stop]:
            skip = skips.pop()
            hidden = unit(hidden, skip, skips[-1] if skips else None, context)
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """Norm, activation and the last convolution."""
        if self.unet.conv_norm_out is not None:
            hidden = self.unet.conv_act(self.unet.conv_norm_out(hidden))
        return cast(Tensor, self.unet.conv_out(hidden))

    def _check(self) -> None:
        blocks = [*self.unet.down_blocks, *self.unet.up_blocks]
        if self.unet.mid_block is not None:
            blocks.append(self.unet.mid_block)
        unknown = sorted({type(block).__name__ for block in blocks} - BLOCKS)
        if unknown:
            raise Incompatible(f"caching cannot walk blocks of type {', '.join(unknown)}")
        if getattr(self.unet.config, "time_embedding_type", "positional") == "fourier":
            raise Incompatible("caching cannot walk a U-Net with Fourier time embedding")
        if any(getattr(block, "s1", None) for block in self.unet.up_blocks):
            raise Incompatible("caching cannot walk a U-Net with FreeU enabled; disable it")


def find_unet(network: nn.Module) -> nn.Module | None:
    """The diffusers U-Net that ``network`` is or wraps, if any."""
    kinds = (UNet2DModel, UNet2DConditionModel)
    return next((module for module in network.modules() if isinstance(module, kinds)), None)


def core_of(network: nn.Module) -> nn.Module:
    """The U-Net inside what earlier methods made of it; a network without one, as a whole."""
    return find_unet(network) or network


def skip_splits(network: nn.Module) -> dict[str, int]:
    """Layers over [hidden, skip] with the number of hidden channels, by the layer's name.

    These are the first convolution and the shortcut of every decoder resnet. Empty for a network
    that is not a U-Net; raises Incompatible for a U-Net that cannot be walked.
    """
    if not isinstance(network, UNet2DModel | UNet2DConditionModel):
        return {}
    walk, splits = UNetWalk(network), dict[str, int]()
    names = {module: name for name, module in network.named_modules()}
    skips = [walk.unet.conv_in.out_channels, *map(_channels, walk.encoder)]
    for unit, skip in zip(walk.decoder, reversed(skips), strict=True):
        resnet = cast(Any, unit.resnet)
        for layer in ("conv1", "conv_shortcut"):
            if getattr(resnet, layer, None) is not None:
                splits[f"{names[resnet]}.{layer}"] = resnet.in_channels - skip
    return splits


def _channels(unit: EncoderUnit) -> int:
    return cast(int, cast(Any, unit.layer).out_channels)


def _encoder_units(block: nn.Module) -> list[EncoderUnit]:
    resnets, attentions = _resnets_and_attentions(block)
    units = [EncoderUnit(r, a) for r, a in zip(resnets, attentions, strict=True)]
    return units + [EncoderUnit(layer) for layer in getattr(block, "downsamplers", None) or []]


def _decoder_units(block: nn.Module) -> list[DecoderUnit]:
    resnets, attentions = _resnets_and_attentions(block)
    last = len(resnets) - 1
    upsamplers = list(getattr(block, "upsamplers", None) or [])
    return [
        DecoderUnit(r, a, upsamplers if i == last else [])
        for i, (r, a) in enumerate(zip(resnets, attentions, strict=True))
    ]


def _resnets_and_attentions(block: Any) -> tuple[list[nn.Module], list[nn.Module | None]]:
    resnets = list(block.resnets)
    attentions = getattr(block, "attentions", None)
    return resnets, list(attentions) if attentions is not None else [None] * len(resnets)


def _run_layer(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    if isinstance(layer, ResnetBlock2D):
        return cast(Tensor, layer(hidden, context.embedding))
    return cast(Tensor, layer(hidden))


def _attend(attention: nn.Module | None, hidden: Tensor, context: Context) -> Tensor:
    if attention is None:
        return hidden
    if isinstance(attention, Transformer2DModel):
        output = attention(hidden, encoder_hidden_states=context.text, return_dict=False)
        return cast(Tensor, output[0])
    return cast(Tensor, attention(hidden))


def _upsample(layer: nn.Module, hidden: Tensor, below: Tensor | None, context: Context) -> Tensor:
    if isinstance(layer, ResnetBlock2D):
        return cast(Tensor, layer(hidden, context.embedding))
    doubled = [2 * side for side in hidden.shape[-2:]]
    if below is None or list(below.shape[-2:]) == doubled:
        return cast(Tensor, layer(hidden))
    return cast(Tensor, layer(hidden, below.shape[-2:]))


def _embed_plain(unet: Any, timestep: Tensor, class_labels: Tensor | None = None) -> Context:
    embedding = unet.time_embedding(unet.time_proj(timestep).to(unet.dtype))
    if unet.class_embedding is not None:
        if unet.config.class_embed_type == "timestep":
            class_labels = unet.time_proj(class_labels)
        embedding = embedding + unet.class_embedding(class_labels).to(unet.dtype)
    return Context(embedding, None)


def _embed_conditional(
    unet: Any,
    sample: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Context:
    embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    classes = unet.get_class_embed(sample=sample, class_labels=class_labels)
    if classes is not None:
        joined = unet.config.class_embeddings_concat
        embedding = torch.cat([embedding, classes], -1) if joined else embedding + classes
    more = added_cond_kwargs or {}
    added = unet.get_aug_embed(
        emb=embedding, encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=more
    )
    embedding = embedding if added is None else embedding + added
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)
    text = unet.process_encoder_hidden_states(
        encoder_hidden_states=encoder_hidden_states, added_cond_kwargs=more
    )
    return Context(embedding, text)
