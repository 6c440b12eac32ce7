"""The verb ``convert``: an original checkpoint to a folder in diffusers' layout, resumable.

<out>/<component>/config.json and diffusion_pytorch_model.safetensors (text_encoder:
model.safetensors; scheduler: scheduler_config.json alone), and <out>/conversion.json, which says
what the folder was made from. A component that it names, with the hash it names, is not made
again.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from iec_eval import __version__
from iec_eval.conversion.checkpoints import Checkpoint, open_checkpoint
from iec_eval.conversion.components import Component, plan_components
from iec_eval.conversion.families import FAMILIES, Family, Weights
from iec_eval.conversion.layouts import layout
from iec_eval.conversion.original import (
    DDPM,
    Configuration,
    LatentDiffusion,
    TextEncoderConfig,
    read_original,
)
from iec_eval.conversion.writing import write_safetensors
from iec_eval.errors import ConfigError, CorruptFile, StorageError, UnknownName
from iec_eval.progress import Progress
from iec_eval.storage import atomic_path, sha256, write_json

SCHEMA = 1
RECORD = "conversion.json"
TOKENIZER = ("vocab.json", "merges.txt")
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
BLOCK = 1 << 22  # bytes read at once
MEGABYTE = 1e6
Hashes = dict[str, dict[str, str]]


def convert(
    checkpoint: Path,
    out: Path,
    *,
    family: str,
    weights: str | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
    visible: bool = True,
) -> str:
    """Convert ``checkpoint`` into the folder ``out`` and say what is there.

    ``weights`` is ``ema`` or ``raw``: which set a file with both gives, and for a file that does
    not say, which it holds. ``config`` is the YAML of a model with other sizes than the family's.
    ``tokenizer`` is a folder whose files a text-conditional model needs. ``visible``: whether
    progress is shown on stderr.

    Raises ConfigError for wrong options or an ``out`` that holds something else, CorruptFile for a
    checkpoint that is damaged or not what it should be, StorageError if nothing can be written.
    """
    known = _family(family)
    original = known.original if config is None else _read_original(config, known)
    vocabulary = _tokenizer_files(tokenizer, original)
    opened = open_checkpoint(checkpoint)
    taken = _taken(opened, weights)
    source = _of(opened, taken)
    components = plan_components(original, source, taken)
    _refuse_foreign(out)
    progress = Progress("MB", visible=visible)
    try:
        digests = _digests(checkpoint, progress)
        chosen = stated_weights(opened, weights, known, digests["md5"])
        job = _Job(out, _about(known, original, checkpoint, digests["sha256"], chosen), {})
        job = replace(job, done=job.finished())
        job.write(components, source, progress)
        job.copy_tokenizer(vocabulary)
        job.finish()
    finally:
        progress.close()
    return _summary(job, original, known)


def stated_weights(checkpoint: Checkpoint, stated: str | None, family: Family, md5: str) -> Weights:
    """What is written down as the weights' kind, never a guess.

    The structure of latent diffusion's files and of the DDIM code's lists says it. A file of bare
    tensors holds what the user states, or what is known of the published file with this ``md5``.

    Raises ConfigError if nothing says so, or if what is stated is known to be wrong.
    """
    place, known = f"checkpoint {checkpoint.path}", family.known.get(md5)
    if known is not None and stated not in (None, known):
        raise ConfigError(
            f"{place}: holds the {known} weights of {family.source} (MD5 {md5}), not {stated}; "
            f"say --weights {known}"
        )
    if known is not None or checkpoint.stated or stated is not None:
        return known or _taken(checkpoint, stated)
    raise ConfigError(
        f"{place}: does not say whether its weights are averaged; say --weights ema or raw, "
        "as where you have it from says"
    )


def _taken(checkpoint: Checkpoint, stated: str | None) -> Weights:
    """Which set of weights is read: the one asked for, or the only one."""
    if stated not in (None, *get_args(Weights)):
        raise ConfigError(f"weights {stated!r}: wanted ema or raw")
    if stated is None and checkpoint.has_ema:
        raise ConfigError(
            f"checkpoint {checkpoint.path}: holds raw and averaged weights; say --weights ema or "
            "--weights raw"
        )
    if stated == "ema" and checkpoint.stated and not checkpoint.has_ema:
        raise ConfigError(
            f"checkpoint {checkpoint.path}: has no averaged weights; say --weights raw, or take "
            "the file that has them"
        )
    return "ema" if stated == "ema" else "raw"


def _of(checkpoint: Checkpoint, weights: Weights) -> Checkpoint:
    """The checkpoint with the tensors that are wanted, where the two sets are kept apart."""
    if weights == "ema" and checkpoint.ema is not None:
        return replace(checkpoint, tensors=checkpoint.ema)
    return checkpoint


@dataclass(frozen=True)
class _Job:
    """The folder, what it is made from, and the hashes of the components it holds."""

    out: Path
    about: dict[str, Any]
    done: Hashes

    def finished(self) -> Hashes:
        """Components that are there, whole, from the same source with the same options.

        Raises ConfigError if the folder holds another conversion.
        """
        found = self._record() if (self.out / RECORD).is_file() else {}
        return {name: files for name, files in found.items() if self._whole(name, files)}

    def _record(self) -> Hashes:
        path = self.out / RECORD
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            components = {name: dict(files) for name, files in found["components"].items()}
            different = [key for key in self.about if not self._same(key, found.get(key))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(f"{path}: is no record of a conversion; remove {self.out}") from error
        if different:
            raise ConfigError(
                f"{self.out}: holds another conversion ({', '.join(different)} differ, see {path});"
                " give another folder, or remove this one"
            )
        return components

    def _same(self, key: str, found: Any) -> bool:
        """The source may be renamed, and what an earlier version made is kept."""
        if key == "source":
            return bool(found["sha256"] == self.about["source"]["sha256"])
        return key == "version" or bool(found == self.about[key])

    def _whole(self, component: str, files: Mapping[str, str]) -> bool:
        paths = {self.out / component / name: digest for name, digest in files.items()}
        return all(path.is_file() and sha256(path) == digest for path, digest in paths.items())

    def write(
        self, components: list[Component], checkpoint: Checkpoint, progress: Progress
    ) -> None:
        """Make what is missing, one component after the other."""
        missing = [component for component in components if component.name not in self.done]
        parts = {component.name: component.parts(checkpoint) for component in missing}
        total = sum(part.bytes for ready in parts.values() for part in ready.values())
        progress.start(math.ceil(total / MEGABYTE))
        self._note()
        for component in missing:
            progress.describe(f"writing {component.name}")
            folder, files = self.out / component.name, dict[str, str]()
            _remove_leftovers(folder)
            write_json(folder / component.config_file, component.config)
            files[component.config_file] = sha256(folder / component.config_file)
            if component.weights_file is not None:
                files[component.weights_file] = write_safetensors(
                    folder / component.weights_file,
                    parts[component.name],
                    lambda written: progress.advance(written / MEGABYTE),
                )
            self._note(component.name, files)

    def copy_tokenizer(self, files: list[Path]) -> None:
        """Copy the tokenizer's files, if any were given."""
        if not files:
            return
        for path in files:
            with atomic_path(self.out / "tokenizer" / path.name) as temporary:
                shutil.copyfile(path, temporary)
        self._note("tokenizer", {path.name: sha256(path) for path in files})

    def finish(self) -> None:
        """Write down that nothing is missing."""
        self._note(finished=True)

    def _note(
        self,
        component: str | None = None,
        files: Mapping[str, str] | None = None,
        *,
        finished: bool = False,
    ) -> None:
        """Write down what there is now."""
        if component is not None:
            self.done[component] = dict(files or {})
        record = {**self.about, "finished": finished, "components": self.done}
        write_json(self.out / RECORD, record)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise UnknownName("family", name, FAMILIES)
    return FAMILIES[name]


