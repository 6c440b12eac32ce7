"""What all contract checks share: how properties are run, compared and complained about."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from iec_eval.efficiency.base import Artifact
from iec_eval.errors import IecEvalError
from iec_eval.options import BaseOptions, validated

# out of order and with gaps, so that a position is never mistaken for an index
IMAGES = (3, 1, 40, 0, 9)
SEED = 11
STEPS = 5
PREDICTIONS = frozenset({"epsilon", "v", "sample", "flow"})
Options = Mapping[str, Any]


def run_checks(
    cls: type[Any], checks: Mapping[str, Callable[[], None]], skip: Collection[str]
) -> None:
    """Check the properties in order, but those to skip; failures name class and property."""
    unknown = sorted(set(skip) - checks.keys())
    if unknown:
        raise ValueError(f"skip: unknown {unknown}; the checks are {', '.join(checks)}")
    for name, check in checks.items():
        if name not in skip:
            with prefix(f"{cls.__name__}: {name}: "):
                check()


@contextmanager
def prefix(text: str) -> Iterator[None]:
    """Say in an assertion's message where it was; what a class merely lets happen becomes one."""
    try:
        yield
    except AssertionError as error:
        # the cause is kept: it may be an assert statement of the class, without any message
        raise AssertionError(f"{text}{error}") from error
    except IecEvalError:  # says itself what is wrong, and callers may expect it
        raise
    except Exception as error:
        raise AssertionError(f"{text}raises {type(error).__name__}: {error}") from error


def check_declaration(cls: type[Any]) -> None:
    """Name and options are such as studies can give."""
    name = getattr(cls, "name", None)
    ensure(
        isinstance(name, str) and bool(re.fullmatch(r"[a-z0-9][a-z0-9_.+-]*", name)),
        f"name: wanted lower-case letters, digits, and - _ . + after the first, got {name!r}",
    )
    options = cls.Options
    ensure(issubclass(options, BaseOptions), f"Options: wanted BaseOptions, got {options!r}")
    ensure(options.model_config.get("extra") == "forbid", "Options must refuse unknown keys")
    silent = [key for key, each in options.model_fields.items() if not each.description]
    ensure(not silent, f"Options: {', '.join(silent)} have no description")


def check_version(part: Any) -> None:
    """``version`` can be raised."""
    version = part.version
    ensure(
        type(version) is int and version >= 1,
        f"version: wanted a whole number from 1, got {version!r}",
    )


def build(cls: type[Any], options: Options, *more: Any) -> Any:
    """An instance from its options, as the program builds it."""
    return cls(validated(cls.Options, options, cls.__name__), *more)


def ensure(holds: bool, message: str) -> None:
    """Complain unless it holds."""
    # not an assert statement, so that the checks also hold under python -O
    if not holds:
        raise AssertionError(message)


def ensure_same(found: Tensor, wanted: Tensor, message: str) -> None:
    """Complain unless the tensors are equal bit for bit, saying how far apart they are."""
    if not torch.equal(found, wanted):
        off = difference(found, wanted) if found.shape == wanted.shape else float("inf")
        raise AssertionError(f"{message} (by {off:.2g} of the largest value)")


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def same(first: Any, second: Any) -> bool:
    """Whether two values are equal bit for bit, whatever they are made of; NaN equals NaN."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second) or _equal_but_nan(first, second)
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return same(torch.from_numpy(first), torch.from_numpy(second))
    if type(first) is not type(second):
        return False
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if is_dataclass(first):
        names = [each.name for each in fields(first)]
        return all(same(getattr(first, name), getattr(second, name)) for name in names)
    return bool(first == second) or _same_inside(first, second)


def _equal_but_nan(first: Tensor, second: Tensor) -> bool:
    """Equal where they are numbers, and numbers in the same places."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(
        first.nan_to_num(), second.nan_to_num()
    )


def _same_inside(first: Any, second: Any) -> bool:
    """For objects without an equality of their own, such as a library's scheduler."""
    return bool(getattr(first, "__dict__", None)) and same(vars(first), vars(second))


def saved_and_loaded(artifact: Artifact) -> dict[str, Tensor]:
    """``artifact`` as it comes back from a file."""
    wrong = [name for name, value in artifact.items() if not isinstance(value, Tensor)]
    ensure(not wrong, f"calibrate(): {wrong} are not tensors")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact.safetensors"
        save_file({name: value.contiguous() for name, value in artifact.items()}, path)
        return load_file(path)
