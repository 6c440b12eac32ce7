"""Read original checkpoints without running anything that is in them.

A torch file is a pickle. Only tensors and plain containers are unpickled from it; the classes of
Lightning's bookkeeping, which published files name, are replaced by placeholders that do nothing.
The tensors stay mapped from the file and are read when they are used.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from iec_eval.errors import ConfigError, CorruptFile

BOOKKEEPING = ("pytorch_lightning.", "lightning.")
UNET = "model.diffusion_model."
EMA = "model_ema."
EMA_COUNTERS = frozenset({"model_ema.decay", "model_ema.num_updates"})


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by their original names.

    Attributes:
        tensors: mapped from the file where its format allows it.
        ema: the averaged copy, where the file keeps it apart (the DDIM code's lists), else None.
        stated: whether the file's structure says which weights are which.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None = None
    stated: bool = True

    @property
    def has_ema(self) -> bool:
        """Whether there are two sets of weights to choose from."""
        inside = any(name.startswith(EMA) for name in self.tensors.keys() - EMA_COUNTERS)
        return self.ema is not None or inside


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.safetensors`` or torch file: latent diffusion's, or the DDIM code's.

    Known structures: named tensors; ``{"state_dict": named tensors, ...}``; the list
    ``[model, optimizer, epoch, step, (averaged model)]``. A leading ``module.`` is taken off.

    Raises ConfigError if the file is missing or names classes it should not, CorruptFile if it is
    damaged or something else.
    """
    if not path.is_file():
        what = "is a folder, wanted a file" if path.is_dir() else "no such file"
        raise ConfigError(f"checkpoint {path}: {what}")
    if path.suffix == ".safetensors":
        return _from_tensors(path, _read_safetensors(path))
    content = _load(path)
    if isinstance(content, list | tuple):
        return _from_list(path, content)
    if isinstance(content, dict):
        return _from_tensors(path, content.get("state_dict", content))
    raise CorruptFile(f"checkpoint {path}: wanted named tensors, got {type(content).__name__}")


class Placeholder:
    """Stands for a class that a file names: takes any state, keeps nothing, does nothing."""

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    try:
        with ExitStack() as stack:
            if zipped:
                stack.enter_context(torch.serialization.safe_globals(_placeholders(path)))
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except ConfigError:
        raise
    except Exception as error:  # torch raises a zoo of types for a damaged file
        named = re.search(r"GLOBAL \S+", str(error))
        said = (str(error) or type(error).__name__).splitlines()[0]
        # torch's own advice is to read it without looking for code in it
        reason = "no torch file" if "weights_only" in said or "Weights only" in said else said
        reason = named.group() if named else reason
        raise CorruptFile(
            f"checkpoint {path}: cannot be read ({reason}); wanted a whole torch file of plain "
            "tensors, or a .safetensors file; download it again if it was cut short"
        ) from error


def _placeholders(path: Path) -> list[Any]:
    """One for each class of Lightning that the file names; nothing is imported."""
    named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    foreign = sorted(name for name in named if not name.startswith(BOOKKEEPING))
    if foreign:
        raise ConfigError(
            f"checkpoint {path}: its pickle names {', '.join(foreign)}, which could run code; "
            "nothing was loaded. Wanted tensors and Lightning's bookkeeping only: save the "
            "weights alone, in a place where you trust the file"
        )
    return [(type("Placeholder", (Placeholder,), {}), name) for name in sorted(named)]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors raises its own type
        raise CorruptFile(f"checkpoint {path}: cannot be read ({error})") from error


def _from_list(path: Path, content: list[Any] | tuple[Any, ...]) -> Checkpoint:
    if len(content) not in (4, 5):
        raise CorruptFile(
            f"checkpoint {path}: wanted the list [model, optimizer, epoch, step, (averaged "
            f"model)], got {len(content)} entries"
        )
    ema = _named(path, content[4]) if len(content) == 5 else None
    return Checkpoint(path, _named(path, content[0]), ema)


def _from_tensors(path: Path, content: Any) -> Checkpoint:
    tensors = _named(path, content)
    return Checkpoint(path, tensors, stated=any(name.startswith(UNET) for name in tensors))


def _named(path: Path, content: Any) -> dict[str, Tensor]:
    """Named tensors, without the prefix that parallel training leaves on all of them."""
    entries = content if isinstance(content, dict) else {}
    tensors = {str(k): v for k, v in entries.items() if isinstance(v, Tensor)}
    if not tensors or len(tensors) < len(entries):
        odd = next((k for k, v in entries.items() if not isinstance(v, Tensor)), None)
        got = type(content).__name__ if odd is None else f"{type(entries[odd]).__name__} at {odd!r}"
        raise CorruptFile(f"checkpoint {path}: wanted named tensors, got {got}")
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors
