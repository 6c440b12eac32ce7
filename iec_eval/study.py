"""A study names a table; each of its variants is one experiment, one row.

What an image is depends on the experiment and its index only. ``execution`` holds everything that
may not change an image; all the rest is in the fingerprint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from iec_eval.errors import ConfigError, UnknownName
from iec_eval.options import BaseOptions, validated

Part = dict[str, Any]
Control = Literal[
    "full-precision",
    "full-precision+iec",
    "equal-cost",
    "heun",
    "zero-cost",
    "halves",
    "naive-stacking",
]
Relation = Literal[
    "base", "equal-cost", "zero-cost", "half", "stacking", "full-precision", "corrected-alike"
]
ROLES: Mapping[Relation, str] = {
    "base": "base",
    "equal-cost": "equal-cost rival",
    "zero-cost": "zero-cost rival",
    "half": "half",
    "stacking": "naive stacking",
    "full-precision": "full precision",
    "corrected-alike": "full precision corrected alike",
}
"""What a row is called by the row that it judges."""
CALIBRATION_BATCH = 64
CALIBRATION_NOISE = 2  # version; 1 was that of scored images of the same seed
INHERITED = ("sampler", "efficiency", "callbacks")


Seed = Annotated[int, Field(ge=0, lt=2**63)]


class ImagesSpec(BaseOptions):
    """Which images: the seed of their noise, or several, and how many of each seed.

    Where there are ``seeds``, each row is made and scored once for each of them; ``seed`` is then
    the one that an experiment is about, in a study the first of them.
    """

    seed: Seed = Field(0, description="of the noise")
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = Field(
        None, description="of the noise, several instead of one"
    )
    count: int = Field(50_000, ge=1, description="images per variant and seed")

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("seeds"), list):
            return values
        seeds = values["seeds"]
        if "seed" in values:
            raise ValueError("seed and seeds are both given; wanted one of them")
        if any(seeds.count(seed) > 1 for seed in seeds):
            raise ValueError(f"seeds {seeds}: wanted each once")
        return {**values, "seed": seeds[0]} if seeds else values

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As it may be read again: with ``seeds``, without the ``seed`` that is one of them."""
        found: dict[str, Any] = write(self)
        if self.seeds is not None:
            found.pop("seed", None)
        return found

    def each(self) -> list[ImagesSpec]:
        """The same for each seed."""
        return [self.model_copy(update={"seed": seed}) for seed in self.seeds or [self.seed]]


class CalibrationSpec(BaseOptions):
    """What methods that calibrate are shown."""

    seed: int = Field(1, ge=0, lt=2**63, description="of the calibration noise")
    images: int = Field(512, ge=1, description="calibration images")
    batch_size: int = Field(
        CALIBRATION_BATCH, ge=1, description="images denoised together; each batch has its ranges"
    )

    def identity(self) -> dict[str, Any]:
        """What decides what is calibrated: the options, and how the images' noise is drawn.

        The batch size that all had before it was an option is not spelled out.
        """
        found = {**self.model_dump(), "noise": CALIBRATION_NOISE}
        if self.batch_size == CALIBRATION_BATCH:
            del found["batch_size"]
        return found


class ExecutionSpec(BaseOptions):
    """How to run; nothing here may change an image."""

    batch_size: int = Field(256, ge=1, description="images denoised together")
    chunk_size: int = Field(256, ge=1, description="images in one file")
    devices: int | Literal["auto"] = Field("auto", description="devices or processes per node")
    num_nodes: int = Field(1, ge=1, description="nodes")
    accelerator: str = Field("auto", description="as Lightning names it: auto, cpu, gpu ...")
    strategy: str = Field("auto", description="as Lightning names it")
    threads: int | None = Field(None, ge=1, description="CPU threads a process; null: all cores")
    keep_images: bool = Field(True, description="false: delete images once features are there")
    claim_timeout: float = Field(
        120.0, gt=0, description="seconds of silence after which others take a process's work over"
    )

    @field_validator("devices")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("wanted at least 1")
        return value


class Variant(BaseOptions):
    """One row: what differs from the study's shared settings."""

    name: str = Field(min_length=1, max_length=100, description="row label, unique in the study")
    extends: str | None = Field(None, description="an earlier variant to start from")
    sampler: dict[str, Any] | None = Field(None, description="options that replace shared ones")
    efficiency: list[Part] | None = Field(None, description="methods, in order of application")
    callbacks: list[Part] | None = Field(None, description="denoising callbacks, in order")


