"""Who makes what: claims of independent processes, on a file system that all of them see.

A claim on ``name`` is the file ``<folder>/<name>.<generation>``, made so that of several processes
one succeeds, and touched as long as its owner lives. An owner that shows no sign of life loses
its claim to the next generation, of which again only one can be made; nothing is ever renamed or
locked. Should the owner have been slow instead of dead, two processes make the same file: the
same content, each time whole. So claims save work; what is right does not depend on them.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from iec_eval import processes
from iec_eval.errors import ConfigError, StorageError
from iec_eval.processes import Owner, this_process

TIMEOUT = 120.0


@dataclass(frozen=True)
class Held:
    """A claim as it was found: its generation, its owner (None if unreadable) and its age."""

    name: str
    generation: int
    owner: Owner | None
    age: float


class Claims:
    """The claims of this process in ``folder``, kept alive while the ``with`` block runs.

    Args:
        folder: shared by all who must not do the same work; made when needed.
        timeout: seconds without a sign of life after which an owner counts as dead.
        owner: this process, unless a test wants to be another.
    """

    def __init__(self, folder: Path, timeout: float = TIMEOUT, owner: Owner | None = None) -> None:
        self.folder, self.timeout = folder, timeout
        self.owner = owner or this_process()
        self._mine: dict[str, int] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        self._ended.clear()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True, name="claims")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for name in list(self._mine):
            self.release(name)
        with suppress(OSError):
            self._probe.unlink()

    def take(self, name: str) -> bool:
        """Claim ``name``; False if a living process has it.

        Whoever gets it must look again whether the work is still to be done.

        Raises StorageError if the file system refuses.
        """
        if self._make(name, 0):
            return True
        found = self._newest(name, self._listed())
        if found is None:
            return self._make(name, 0)  # released in between
        return self._dead(found) and self._make(name, found.generation + 1)

    def release(self, name: str) -> None:
        """Give ``name`` back; nothing if it is not held."""
        with self._lock:
            own = self._mine.pop(name, None)
        for generation in range(0 if own is None else own + 1):
            self._path(name, generation).unlink(missing_ok=True)

    def held(self) -> dict[str, Held]:
        """Every claim whose owner lives, by name, this process's own included."""
        listed = self._listed()
        found = (self._newest(name, listed) for name in sorted({name for name, _ in listed}))
        return {one.name: one for one in found if one is not None and not self._dead(one)}

    def tidy(self) -> None:
        """Remove claims of the dead: what they were on may be finished, and nobody asks again.

        Each is taken over first: were it only removed, it would make room for a second one beside
        that of whoever takes it over at this moment.
        """
        for name in sorted({name for name, _ in self._listed()} - self._mine.keys()):
            if self.take(name):
                self.release(name)

    def _keep_alive(self) -> None:
        while not self._ended.wait(self.timeout / 6):
            with self._lock:
                mine = list(self._mine.items())
            for name, generation in mine:
                with suppress(OSError):  # a run folder that was moved away, a server that restarts
                    os.utime(self._path(name, generation))

    def _make(self, name: str, generation: int) -> bool:
        path = self._path(name, generation)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        except FileNotFoundError:
            self._make_folder()
            return self._make(name, generation)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        with self._lock:
            self._mine[name] = generation
        try:
            os.write(handle, json.dumps(self.owner.record()).encode())
        except OSError as error:
            self.release(name)
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            os.close(handle)
        return True

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {self.folder}: {error.strerror or error}") from error

    def _newest(self, name: str, listed: Iterable[tuple[str, int]]) -> Held | None:
        generations = [number for other, number in listed if other == name]
        for generation in sorted(generations, reverse=True):
            path = self._path(name, generation)
            with suppress(OSError):  # released in between
                touched = path.stat().st_mtime
                return Held(name, generation, _read_owner(path), self._now() - touched)
        return None

    def _dead(self, claim: Held) -> bool:
        if self._mine.get(claim.name) == claim.generation:
            return False
        return claim.age > self.timeout or (
            claim.owner is not None and claim.owner.gone(self.owner)
        )

    def _now(self) -> float:
        """The file system's time: machines' clocks differ, its own do not."""
        if self._thread is None:  # only looks, and leaves no trace
            return time.time()
        try:
            self._probe.touch()
            return self._probe.stat().st_mtime
        except OSError as error:
            raise StorageError(f"cannot write {self._probe}: {error.strerror or error}") from error

    @property
    def _probe(self) -> Path:
        """Named as a temporary file of this process, to be removed as one if it is killed."""
        return self.folder / f".clock.{processes.tag()}.{self.owner.pid}.tmp"

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{name}.{generation}"

    def _listed(self) -> list[tuple[str, int]]:
        """Names and generations of all claims."""
        found = []
        if self.folder.is_file():
            raise ConfigError(f"{self.folder}: is a file, wanted a folder")
        with suppress(FileNotFoundError):
            for path in list(self.folder.iterdir()):
                name, _, generation = path.name.rpartition(".")
                if name and not name.startswith(".") and generation.isdecimal():
                    found.append((name, int(generation)))
        return found


def _read_owner(path: Path) -> Owner | None:
    """Who made a claim; None if it is being written at this moment, or cannot be read."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
