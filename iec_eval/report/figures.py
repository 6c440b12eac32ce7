"""Pictures that other commands left in the run folder, brought into the page whole."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUN = "study.yaml"  # what a folder of a run holds
LARGEST = 400_000  # bytes of one picture
ALL = 1_200_000  # bytes of all pictures
_KINDS = {".svg": "svg+xml", ".png": "png"}


@dataclass(frozen=True)
class Figure:
    """A picture as a ``data:`` address; without one it was left out and is only named."""

    group: str
    title: str
    path: str
    data: str | None


def figures(folder: Path) -> list[Figure]:
    """The SVG and PNG files in a folder and its subfolders, sorted by path; the page stays small.

    Subfolders that are runs of their own, an ablation's say, are left out. A file over
    :data:`LARGEST` bytes, or beyond :data:`ALL` together, is named but not embedded. As an image
    element's source an SVG can neither run nor load anything.
    """
    return list(_figures(folder)) if folder.is_dir() else []


def _figures(folder: Path) -> Iterator[Figure]:
    left = ALL
    inside = (path for path in folder.iterdir() if path.is_dir() and not (path / RUN).exists())
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