FULL_PRECISION = {
    "full-precision": Variant(name="full precision"),
    "full-precision+iec": Variant(name="full precision + IEC", callbacks=[{"name": "iec"}]),
}


class Study(BaseOptions):
    """A study file, checked for form; names of parts are resolved later.

    ``paper`` holds the numbers a paper reports, by row and metric; ``doubtful`` says of a row, in
    a sentence, why its published setting or number is in doubt. Neither changes what is run.
    """

    study: str = Field(min_length=1, description="name of the study")
    model: Part
    sampler: Part
    images: ImagesSpec = ImagesSpec()
    metrics: list[Part] = Field(min_length=1)
    controls: list[Control] | None = Field(
        None, description="kinds of rows the tool adds; null: all that apply, []: none"
    )
    variants: list[Variant] = Field(default_factory=list)
    calibration: CalibrationSpec = CalibrationSpec()
    execution: ExecutionSpec = ExecutionSpec()
    paper: dict[str, dict[str, float]] = Field(default_factory=dict)
    doubtful: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)

    def experiments(self) -> list[Experiment]:
        """The rows that the study names and the full-precision controls, those first.

        Without a list of controls some of these may be rows of the study already, which plans tell:
        ``study_plans.own_plans`` leaves them out. ``controls`` adds the others, rivals of the rows.

        Raises ConfigError for doubled names, an unknown ``extends`` or an empty study.
        """
        named = self._named_rows()
        rows = [*self._full_precision_controls(named), *named]
        if not rows:
            raise ConfigError(f"study {self.study!r}: no variants and no controls, nothing to do")
        _refuse_doubles(row.name for row in rows)
        return rows

    def wanted_controls(self) -> list[Control]:
        """The kinds of controls to add where they apply: all, unless the study lists some."""
        return list(get_args(Control)) if self.controls is None else self.controls

    def remarks(self, row: str) -> dict[str, Any]:
        """What the study says of a row besides how to make it: the paper's numbers, the doubt."""
        return {"paper": self.paper.get(row), "doubt": self.doubtful.get(row)}

    def check_remarks(self, names: Collection[str]) -> None:
        """Raises UnknownName if ``paper`` or ``doubtful`` names a row that is none of these."""
        for key, remarks in (("paper", self.paper), ("doubtful", self.doubtful)):
            unknown = sorted(remarks.keys() - set(names))
            if unknown:
                raise UnknownName(f"variant in {key}:", unknown[0], names)

    def _named_rows(self) -> list[Experiment]:
        known: dict[str, Variant] = {}
        for variant in self.variants:
            known[variant.name] = _extended(variant, known, self.sampler)
        _refuse_doubles(variant.name for variant in self.variants)
        return [self._experiment(variant, control=False) for variant in known.values()]

    def _full_precision_controls(self, named: Sequence[Experiment]) -> list[Experiment]:
        """As listed; without a list those of use, under names that the study leaves free."""
        made = {
            key: self._experiment(variant, control=True) for key, variant in FULL_PRECISION.items()
        }
        if self.controls is not None:
            return [row for key, row in made.items() for name in self.controls if name == key]
        corrects = any(part.get("name") == "iec" for row in named for part in row.callbacks)
        useful = [row for row in made.values() if corrects or not row.callbacks]
        taken = {row.name for row in named}
        return [row.model_copy(update={"name": free_name(row.name, taken)}) for row in useful]

    def _experiment(self, variant: Variant, *, control: bool) -> Experiment:
        return Experiment(
            name=variant.name,
            control=control,
            model=self.model,
            sampler=_sampler_of(self.sampler, variant.sampler or {}),
            efficiency=variant.efficiency or [],
            callbacks=variant.callbacks or [],
            images=self.images,
            calibration=self.calibration,
        )


class Lack(BaseOptions):
    """A row that another should have beside it, as ``relation``, and ``reason`` why it has not."""

    relation: Relation
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


class Experiment(BaseOptions):
    """One row with everything that decides its images.

    ``judge_of`` names the rows that are to be compared with this one, and what it is to each;
    ``lacks`` are those that the row itself should have and cannot.
    """

    name: str
    control: bool
    judge_of: dict[str, Relation] = Field(default_factory=dict)
    lacks: list[Lack] = Field(default_factory=list)
    model: Part
    sampler: Part
    efficiency: list[Part]
    callbacks: list[Part]
    images: ImagesSpec
    calibration: CalibrationSpec


