"""Where each weight of a diffusers network is in the original network.

A key map is a dictionary from diffusers' name to an :class:`Origin`: the original's name and what
to take of that tensor. Names of layers that a network may lack (shortcuts between equal channels)
are in the map all the same; the network says which it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from iec_eval.conversion.original import DDPM, DDConfig, UNetParams

Take = Callable[[Tensor], Tensor]
KINDS = ("weight", "bias")
TRANSFORMER_LAYERS = (
    *(f"attn{n}.to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out.0")),
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
)


def whole(value: Tensor) -> Tensor:
    """The tensor as it is."""
    return value


def as_matrix(value: Tensor) -> Tensor:
    """A convolution over one pixel ``[out, in, 1, ...]`` as a linear layer ``[out, in]``.

    A bias ``[out]`` stays.
    """
    if value.dim() > 1 and value.shape[2:].numel() != 1:
        raise ValueError(f"wanted a convolution over one pixel, got {tuple(value.shape)}")
    return value.flatten(1) if value.dim() > 1 else value


def of_heads(value: Tensor, *, heads: int, part: int) -> Tensor:
    """Queries (``part`` 0), keys (1) or values (2) out of the rows of a joint projection.

    The original's rows are grouped by head, ``[q_1, k_1, v_1, q_2, ...]``; diffusers wants all
    heads' rows of one kind together.
    """
    rows = as_matrix(value)
    grouped = rows.reshape(heads, 3, -1, *rows.shape[1:])
    return grouped[:, part].flatten(0, 1)


@dataclass(frozen=True)
class Origin:
    """The original's name of a tensor, and what is taken of it."""

    name: str
    take: Take = whole


KeyMap = dict[str, Origin]
Pair = tuple[str, str]  # a layer in the original, the same in diffusers


def ddpm_unet_map(original: DDPM) -> KeyMap:
    """Of the DDIM code's U-Net to UNet2DModel."""
    levels, resnets = len(original.model.channels), original.model.num_res_blocks
    attended = [original.attended(level) for level in range(levels)]
    pairs = [
        ("temb.dense.0", "time_embedding.linear_1"),
        ("temb.dense.1", "time_embedding.linear_2"),
        *_ends("", "conv_norm_out"),
    ]
    found = _layers(pairs)
    for place in _pyramid("", "", levels, resnets, attended, down=True):
        found |= place
    for place in _pyramid("", "", levels, resnets + 1, attended, down=False):
        found |= place
    return found | _middle("", "mid_block")


def first_stage_map(config: DDConfig) -> KeyMap:
    """Of an autoencoder to AutoencoderKL or VQModel (whose codebook is the only difference)."""
    levels, resnets = len(config.channels), config.num_res_blocks
    plain = [False] * levels
    found = _layers([("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")])
    found |= _layers([("quantize.embedding", "quantize.embedding")])
    for half, down, count in (("encoder.", True, resnets), ("decoder.", False, resnets + 1)):
        found |= _layers(_ends(half, "conv_norm_out")) | _middle(half, f"{half}mid_block")
        for place in _pyramid(half, half, levels, count, plain, down=down):
            found |= place
    return found


def latent_unet_map(params: UNetParams) -> KeyMap:
    """Of latent diffusion's U-Net to UNet2DModel or UNet2DConditionModel."""
    found = _layers(
        [
            ("time_embed.0", "time_embedding.linear_1"),
            ("time_embed.2", "time_embedding.linear_2"),
            ("input_blocks.0.0", "conv_in"),
            ("out.0", "conv_norm_out"),
            ("out.2", "conv_out"),
        ]
    )
    for place in (*_latent_encoder(params), *_latent_decoder(params)):
        found |= place
    return found | _latent_middle(params)


def class_embedder_map() -> KeyMap:
    """Of latent diffusion's class embedder to the weight of an ``nn.Embedding``."""
    return {"weight": Origin("embedding.weight")}


def text_encoder_shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CLIPTextModel as transformers keeps them on disk.

    They are the original's names too. transformers 5 drops ``text_model.`` as it loads.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
        **_affine("final_layer_norm", (width,)),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        for part in ("q", "k", "v", "out"):
            found |= _affine(f"{layer}.self_attn.{part}_proj", (width, width))
        found |= _affine(f"{layer}.mlp.fc1", (inner, width))
        found |= _affine(f"{layer}.mlp.fc2", (width, inner))
        found |= _affine(f"{layer}.layer_norm1", (width,)) | _affine(
            f"{layer}.layer_norm2", (width,)
        )
    return {f"text_model.{name}": shape for name, shape in found.items()}


