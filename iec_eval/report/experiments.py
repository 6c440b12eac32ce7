"""Which experiment a row is, and how rows of one name in several runs differ in what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iec_eval.intervals import Estimates
from iec_eval.results import Results, Variant, differing


@dataclass(frozen=True)
class Run:
    """Results under a label, and the run's settings as its manifest has them, if there is one.

    ``settings`` are ``images`` (without the count), and as far as they are known ``model``,
    ``model_files``, ``calibration`` and ``samplers`` (by row). ``estimates`` are what the numbers'
    intervals are made of, by row and metric; None where the run does not keep it.
    """

    label: str
    results: Results
    settings: Mapping[str, Any] | None
    estimates: Estimates | None = None

    def row(self, name: str) -> Variant | None:
        """The row of that name, finished or not."""
        return next((row for row in self.results.variants if row.name == name), None)


def noise_of(run: Run) -> Mapping[str, Any] | None:
    """What the images start from: the study's ``images`` without the count; None if not known."""
    return None if run.settings is None else run.settings["images"]


def one_noise(runs: Sequence[Run]) -> bool:
    """Whether the images of all runs are known to start from the same noise, index by index."""
    first = noise_of(runs[0])
    return first is not None and all(noise_of(run) == first for run in runs)


def same_experiment(row: Variant, other: Variant) -> bool:
    """Whether two rows are one experiment, noise included: all that decides an image agrees."""
    return row.fingerprint == other.fingerprint


def apart(name: str, first: Run, other: Run) -> str:
    """How the experiment ``name`` of a run differs from that of the first; "" if it does not.

    In words, such as ``sampler.steps (20 and 50)``: settings that are known to differ, else that
    the fingerprints do.
    """
    rows = first.row(name), other.row(name)
    if rows[0] is None or rows[1] is None or same_experiment(rows[0], rows[1]):
        return ""
    here, there = _settings(first, rows[0]), _settings(other, rows[1])
    known = here.keys() & there.keys()  # an older manifest says less than a new one
    keys = differing({key: here[key] for key in known}, {key: there[key] for key in known})
    if not keys:
        return "their fingerprints, for a reason that results and manifests do not tell"
    return ", ".join(f"{key} ({one} and {two})" for key, (one, two) in keys.items())


def _settings(run: Run, row: Variant) -> dict[str, Any]:
    """Everything known of what decides a row's images, by the names a study has for it."""
    known = dict(run.settings or {})
    samplers = known.pop("samplers", {})
    if not row.efficiency and not row.callbacks:
        known.pop("calibration", None)  # there is nothing to calibrate
    if row.name in samplers:
        known["sampler"] = samplers[row.name]
    return {**known, "efficiency": _by_name(row.efficiency), "callbacks": _by_name(row.callbacks)}


def _by_name(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parts with their options, by name; a second one of a name is numbered."""
    found: dict[str, Any] = {}
    for part in parts:
        name = str(part["name"])
        again = sum(key.partition(" ")[0] == name for key in found)
        found[f"{name} {again + 1}" if again else name] = dict(part)
    return found
