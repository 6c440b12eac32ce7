"""Finished pieces of an analysis on disk, so that nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from iec_eval import processes
from iec_eval.errors import CorruptFile
from iec_eval.fingerprints import digest
from iec_eval.storage import read_sealed, write_json, write_sealed

VERSION = 1  # raise it when a piece would hold other numbers than before


class Pieces:
    """The pieces of one part for one row: a file each, written whole.

    ``key`` holds everything that decides their numbers, such as the row's fingerprint; other
    settings go to another folder, so pieces of several settings live side by side.
    """

    def __init__(self, folder: Path, part: str, key: Mapping[str, Any]) -> None:
        self._key = digest({"version": VERSION, "part": part, **key})
        self._folder = folder / "pieces" / f"{part}-{self._key[:8]}"

    def read(self, name: str) -> dict[str, Any] | None:
        """What was written under ``name``; a damaged piece is reported and as good as missing."""
        path = self._folder / f"{name}.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            if found["key"] != self._key:
                return None
            value: dict[str, Any] = found["value"]
            return value
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            processes.say(f"{path}: is damaged ({error}); it is made again")
            return None

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a piece, atomically."""
        write_json(self._folder / f"{name}.json", {"key": self._key, "value": dict(value)})

    def read_tensor(self, name: str) -> Tensor | None:
        """A tensor that was kept under ``name``."""
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            return read_sealed(path)[0]["value"]
        except (CorruptFile, KeyError) as error:
            processes.say(f"{path}: is damaged ({error}); it is made again")
            return None

    def write_tensor(self, name: str, value: Tensor) -> None:
        """Keep a tensor, atomically."""
        write_sealed(self._folder / f"{name}.safetensors", {"value": value}, {})


def step_name(index: int) -> str:
    """The piece of a step."""
    return f"step-{index:04d}"
