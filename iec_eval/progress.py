"""Progress of long work: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Counts units of work; silent unless ``visible``.

    On a terminal it is a bar; otherwise a line every ``every`` seconds.
    """

    def __init__(self, unit: str, *, visible: bool = True, every: float = 15.0) -> None:
        self.unit, self.visible, self._every = unit, visible, every
        self._bar: Any = None
        self._total, self._done, self._label = 0, 0.0, ""
        self._began = self._told = time.monotonic()

    def start(self, total: int) -> None:
        """Begin counting to ``total``; nothing is shown if there is nothing to do."""
        self.close()
        self._total, self._done = total, 0.0
        self._began = self._told = time.monotonic()
        if self.visible and total and sys.stderr.isatty():
            self._bar = _bar(total, self.unit)
            self._bar.set_description_str(self._label)

    def describe(self, label: str) -> None:
        """Say what is being worked on."""
        if label == self._label:
            return
        self._label = label
        if self._bar is not None:
            self._bar.set_description_str(label)
        else:
            self._line()

    def advance(self, amount: float) -> None:
        """``amount`` more units are done; parts of units count."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif time.monotonic() - self._told > self._every:
            self._line()

    def left(self, amount: float) -> None:
        """``amount`` units are left, whoever did the others; the first call begins counting."""
        if not self._total:
            self.start(round(amount))
        self._total = max(self._total, round(amount))
        self.advance(self._total - amount - self._done)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self) -> None:
        self._told = time.monotonic()
        if not self.visible or not self._total:
            return
        rate = self._done / max(self._told - self._began, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if self._done else ""
        done = f"{self._done:.0f}/{self._total} {self.unit}"
        print(f"{self._label}: {done}{left}", file=sys.stderr, flush=True)


def _bar(total: int, unit: str) -> Any:
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f}% |{bar}| {n:.0f}/{total_fmt} {unit} [{remaining} left]"
    return tqdm(total=total, unit=unit, bar_format=layout, dynamic_ncols=True, file=sys.stderr)