class Row(Protocol):
    """A row of a study, planned or measured, as far as it tells which one is full precision."""

    @property
    def name(self) -> str: ...

    @property
    def control(self) -> bool: ...

    @property
    def judge_of(self) -> Mapping[str, Relation]: ...

    @property
    def efficiency(self) -> Sequence[Any]: ...

    @property
    def callbacks(self) -> Sequence[Any]: ...


AnyRow = TypeVar("AnyRow", bound=Row)


def full_precision(rows: Iterable[AnyRow]) -> AnyRow | None:
    """The row that others are measured against, None if there is none.

    It is the first of the study's own without efficiency methods and callbacks, the control of
    that name before all others. A control that was added for another row follows that row.
    """
    plain = [row for row in _own(rows) if not row.efficiency and not row.callbacks]
    return next((row for row in plain if row.control), plain[0] if plain else None)


def _own(rows: Iterable[AnyRow]) -> Iterator[AnyRow]:
    """Rows without the controls that come after a row they judge: those may have more steps."""
    earlier = set[str]()
    for row in rows:
        if not (row.control and earlier.intersection(row.judge_of)):
            yield row
        earlier.add(row.name)


def free_name(name: str, taken: Collection[str]) -> str:
    """``name``, or what tells it from a row that is called so already."""
    numbered = (f"{name} (control {number})" for number in count(2))
    candidates = chain([name, f"{name} (control)"], numbered)
    return next(candidate for candidate in candidates if candidate not in taken)


def load(source: str, overrides: Sequence[str] = ()) -> Study:
    """Read a study from a path or a packaged name, with ``key.path=value`` overrides.

    Raises ConfigError for a missing file, bad YAML, unknown or repeated keys and wrong types.
    """
    path = find(source)
    try:
        content = read_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"study {path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"study {path}: wanted a mapping of keys, got {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    return validated(Study, content, f"study {path}")


class _Loader(yaml.SafeLoader):
    """Safe, and refuses a mapping that has a key twice, of which YAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    "in a mapping", node.start_mark, f"found {key.value!r} twice", key.start_mark
                )
            seen.add(str(key.value))
        return node


def read_yaml(text: str) -> Any:
    """Plain values of YAML text; what an anchor names is one value, wherever an alias stands.

    Raises yaml.YAMLError for text that is none and for repeated keys.
    """
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def find(source: str) -> Path:
    """The file of a study given as a path or as a packaged name such as ``quickstart``."""
    path = Path(source)
    if path.is_file():
        return path
    packaged = {p.stem: p for p in (Path(__file__).parent / "studies").glob("*.yaml")}
    if source in packaged:
        return packaged[source]
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"study {source!r}: no such file")
    raise UnknownName("study", source, packaged, hint="or give the path of a study file")


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: wanted key.path=value")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    *parents, last = path.split(".")
    target: Any = content
    for key in parents:
        target = _descend(target, key, override)
    _assign(target, last, value, override)


def _descend(target: Any, key: str, override: str) -> Any:
    if isinstance(target, dict):
        return target.setdefault(key, {})
    return target[_position(target, key, override)]


def _assign(target: Any, key: str, value: Any, override: str) -> None:
    if isinstance(target, dict):
        target[key] = value
    else:
        target[_position(target, key, override)] = value


def _position(target: Any, key: str, override: str) -> int:
    if not isinstance(target, list):
        raise ConfigError(f"override {override!r}: {key!r} is inside a plain value")
    if not key.isdecimal() or int(key) >= len(target):
        raise ConfigError(f"override {override!r}: {key!r} is not one of 0..{len(target) - 1}")
    return int(key)


def _extended(variant: Variant, known: Mapping[str, Variant], shared: Part) -> Variant:
    """The variant with what it inherits; its sampler is whole then, ``shared`` included."""
    if variant.extends is None:
        return variant
    if variant.extends not in known:
        raise UnknownName(f"variant that {variant.name!r} extends:", variant.extends, known)
    base = known[variant.extends]
    own = {key: getattr(variant, key) for key in INHERITED}
    merged = {k: getattr(base, k) if v is None else v for k, v in own.items()}
    whole = _sampler_of(shared, base.sampler or {})
    merged["sampler"] = _sampler_of(whole, variant.sampler or {})
    return variant.model_copy(update=merged)


def _sampler_of(shared: Part, own: Part) -> Part:
    """The shared sampler with a row's own options; of another sampler only ``steps`` is shared."""
    if own.get("name", shared.get("name")) != shared.get("name"):
        shared = {key: value for key, value in shared.items() if key == "steps"}
    return {**shared, **own}


def _refuse_doubles(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"two variants are called {name!r}; names must differ")
        seen.add(name)
