"""Options: the only place where a part's settings exist.

The YAML, the overrides, ``iec-eval show`` and the documentation all come from these classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, ClassVar, Final, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from iec_eval.errors import ConfigError

NOT_DECISIVE: Final = "decides no image"
"""Marks an option, ``Annotated[str, NOT_DECISIVE]``, whose value as such decides no image.

The place of a file whose content is hashed is one, and the name of a set of other options.
"""

UsedBy = Mapping[str, Mapping[str, Sequence[str]]]


class BaseOptions(BaseModel):
    """Base of every part's options: immutable, strict about types, unknown keys refused.

    So are numbers that are not finite, of which nothing could be computed, and options that are
    given though the chosen value of another does not use them. A subclass says which these are in
    ``used_by``: under the name of the option that decides, for each option that not every value of
    it uses, the values that do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    used_by: ClassVar[UsedBy] = {}

    def model_post_init(self, _: Any) -> None:
        """No validator, which would change what pydantic calls an alternative in its messages."""
        for deciding, options in self.used_by.items():
            chosen = getattr(self, deciding)
            for name, choices in options.items():
                if name in self.model_fields_set and chosen not in choices:
                    raise ValueError(
                        f"{name} has no effect on the {deciding} {chosen}; leave it out, or take "
                        f"{deciding} {' or '.join(choices)}"
                    )

    def decisive(self) -> dict[str, Any]:
        """All options as JSON values, defaults included, but those marked NOT_DECISIVE."""
        kept: dict[str, Any] = _decisive(self, self.model_dump(mode="json"))
        return kept


Model = TypeVar("Model", bound=BaseModel)
Location = tuple[int | str, ...]


def validated(cls: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Build ``cls`` from plain values; ``where`` says in messages whose options they are.

    Raises ConfigError with one line per problem.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        lines = [_describe(cls, problem) for problem in _telling(cls, error.errors())]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def first_problem(error: Exception) -> str:
    """What is wrong with a value, in one line: of pydantic's complaints the first."""
    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors()[0]
    place = ".".join(str(step) for step in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]


def _decisive(value: Any, dumped: Any) -> Any:
    """What is dumped of a value, without what is marked in it, however deep."""
    if isinstance(value, BaseModel) and isinstance(dumped, dict):
        fields = type(value).model_fields
        kept = {name for name in fields if NOT_DECISIVE not in fields[name].metadata}
        return {name: _decisive(getattr(value, name), dumped[name]) for name in sorted(kept)}
    if isinstance(value, list | tuple) and isinstance(dumped, list):
        return [_decisive(*pair) for pair in zip(value, dumped, strict=True)]
    return dumped


def _telling(cls: type[BaseModel], problems: Sequence[Any]) -> list[Any]:
    """Of an option with alternatives, only the complaints of the one that fits furthest."""
    deepest: dict[Location, int] = {}
    for problem in problems:
        option = _walk(cls, problem["loc"]).option
        deepest[option] = max(deepest.get(option, 0), len(problem["loc"]))
    return [p for p in problems if len(p["loc"]) == deepest[_walk(cls, p["loc"]).option]]


def _describe(cls: type[BaseModel], problem: Any) -> str:
    place = _walk(cls, problem["loc"])
    path = ".".join(str(step) for step in place.path)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {path!r}{_suggestion(place.owner, path)}"
    if problem["type"] == "missing":
        return f"{path!r} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return f"{path}: {message}{given}" if path else f"{message}{given}"


def _suggestion(owner: Any, path: str) -> str:
    if not _is_model(owner):
        return ""
    names = [field.alias or name for name, field in owner.model_fields.items()]
    near = get_close_matches(path.rpartition(".")[2], names, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"{guess} (known: {', '.join(sorted(names))})"


class _Place(NamedTuple):
    """Where a problem is: as the user wrote it, up to the first alternatives, and in what type."""

    path: Location
    option: Location
    owner: Any


def _walk(cls: type[BaseModel], loc: Location) -> _Place:
    """Follow pydantic's location, which also names the alternatives it tried."""
    owner: Any = cls
    inner: Any = cls
    path, option = list[int | str](), loc
    for depth, step in enumerate(loc):
        inner = _not_null(inner)
        if get_origin(inner) in (Union, UnionType):
            option = min(option, loc[:depth], key=len)
        else:
            path.append(step)
            owner = inner
        inner = _inside(inner, step)
    return _Place(tuple(path), option, owner)


def _not_null(annotation: Any) -> Any:
    """The one alternative to None, which pydantic does not name; other types as they are."""
    others = [a for a in get_args(annotation) if a is not NoneType]
    nullable = get_origin(annotation) in (Union, UnionType) and len(others) == 1
    return others[0] if nullable else annotation


def _inside(annotation: Any, step: int | str) -> Any:
    """The type at ``step`` of a model, a list or a union; None where it cannot be told."""
    if _is_model(annotation):
        field = annotation.model_fields.get(str(step))
        return None if field is None else field.annotation
    inner = get_args(annotation)
    tagged = (a for a in inner if isinstance(step, int) or getattr(a, "__name__", "") == step)
    return next(tagged, None)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
