"""Files: written whole or not at all, read without running code, damage noticed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from iec_eval import processes
from iec_eval.errors import ConfigError, CorruptFile, StorageError

LEFTOVER_SECONDS = 24 * 3600.0


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place when the block succeeds.

    Raises StorageError if the file system refuses.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}.{processes.tag()}."
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place, "
            "then run the same command again: everything finished is kept"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files of processes that were killed, in ``folder`` and below; how many.

    They are those of this machine's processes that are gone, and others of a day ago.
    """
    removed = 0
    for path in folder.rglob(".*.tmp"):
        with suppress(OSError):  # another process was faster
            old = time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
            if old or processes.tag_is_gone(path.name.split(".")[-3]):
                path.unlink()
                removed += 1
    return removed


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file atomically; ``about`` becomes its JSON-valued metadata."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in (about or {}).items()}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except Exception as error:  # safetensors wraps the system's error in its own type
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file that :func:`write_tensors` wrote.

    Raises CorruptFile if there is none or it is damaged, StorageError if the system cannot read it.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _metadata(file)  # noqa: SIM118 - not a dict


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; raises as :func:`read_tensors`, also for what is done in the block.

    What the system refuses (too many open files, no permission, a server that is away) says
    nothing about the file: it must not be taken for damage.
    """
    try:
        with path.open("rb"):
            pass  # the system's own word: safetensors calls much "no such file"
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CorruptFile(f"{path}: is not there") from error
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}; run it again"
        ) from error
    except (SafetensorError, ValueError) as error:
        raise CorruptFile(f"{path}: cannot be read ({error})") from error


def _metadata(file: Any) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def write_sealed(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Like :func:`write_tensors`, with a digest of everything that :func:`read_sealed` checks."""
    write_tensors(path, tensors, {**about, "content": content_digest(tensors, about)})


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata that :func:`write_sealed` wrote.

    Raises CorruptFile if the file cannot be read or one bit of it has changed.
    """
    tensors, about = read_tensors(path)
    seal = about.pop("content", None)
    if seal is None:
        raise CorruptFile(f"{path}: has no checksum; it was made by an earlier version")
    if seal != content_digest(tensors, about):
        raise CorruptFile(f"{path}: its content does not match its checksum")
    return tensors, about


def read_about(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file; its tensors are not read, nor is its digest checked.

    Raises CorruptFile if the file is cut off or is none, StorageError if it cannot be read.
    """
    with _opened(path) as file:
        return _metadata(file)


def seen(path: Path) -> tuple[int, int] | None:
    """Which file is at ``path`` now: the same answer later means nobody has replaced it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def content_digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> str:
    """Hex sha256 of named tensors (names, types, shapes, every byte) and of JSON values."""
    digest = hashlib.sha256()
    if about is not None:
        digest.update(json.dumps(dict(about), sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors from a safetensors file, or from a torch file without code in it.

    Raises ConfigError if the file is missing, CorruptFile if it is damaged or holds more than
    tensors: a pickle could run anything, so it is never unpickled.
    """
    if not path.is_file():
        raise ConfigError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # both loaders raise a zoo of types for a damaged file
        reason = str(error).splitlines()[0]
        raise CorruptFile(
            f"weights {path}: cannot be read ({reason}); wanted a whole safetensors file or a "
            "torch file of plain tensors, files that contain pickled code are refused"
        ) from error


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
