"""Labels and prompts: what each image is asked to show, a function of its index alone.

A label file has one class a line with the number of its images, in the order of the images::

    # class count
    0 50
    1 50

A prompt file has one prompt a line. Both begin anew after their end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from iec_eval.errors import ConfigError

GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2


class LabelList:
    """``counts[k]`` images of ``classes[k]``, one class after another."""

    def __init__(self, classes: Sequence[int], counts: Sequence[int]) -> None:
        self._classes, self._ends = list(classes), list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, image: int) -> int:
        """The class of image ``image >= 0``."""
        return self._classes[bisect_right(self._ends, image % len(self))]


def read_labels(path: Path, classes: int) -> LabelList:
    """The label list in a file, for a model of ``classes`` classes.

    Raises ConfigError naming file and line.
    """
    found, counts = list[int](), list[int]()
    for number, line in _lines(path, "labels"):
        if not line or line.startswith("#"):
            continue
        words = line.split()
        if len(words) != 2 or not all(word.isdecimal() for word in words):
            raise ConfigError(
                f"labels {path}, line {number}: wanted CLASS COUNT, such as '7 50', got {line!r}"
            )
        label, count = map(int, words)
        if label >= classes:
            raise ConfigError(
                f"labels {path}, line {number}: class {label}, the model has 0 to {classes - 1}"
            )
        if count == 0:
            raise ConfigError(f"labels {path}, line {number}: wanted 1 image or more, got 0")
        found.append(label)
        counts.append(count)
    if not found:
        raise ConfigError(f"labels {path}: no line with a class; wanted CLASS COUNT lines")
    return LabelList(found, counts)


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, one a line.

    Raises ConfigError naming file and line: an empty line is no prompt.
    """
    prompts = list[str]()
    for number, line in _lines(path, "prompts"):
        if not line:
            raise ConfigError(
                f"prompts {path}, line {number}: is empty; wanted one prompt on every line"
            )
        prompts.append(line)
    if not prompts:
        raise ConfigError(f"prompts {path}: no line; wanted one prompt on every line")
    return prompts


def spread(images: Sequence[int], total: int) -> list[int]:
    """Positions in a list of ``total`` entries that few images already sample evenly.

    Image i is at the fractional part of i times the golden ratio (Weyl's sequence), so calibration
    images see classes of the whole list and not of its beginning.
    """
    return [int((image * GOLDEN) % 1 * total) for image in images]


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """Numbered lines without the blanks around them."""
    if not path.is_file():
        raise ConfigError(f"{what} {path}: no such file")
    number = 1
    lines = list[tuple[int, str]]()
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            lines.append((number, raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()))
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{what} {path}, line {number}: not UTF-8 text ({error.reason})"
            ) from error
    return lines