def _affine(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _layers(pairs: Sequence[Pair], take: Take = whole) -> KeyMap:
    """Weight and bias of layers."""
    return {f"{new}.{kind}": Origin(f"{old}.{kind}", take) for old, new in pairs for kind in KINDS}


# --- the DDPM's layout, which the first stages share -------------------------------------------


def _ends(prefix: str, norm: str) -> list[Pair]:
    names = (("conv_in", "conv_in"), ("norm_out", norm), ("conv_out", "conv_out"))
    return [(prefix + old, prefix + new) for old, new in names]


def _pyramid(
    old: str, new: str, levels: int, resnets: int, attended: Sequence[bool], *, down: bool
) -> Iterator[KeyMap]:
    """The levels of an encoder (``down``) or a decoder, whose blocks diffusers counts reversed."""
    way, sampler = ("down", "downsample") if down else ("up", "upsample")
    for level in range(levels):
        block = f"{new}{way}_blocks.{level if down else levels - 1 - level}"
        for index in range(resnets):
            place = f"{old}{way}.{level}"
            yield _resnet(f"{place}.block.{index}", f"{block}.resnets.{index}")
            if attended[level]:
                yield _attention(f"{place}.attn.{index}", f"{block}.attentions.{index}")
        yield _layers([(f"{old}{way}.{level}.{sampler}.conv", f"{block}.{sampler}rs.0.conv")])


def _middle(old: str, new: str) -> KeyMap:
    return (
        _resnet(f"{old}mid.block_1", f"{new}.resnets.0")
        | _attention(f"{old}mid.attn_1", f"{new}.attentions.0")
        | _resnet(f"{old}mid.block_2", f"{new}.resnets.1")
    )


def _resnet(old: str, new: str) -> KeyMap:
    same = [(f"{old}.{name}", f"{new}.{name}") for name in ("norm1", "conv1", "norm2", "conv2")]
    other = (("temb_proj", "time_emb_proj"), ("nin_shortcut", "conv_shortcut"))
    return _layers([*same, *((f"{old}.{a}", f"{new}.{b}") for a, b in other)])


def _attention(old: str, new: str) -> KeyMap:
    projections = [(f"{old}.{part}", f"{new}.to_{part}") for part in ("q", "k", "v")]
    projections.append((f"{old}.proj_out", f"{new}.to_out.0"))
    norm = _layers([(f"{old}.norm", f"{new}.group_norm")])
    return norm | _layers(projections, as_matrix)


# --- latent diffusion's U-Net ------------------------------------------------------------------


def _latent_encoder(params: UNetParams) -> Iterator[KeyMap]:
    """Input blocks, counted through: the first convolution, resnets, and a downsampler a level."""
    count, last = 1, len(params.channels) - 1
    for level, channels in enumerate(params.channels):
        block = f"down_blocks.{level}"
        for index in range(params.num_res_blocks):
            yield _latent_resnet(f"input_blocks.{count}.0", f"{block}.resnets.{index}")
            if params.attended(level):
                place = f"{block}.attentions.{index}"
                yield _latent_attention(f"input_blocks.{count}.1", place, params, channels)
            count += 1
        if level < last:
            yield _latent_sampler(f"input_blocks.{count}.0", f"{block}.downsamplers.0", "op")
            count += 1


def _latent_decoder(params: UNetParams) -> Iterator[KeyMap]:
    """Output blocks, counted through from the deepest level; an upsampler ends its block."""
    count, levels = 0, len(params.channels)
    for level in reversed(range(levels)):
        block = f"up_blocks.{levels - 1 - level}"
        attended = params.attended(level)
        for index in range(params.num_res_blocks + 1):
            place = f"output_blocks.{count}"
            yield _latent_resnet(f"{place}.0", f"{block}.resnets.{index}")
            if attended:
                target = f"{block}.attentions.{index}"
                yield _latent_attention(f"{place}.1", target, params, params.channels[level])
            if level > 0 and index == params.num_res_blocks:
                yield _latent_sampler(f"{place}.{1 + attended}", f"{block}.upsamplers.0", "conv")
            count += 1


def _latent_middle(params: UNetParams) -> KeyMap:
    channels = params.channels[-1]
    return (
        _latent_resnet("middle_block.0", "mid_block.resnets.0")
        | _latent_attention("middle_block.1", "mid_block.attentions.0", params, channels)
        | _latent_resnet("middle_block.2", "mid_block.resnets.1")
    )


def _latent_resnet(old: str, new: str) -> KeyMap:
    names = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    return _layers([(f"{old}.{a}", f"{new}.{b}") for a, b in names.items()])


def _latent_sampler(old: str, new: str, name: str) -> KeyMap:
    """A convolution called ``name``, or a resnet: the network has one of them."""
    return _layers([(f"{old}.{name}", f"{new}.conv")]) | _latent_resnet(old, new)


def _latent_attention(old: str, new: str, params: UNetParams, channels: int) -> KeyMap:
    if params.use_spatial_transformer:
        return _spatial_transformer(old, new, params.transformer_depth)
    heads = params.heads(channels)
    found = _layers([(f"{old}.norm", f"{new}.group_norm")])
    found |= _layers([(f"{old}.proj_out", f"{new}.to_out.0")], as_matrix)
    for part, name in enumerate("qkv"):
        take = partial(of_heads, heads=heads, part=part)
        found |= _layers([(f"{old}.qkv", f"{new}.to_{name}")], take)
    return found


def _spatial_transformer(old: str, new: str, depth: int) -> KeyMap:
    names = ["norm", "proj_in", "proj_out"]
    for index in range(depth):
        names += [f"transformer_blocks.{index}.{layer}" for layer in TRANSFORMER_LAYERS]
    return _layers([(f"{old}.{name}", f"{new}.{name}") for name in names])
