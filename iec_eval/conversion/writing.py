"""Write safetensors files one tensor at a time, so that a file of any size needs little memory.

The format: eight bytes with the header's length, a JSON header, and the tensors' bytes, all little
endian (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from iec_eval.errors import CorruptFile
from iec_eval.storage import atomic_path

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Part:
    """A tensor to be written: its type and shape, and how to get it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    path: Path, parts: Mapping[str, Part], on_written: Callable[[int], None]
) -> str:
    """Write a safetensors file atomically, holding one tensor at a time; its sha256.

    ``on_written`` is called with the number of bytes after each tensor.

    Raises CorruptFile for a type of numbers that the format lacks, StorageError if the file system
    refuses.
    """
    # wide types first, so that every tensor is aligned to its type
    order = sorted(parts, key=lambda name: (-parts[name].dtype.itemsize, name))
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        head = _header(path, {name: parts[name] for name in order})
        digest.update(head)
        file.write(head)
        for name in order:
            value = parts[name].read().contiguous().flatten().view(torch.uint8)
            content = value.numpy().data
            digest.update(content)
            file.write(content)
            on_written(content.nbytes)
    return digest.hexdigest()


def _header(path: Path, parts: Mapping[str, Part]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, part in parts.items():
        if part.dtype not in TYPES:
            known = ", ".join(TYPES.values())
            raise CorruptFile(f"{path}: tensor {name!r} is {part.dtype}, wanted one of {known}")
        entries[name] = {
            "dtype": TYPES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [position, position + part.bytes],
        }
        position += part.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = text + b" " * (-len(text) % 8)
    return len(padded).to_bytes(8, "little") + padded
