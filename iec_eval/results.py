"""``results.json``, schema 1: what a study measured, each number with its cost.

Every key is always written and ``null`` means "not known": a reader never has to guess whether
a number is missing by accident.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.intervals import Interval
from iec_eval.storage import atomic_path
from iec_eval.study import ROLES, Lack, Relation, full_precision

SCHEMA = 1

Status = Literal["done", "partial", "failed"]
Judgement = Literal["better", "worse", "not distinguishable"]


class _Part(BaseModel):
    # no NaN: JSON has none, and a metric that gave one has failed
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Delta(_Part):
    """Value of a row minus value of the row ``versus``, over the same image indices.

    ``spread`` is the standard deviation of the difference over seeds.
    """

    versus: str
    value: float
    ci95: Interval | None = None
    spread: float | None = None


class Comparison(_Part):
    """A row against another: what their difference is and whether it is more than noise.

    ``relation`` says what the row ``versus`` is to this one: ``base``, the row it starts from,
    which is the same without callbacks or, of a control, with fewer steps or a larger interval;
    ``equal-cost``, the same method given the same multiply-accumulates otherwise; ``zero-cost``, a
    callback that takes no evaluation; ``half``, a part of what the callback does; ``stacking``,
    the parts of a composite method put one on the other. ``value`` is this row's ``metric`` minus
    the other's over the same image indices. ``ci95`` holds with 95 % confidence for all rows of
    this relation together; ``level`` is that of the one interval, None where it is not known.
    ``judgement`` is None where the metric has no better direction or there is no interval.
    """

    versus: str
    relation: Relation
    metric: str
    value: float
    ci95: Interval | None = None
    level: float | None = Field(None, gt=0, lt=1)
    judgement: Judgement | None = None


class Measurement(_Part):
    """One metric of one row; ``value`` is None for a row that has none.

    In a study of several seeds ``value`` is the mean over them, ``by_seed`` are the values of
    each, in the order of the study's ``seeds``, and ``spread`` is their standard deviation, None
    for fewer than two. ``ci95`` is of the mean.
    """

    value: float | None
    ci95: Interval | None = None
    delta: Delta | None = None
    by_seed: list[float] = Field(default_factory=list)
    spread: float | None = None


class Cost(_Part):
    """What one image of a row costs; relative numbers are shares of the full-precision control."""

    evaluations_full: float | None = None
    evaluations_cached: float | None = None
    macs_per_image: float | None = None
    relative_macs: float | None = None
    bit_operations_per_image: float | None = None
    relative_bit_operations: float | None = None
    seconds_per_image: float | None = None
    relative_seconds: float | None = None
    weight_bytes: int | None = None


class Variant(_Part):
    """One row: its parts (as the study names them), its numbers and how it ended.

    ``error`` says why a row is not done; of a done one, what it lacks (a metric, MACs).
    ``doubt`` says why what the paper reports of the row is in doubt. ``judge_of`` names the rows
    that are compared with this one, and what it is to each; ``lacks`` are those that it should
    have had itself and has not; ``comparisons`` are this row's with its own judges. Files
    from before these were there are read as having none.
    """

    name: str
    fingerprint: str
    control: bool = False
    simulated: bool = False
    efficiency: list[dict[str, JsonValue]] = Field(default_factory=list)
    callbacks: list[dict[str, JsonValue]] = Field(default_factory=list)
    metrics: dict[str, Measurement] = Field(default_factory=dict)
    cost: Cost = Cost()
    paper: dict[str, float] | None = None
    doubt: str | None = None
    status: Status = "done"
    error: str | None = None
    judge_of: dict[str, Relation] = Field(default_factory=dict)
    lacks: list[Lack] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)

    @field_validator("lacks", mode="before")
    @classmethod
    def _sentences_are_read(cls, lacks: object) -> object:
        """Files from before it was a record have ``what: reason``; what begins with its kind."""
        if not isinstance(lacks, list):
            return lacks
        return [_lack_of(one) if isinstance(one, str) else one for one in lacks]

    @model_validator(mode="after")
    def _failure_has_a_reason(self) -> Variant:
        if self.status == "failed" and not self.error:
            raise ValueError(f"row {self.name!r} failed: say why in 'error'")
        return self


class Results(_Part):
    """Everything a study measured; ``images`` is the number of images of each finished row.

    Where there are ``seeds``, it is that of each seed, and every row was made once for each.

    ``controls`` are the kinds of rows that the tool added where they apply, [] if that was switched
    off; None in files from before that was noted. ``directions`` says of a number, by its name in
    ``metrics``, whether higher is better; one that is missing has no better direction, or only its
    name tells, as in files from before this was noted.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    study: str
    images: int
    seeds: list[int] | None = None
    protocol: dict[str, JsonValue]
    directions: dict[str, bool] = Field(default_factory=dict)
    controls: list[str] | None = None
    variants: list[Variant]

    @field_validator("variants")
    @classmethod
    def _names_are_unique(cls, variants: list[Variant]) -> list[Variant]:
        names = [variant.name for variant in variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rows named twice: {', '.join(twice)}")
        return variants


def _lack_of(sentence: str) -> Lack:
    what, _, reason = sentence.partition(": ")
    kinds = [kind for kind, role in ROLES.items() if what.startswith(role)]
    relation = kinds[0] if kinds else "full-precision"  # "the control ..."
    return Lack(relation=relation, what=what, reason=reason)


def write_results(path: Path, results: Results) -> None:
    """Write ``results.json``, whole or not at all."""
    with atomic_path(path) as temporary:
        text = results.model_dump_json(indent=2, by_alias=True)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_results(path: Path) -> Results:
    """The results in a file.

    Raises ConfigError for a missing file or another schema, CorruptFile for a damaged one.
    """
    text = _text(path)
    _check_schema(path, text)
    try:
        return Results.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems = "; ".join(_problem(problem) for problem in error.errors())
        raise CorruptFile(
            f"results {path}: not what schema {SCHEMA} says ({problems}); "
            "evaluate the study again to write the file anew"
        ) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"results {path}: no such file; evaluate the study first") from None
    except OSError as error:
        raise ConfigError(f"results {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise CorruptFile(f"results {path}: wanted JSON in UTF-8, got other bytes") from None


def _check_schema(path: Path, text: str) -> None:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(
            f"results {path}: wanted JSON, got something else ({error}); evaluate the study again"
        ) from None
    number = document.get("schema") if isinstance(document, dict) else None
    if number != SCHEMA:
        raise ConfigError(
            f"results {path}: wanted schema {SCHEMA}, got {number!r}; read it with the version of "
            "iec_eval that wrote it, or evaluate the study again"
        )


def _problem(problem: Mapping[str, object]) -> str:
    where = problem["loc"]
    path = ".".join(str(part) for part in where) if isinstance(where, tuple) else ""
    return f"{path}: {problem['msg']}" if path else str(problem["msg"])


def with_deltas(
    results: Results,
    bases: Mapping[str, str | None] | None = None,
    *,
    apart: Mapping[str, Collection[str]] | None = None,
) -> Results:
    """Fill in each row's difference to its base; differences that are there already stay.

    ``bases`` names the base of a row, or None for no base; rows it does not mention get theirs
    from :func:`inferred_bases`. Only finished rows are compared: a partial one has other images.
    ``apart`` are the numbers of each row that are compared with no other's.

    Raises ConfigError for a name that is not a row.
    """
    chosen = {**inferred_bases(results), **(bases or {})}
    rows = {variant.name: variant for variant in results.variants}
    unknown = sorted({name for name in (*chosen, *chosen.values()) if name and name not in rows})
    if unknown:
        raise ConfigError(
            f"deltas: no row named {', '.join(map(repr, unknown))} (rows: {', '.join(rows)})"
        )
    variants = [
        _with_delta(row, rows.get(chosen.get(row.name) or ""), (apart or {}).get(row.name, ()))
        for row in results.variants
    ]
    return results.model_copy(update={"variants": variants})


def inferred_bases(results: Results) -> dict[str, str]:
    """The base of each row: the row that says so in its ``judge_of``, or, for a row with callbacks,
    the one row with the same efficiency and no callbacks.

    The second only in files from before rows said so. Rows that are something else to it are no
    base, and added controls count only where the study has no such row itself. Where several
    remain, guessing would mislead: no base.
    """
    names = {row.name for row in results.variants}
    named = {
        judged: row.name
        for row in results.variants
        for judged, relation in row.judge_of.items()
        if relation == "base" and judged in names
    }
    if results.controls is not None:
        return named
    found = {}
    for row in results.variants:
        plain = [
            other
            for other in results.variants
            if row.callbacks and not other.callbacks and other.efficiency == row.efficiency
            if row.name not in other.judge_of
        ]
        candidates = [other for other in plain if not other.control] or plain
        if len(candidates) == 1:
            found[row.name] = candidates[0].name
    return {**found, **named}


def _with_delta(row: Variant, base: Variant | None, apart: Collection[str]) -> Variant:
    if base is None or base is row or {row.status, base.status} != {"done"}:
        return row
    metrics = {
        name: measured if name in apart else _against(measured, base.name, base.metrics.get(name))
        for name, measured in row.metrics.items()
    }
    return row.model_copy(update={"metrics": metrics})


def _against(measured: Measurement, versus: str, base: Measurement | None) -> Measurement:
    if measured.delta or measured.value is None or base is None or base.value is None:
        return measured
    delta = Delta(versus=versus, value=measured.value - base.value)
    return measured.model_copy(update={"delta": delta})


def with_relative_costs(results: Results, control: str | None = None) -> Results:
    """Fill in the relative costs (MACs, bit operations, seconds): shares of full precision.

    That is the row named ``control``, or else the one that :func:`full_precision` finds. Without
    such a row, relative costs are None.

    Raises ConfigError if there is no row named ``control``.
    """
    reference = _full_precision(results, control)
    cost = reference.cost if reference else Cost()
    variants = [
        row.model_copy(update={"cost": _relative_cost(row.cost, cost)}) for row in results.variants
    ]
    return results.model_copy(update={"variants": variants})


def _full_precision(results: Results, control: str | None) -> Variant | None:
    if control is not None:
        rows = [row for row in results.variants if row.name == control]
        if not rows:
            raise ConfigError(f"relative costs: no row named {control!r}")
        return rows[0]
    return full_precision(results.variants)


def _relative_cost(cost: Cost, reference: Cost) -> Cost:
    shares = {
        "relative_macs": _share(cost.macs_per_image, reference.macs_per_image),
        "relative_bit_operations": _share(
            cost.bit_operations_per_image, reference.bit_operations_per_image
        ),
        "relative_seconds": _share(cost.seconds_per_image, reference.seconds_per_image),
    }
    return cost.model_copy(update=shares)


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def require_one_protocol(results: Sequence[Results], labels: Sequence[str] = ()) -> None:
    """Raise Incompatible, naming the keys, unless all were measured in the same way.

    ``labels`` name the results, where their studies' names do not tell them apart.
    """
    names = list(labels) or [one.study for one in results]
    for other, name in zip(results[1:], names[1:], strict=True):
        keys = differing(results[0].protocol, other.protocol)
        if keys:
            told = ", ".join(f"{key} ({here} and {there})" for key, (here, there) in keys.items())
            raise Incompatible(
                f"results of {names[0]!r} and {name!r} were measured with different "
                f"protocols, which differ in {told}; their numbers cannot be "
                "compared, evaluate both with one protocol"
            )


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The keys, dotted, in which two nested mappings differ, with both values as text.

    A mapping that stands against nothing, or against a plain value, is named by its own key alone.
    Where both have one ``digest``, their ``source`` is a record of where the same was read from.
    """
    found = {}
    same = "digest" in here and here["digest"] == there.get("digest")
    for key in sorted((here.keys() | there.keys()) - ({"source"} if same else set())):
        one, other = here.get(key), there.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = differing(one, other)
            found.update({f"{key}.{name}": values for name, values in inner.items()})
        elif _as_text(here, key) != _as_text(there, key):
            found[key] = _as_text(here, key), _as_text(there, key)
    return found


def _as_text(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    return "there" if isinstance(values[key], Mapping) else repr(values[key])
