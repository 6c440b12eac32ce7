"""Pictures that other commands left in the run folder, brought into the page whole."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

RUN = "study.yaml"  # what a folder of a run holds
LARGEST = 400_000  # bytes of one picture
ALL = 1_200_000  # bytes of all pictures
_ROW = re.compile(r"(.*)-([0-9a-f]{8})")  # the folder of an analyzed row: name and fingerprint
_KINDS = {".svg": "svg+xml", ".png": "png"}


@dataclass(frozen=True)
class Figure:
    """A picture as a ``data:`` address; without one it was left out and is only named."""

    group: str
    title: str
    path: str
    data: str | None


def figures(folder: Path, current: Collection[str] | None = None) -> list[Figure]:
    """The SVG and PNG files in a folder and its subfolders, sorted by path; the page stays small.

    Subfolders that are runs of their own, an ablation's say, are left out, and so are those of
    analyzed rows that are not ``current``, which has how the names of their folders end, in a
    fingerprint, or begin where that may be any. A file over :data:`LARGEST` bytes, or beyond
    :data:`ALL` together, is named but not embedded. As an image element's source an SVG can
    neither run nor load anything.
    """
    return list(_figures(folder, current)) if folder.is_dir() else []


def _belongs(folder: Path, current: Collection[str] | None) -> bool:
    if (folder / RUN).exists():
        return False
    analyzed = any(path.with_suffix(".json").is_file() for path in folder.glob("*.svg"))
    row = _ROW.fullmatch(folder.name)
    if current is None or not analyzed or row is None:
        return True
    return any(part in current for part in row.groups())


def _figures(folder: Path, current: Collection[str] | None) -> Iterator[Figure]:
    left = ALL
    inside = (path for path in folder.iterdir() if path.is_dir() and _belongs(path, current))
    for path in (path for place in [folder, *sorted(inside)] for path in sorted(place.iterdir())):
        kind = _KINDS.get(path.suffix.lower())
        if kind is None or not path.is_file():
            continue
        size = path.stat().st_size
        data = None
        if size <= min(left, LARGEST):
            left -= size
            data = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
        group = path.parent.relative_to(folder).as_posix().removeprefix(".")
        title = path.stem.replace("-", " ").replace("_", " ")
        yield Figure(group, title, path.relative_to(folder.parent).as_posix(), data)
