"""Networks built from configurations as diffusers writes them, and their weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.storage import load_weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

FIXED_HEADS = "FixedHeadsUNet2DModel"
HEADS = "num_attention_heads"
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"(.*\.attentions\.\d+)\.({'|'.join(ATTENTION)})\.(weight|bias)")
EMA_BOOKKEEPING = frozenset(  # diffusers' EMAModel leaves these in the files it saves
    {
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    }
)


def build_network(config: Mapping[str, Any]) -> UNet2DModel | UNet2DConditionModel:
    """The U-Net that ``config`` describes, by its ``_class_name``; weights are random.

    Besides diffusers' ``UNet2DModel`` and ``UNet2DConditionModel`` there is
    ``FixedHeadsUNet2DModel``: a ``UNet2DModel`` with ``num_attention_heads`` heads at every
    attention, whatever its channels. diffusers can only fix the channels of a head. Works under
    ``torch.device("meta")``.

    Raises ConfigError for another class, for keys nobody knows, and for values that fit no network.
    """
    import diffusers

    name = config.get("_class_name")
    if name == "UNet2DConditionModel":
        return cast("UNet2DConditionModel", _build(diffusers.UNet2DConditionModel, config))
    if name not in ("UNet2DModel", FIXED_HEADS):
        wanted = f"UNet2DModel, UNet2DConditionModel or {FIXED_HEADS}"
        raise ConfigError(f"network configuration: wanted _class_name {wanted}, got {name!r}")
    heads = config.get(HEADS)
    if heads is None and name == FIXED_HEADS:
        raise ConfigError(f"network configuration: {FIXED_HEADS} needs {HEADS}, a whole number")
    plain = {key: value for key, value in config.items() if key != HEADS}
    if heads is None:
        return cast("UNet2DModel", _build(diffusers.UNet2DModel, plain))
    network = _build(diffusers.UNet2DModel, {**plain, "attention_head_dim": None})
    _fix_heads(network, heads)
    return cast("UNet2DModel", network)


def build_first_stage(config: Mapping[str, Any]) -> AutoencoderKL | VQModel:
    """The autoencoder that ``config`` describes, by its ``_class_name``; weights are random.

    Works under ``torch.device("meta")``. Raises ConfigError as :func:`build_network` does.
    """
    import diffusers

    name = config.get("_class_name")
    if name == "AutoencoderKL":
        return cast("AutoencoderKL", _build(diffusers.AutoencoderKL, config))
    if name == "VQModel":
        return cast("VQModel", _build(diffusers.VQModel, config))
    raise ConfigError(
        f"first-stage configuration: wanted _class_name AutoencoderKL or VQModel, got {name!r}"
    )


def _build(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    known = inspect.signature(cls.__init__).parameters.keys() | EMA_BOOKKEEPING
    unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
    if unknown:
        raise ConfigError(
            f"configuration of {cls.__name__}: unknown keys {', '.join(unknown)}; they may change "
            "what it computes, so the installed diffusers must know them"
        )
    plain = {key: value for key, value in config.items() if key not in EMA_BOOKKEEPING}
    try:
        return cast(nn.Module, cls.from_config({**plain, "_class_name": cls.__name__}))
    except Exception as error:  # diffusers checks some values, others fail anywhere
        raise ConfigError(f"configuration describes no {cls.__name__} ({error})") from error


def _fix_heads(network: nn.Module, heads: Any) -> None:
    """Attend with ``heads`` heads everywhere; the weights' shapes do not depend on it."""
    from diffusers.models.attention_processor import Attention

    for name, module in network.named_modules():
        if not isinstance(module, Attention):
            continue
        attention = cast(Any, module)
        if not isinstance(heads, int) or heads < 1 or attention.inner_dim % heads:
            raise ConfigError(
                f"network configuration: {HEADS} {heads!r} does not divide the "
                f"{attention.inner_dim} channels of {name}"
            )
        attention.heads = attention.sliceable_head_dim = heads
        attention.scale = (attention.inner_dim // heads) ** -0.5


def _renamed(found: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Weights whose attention has the names that it had once, under those that it has now."""
    names = {}
    for key in found:
        old = _OLD_ATTENTION.fullmatch(key)
        new = f"{old[1]}.{ATTENTION[old[2]]}.{old[3]}" if old else key
        names[key] = new if new in wanted and new not in found else key
    return {names[key]: value for key, value in found.items()}


def load_strictly(network: nn.Module, path: Path) -> None:
    """Load weights that must fit exactly, names of attention from before diffusers 0.15 included.

    Raises CorruptFile naming the file, the key, the wanted shape and the one found.
    """
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = _renamed(load_weights(path), wanted)
    for key, shape in wanted.items():
        if key not in found:
            raise CorruptFile(f"weights {path}: key {key!r} is missing, wanted shape {shape}")
        if tuple(found[key].shape) != shape:
            raise CorruptFile(
                f"weights {path}: key {key!r} has shape {tuple(found[key].shape)}, wanted {shape}"
            )
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        raise CorruptFile(f"weights {path}: unknown keys {unknown[:3]}, {len(unknown)} in all")
    network.load_state_dict(found)
