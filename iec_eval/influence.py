"""``influence.safetensors``: what each image contributes to each number of a run's results.

It lies beside ``results.json`` and lets runs that start from the same noise be compared image by
image, as rows of one run are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from iec_eval.intervals import Estimate, Estimates
from iec_eval.results import Results, Variant
from iec_eval.runs import INFLUENCE
from iec_eval.storage import read_sealed, write_sealed

PARTS = ("influence", "without")  # of an estimate


def write_estimates(folder: Path, results: Results, estimates: Estimates) -> None:
    """Write what the intervals of ``results`` are made of, float64, whole or not at all."""
    tensors, values = dict[str, Tensor](), dict[str, float]()
    for row in results.variants:
        for metric, one in estimates.get(row.name, {}).items():
            key = _key(row.fingerprint, metric)
            values[key] = one.value
            tensors |= {f"{key}/{p}": x for p in PARTS if (x := getattr(one, p)) is not None}
    write_sealed(folder / INFLUENCE, tensors, {"values": values})


def read_estimates(folder: Path, results: Results) -> dict[str, dict[str, Estimate]] | None:
    """What the numbers of ``results`` are made of, by row and metric; None without the file.

    Numbers that the file has otherwise than ``results``, or not at all, are left out: it may be of
    an older or newer evaluation. Raises CorruptFile if it is damaged.
    """
    path = folder / INFLUENCE
    if not path.is_file():
        return None
    tensors, about = read_sealed(path)
    return {row.name: dict(_estimates(row, tensors, about["values"])) for row in results.variants}


def _key(fingerprint: str, metric: str) -> str:
    return f"{fingerprint}/{metric}"


def _estimates(
    row: Variant, tensors: Mapping[str, Tensor], values: Mapping[str, float]
) -> Iterator[tuple[str, Estimate]]:
    for metric, measured in row.metrics.items():
        key = _key(row.fingerprint, metric)
        if measured.value is not None and values.get(key) == measured.value:
            influence, without = (tensors.get(f"{key}/{part}") for part in PARTS)
            yield metric, Estimate(measured.value, influence, without, tuple(measured.by_seed))
