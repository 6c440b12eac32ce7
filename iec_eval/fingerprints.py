"""What decides an image, as one hash.

Two rows have the same fingerprint if they mean the same, however it is written: options that are
left out count as their defaults, a composite method as its stages, a file as its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from iec_eval.errors import failing_as_configuration
from iec_eval.options import BaseOptions


class Identified(Protocol):
    """A model, sampler, efficiency method or callback, as far as it says what it is."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def options(self) -> BaseOptions: ...

    def identity(self) -> Mapping[str, str]: ...


class ReadsFiles:
    """A part that may read files of its own."""

    def identity(self) -> Mapping[str, str]:
        """A hash for each file that it reads (:func:`iec_eval.api.sha256`), beside its options.

        A file that is not named here is known by the option that holds its path, and its images
        are taken for the same when its content changes. Asked for often: remember it.
        """
        return {}


def digest(content: Any) -> str:
    """Hex sha256 of a JSON value, independent of the order of keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def identity(part: Identified) -> dict[str, Any]:
    """What a part is, as a JSON value: its name, version, options that decide, and files if any.

    Raises ConfigError if one of its files cannot be read.
    """
    with failing_as_configuration(part.name):
        files = dict(part.identity())
    return {**_stated(part), **({"files": files} if files else {})}


def model_identity(model: Identified, files: Mapping[str, str]) -> dict[str, Any]:
    """What a model is: its part and the hashes of its files, which may be none."""
    return {**_stated(model), "files": dict(files)}


def _stated(part: Identified) -> dict[str, Any]:
    return {"name": part.name, "version": part.version, "options": part.options.decisive()}


def row_fingerprint(
    model: Mapping[str, Any],
    sampler: Identified,
    stages: Iterable[Identified],
    callbacks: Iterable[Identified],
    seed: int,
    *,
    calibration: Mapping[str, Any] | None,
    batching: Mapping[str, int] | None,
) -> str:
    """Hex digest of what decides a row's images: not its name, their number or the execution.

    Raising the number of images therefore keeps those already made. ``calibration`` is given where
    a part may calibrate, ``batching`` where one lets images of a batch depend on each other.
    """
    content = {
        "model": dict(model),
        "sampler": identity(sampler),
        "efficiency": [identity(stage) for stage in stages],
        "callbacks": [identity(callback) for callback in callbacks],
        "seed": seed,
        "calibration": None if calibration is None else dict(calibration),
        "batching": None if batching is None else dict(batching),
    }
    return digest(content)


def fingerprint_over_seeds(of_seeds: Iterable[str]) -> str:
    """Hex digest of a row of results that was made for several seeds, from those of each."""
    return digest(list(of_seeds))
