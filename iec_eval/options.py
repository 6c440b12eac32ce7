"""Options: the only place where a part's settings exist.

The YAML, the overrides, ``iec-eval show`` and the documentation all come from these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from iec_eval.errors import ConfigError


class BaseOptions(BaseModel):
    """Base of every part's options: immutable, strict about types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Model = TypeVar("Model", bound=BaseModel)


def validated(cls: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Build ``cls`` from plain values; ``where`` says in messages whose options they are.

    Raises ConfigError with one line per problem.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        lines = [_describe(cls, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def _describe(cls: type[BaseModel], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path!r}{_suggestion(cls, problem['loc'])}"
    if problem["type"] == "missing":
        return f"{path!r} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return f"{path}: {message}{given}" if path else f"{message}{given}"


def _suggestion(cls: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    if len(loc) != 1:
        return ""
    names = [field.alias or name for name, field in cls.model_fields.items()]
    near = get_close_matches(str(loc[0]), names, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"{guess} (known: {', '.join(sorted(names))})"