def _read_original(path: Path, family: Family) -> Configuration:
    pixels = isinstance(family.original, DDPM)
    original: Configuration = (
        read_original(path, DDPM) if pixels else read_original(path, LatentDiffusion)
    )
    found, wanted = layout(original).keys(), family.layout().keys()
    if found != wanted:
        raise ConfigError(
            f"config {path}: describes {', '.join(sorted(found))}, and {family.name} has "
            f"{', '.join(sorted(wanted))}; give the family it is of"
        )
    return original


def _about(
    family: Family, original: Configuration, checkpoint: Path, digest: str, weights: Weights
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "family": family.name,
        "source": {"file": checkpoint.name, "sha256": digest},
        "weights": weights,
        "original": original.model_dump(mode="json"),
        "version": __version__,
    }


def _digests(path: Path, progress: Progress) -> dict[str, str]:
    """Hex digests of a file, read once."""
    kinds = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    progress.start(math.ceil(path.stat().st_size / MEGABYTE))
    progress.describe(f"hashing {path.name}")
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            for digest in kinds.values():
                digest.update(block)
            progress.advance(len(block) / MEGABYTE)
    return {name: digest.hexdigest() for name, digest in kinds.items()}


def _refuse_foreign(out: Path) -> None:
    """A folder without a record may hold nothing but what a kill left."""
    if out.exists() and not out.is_dir():
        raise StorageError(f"cannot write {out}: it is not a folder")
    foreign = out.is_dir() and any(entry.suffix != ".tmp" for entry in out.iterdir())
    if foreign and not (out / RECORD).is_file():
        raise ConfigError(f"{out}: holds something else; give an empty or new folder")


def _remove_leftovers(folder: Path) -> None:
    """Temporary files of a process that was killed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _has_text(original: Configuration) -> bool:
    return isinstance(original, LatentDiffusion) and isinstance(
        original.cond_stage_config, TextEncoderConfig
    )


def _tokenizer_files(folder: Path | None, original: Configuration) -> list[Path]:
    if folder is None:
        return []
    if not _has_text(original):
        raise ConfigError("--tokenizer: this model reads no text; leave it out")
    missing = [name for name in TOKENIZER if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"tokenizer {folder}: {' and '.join(missing)} not found there")
    names = [*TOKENIZER, *TOKENIZER_EXTRAS]
    return [folder / name for name in names if (folder / name).is_file()]


def _summary(job: _Job, original: Configuration, family: Family) -> str:
    names = ", ".join(sorted(job.done))
    lines = [f"{job.out}: {family.name}, {job.about['weights']} weights ({names})"]
    if _has_text(original) and "tokenizer" not in job.done:
        lines.append(
            f"the tokenizer is not in the checkpoint: put {' and '.join(TOKENIZER)} of "
            "openai/clip-vit-large-patch14 (huggingface.co) in a folder and run the same command "
            "with --tokenizer FOLDER"
        )
    return "\n".join(lines)
