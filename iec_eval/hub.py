"""Repositories on the Hugging Face hub, named ``hub:owner/name`` or ``hub:owner/name@revision``.

The prefix keeps them apart from folders, so that a misspelled path never asks the network. Only
:func:`download` uses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from iec_eval.errors import ConfigError

PREFIX = "hub:"
FORM = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")

_offline = ContextVar("offline", default=False)


class HubId(NamedTuple):
    """A repository and the branch, tag or commit of it; None is its main branch."""

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, spec: str) -> HubId | None:
        """The id that ``spec`` is; None if it is a path.

        Raises ConfigError for a prefix with anything else behind it.
        """
        if not spec.startswith(PREFIX):
            return None
        match = FORM.fullmatch(spec)
        if match is None or not _is_repository(match["repository"]):
            raise ConfigError(f"{spec!r}: wanted hub:owner/name or hub:owner/name@revision")
        return cls(match["repository"], match["revision"])

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{PREFIX}{self.repository}{revision}"


def cached(hub_id: HubId) -> Path | None:
    """The folder of what an earlier download left on this machine, whole or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(hub_id.repository, revision=hub_id.revision, local_files_only=True)
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """Within the block nothing is downloaded: :func:`download` raises ConfigError."""
    token = _offline.set(True)
    try:
        yield
    finally:
        _offline.reset(token)


def download(hub_id: HubId, patterns: Sequence[str]) -> Path:
    """Get the files that match ``patterns``, as far as they are not here; their folder.

    Raises ConfigError if the repository cannot be had.
    """
    from huggingface_hub import snapshot_download

    if _offline.get():
        raise ConfigError(f"{hub_id}: not downloaded yet; iec-eval launch does it")
    try:
        found = snapshot_download(
            hub_id.repository, revision=hub_id.revision, allow_patterns=list(patterns)
        )
    except Exception as error:  # the library's own, the network's, the file system's
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{hub_id}: cannot be downloaded ({reason}); check the name, the "
            "network and, for a gated repository, hf auth login; or give a folder's path"
        ) from error
    return Path(found)
