"""The one error family: everything a user can cause is an :class:`IecEvalError`.

Library code raises these; the command line turns them into one message and exit status 2.
Each message says what happened, what was wanted, what was got and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class IecEvalError(Exception):
    """Base of every error that iec_eval raises on purpose."""


class ConfigError(IecEvalError):
    """A study, option or command-line value is wrong."""


class UnknownName(ConfigError):
    """A name that nobody registered."""

    def __init__(
        self, kind: str, name: str, available: Iterable[str], *, hint: str | None = None
    ) -> None:
        names = sorted(available)
        near = get_close_matches(name, names, n=1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        listing = ", ".join(names) or "none"
        extra = f" ({hint})" if hint else ""
        super().__init__(f"unknown {kind} {name!r}{guess} (available: {listing}){extra}")


class Incompatible(ConfigError):
    """Parts that are each valid but do not work together."""


class MissingArtifact(IecEvalError):
    """A file that an earlier stage should have made is not there."""


class SchedulerError(IecEvalError):
    """SLURM refused a request, or could not be asked."""


class PluginError(IecEvalError):
    """A plugin is broken, or two plugins claim one name."""


class StorageError(IecEvalError):
    """A file or folder cannot be written: no space, no permission, not a folder."""


class ProcessesError(IecEvalError):
    """The processes of a run cannot work together."""


class CorruptFile(IecEvalError):
    """A file exists but cannot be read as what it should be."""


class CorruptChunk(CorruptFile):
    """A chunk of images was damaged; it has been set aside and can be made again."""


def one_line(error: BaseException) -> str:
    """Kind and message of an error, of which 500 characters are kept."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500] or 'no message'}"


@contextmanager
def failing_as_configuration(where: str) -> Iterator[None]:
    """Within the block whatever a plugin's part raises is a ConfigError that says where it was."""
    try:
        yield
    except IecEvalError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error


def complaints(attempt: Callable[[], object]) -> list[str]:
    """The message of the ConfigError that ``attempt()`` raises; nothing if it raises none."""
    try:
        attempt()
    except ConfigError as error:
        return [str(error)]
    return []
