"""A run folder as tests look at it: what is in it, and what the callback ``witness`` noted."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import DEEPCACHE

from iec_eval.runs import VariantFolder
from iec_eval.storage import read_sealed

WITNESS = {"name": "witness"}
ROWS = [
    {"name": "full precision", "callbacks": [WITNESS]},
    {"name": "cached", "efficiency": [DEEPCACHE], "callbacks": [WITNESS]},
    {"name": "cached + IEC", "efficiency": [DEEPCACHE], "callbacks": [WITNESS, {"name": "iec"}]},
]
EXECUTION = {"batch_size": 4, "chunk_size": 4, "threads": 1, "accelerator": "cpu"}
COUNT, STEPS = 24, 5
TIMES = {"seconds_per_image", "relative_seconds"}
Noises = dict[tuple[int, int], set[str]]


@dataclass(frozen=True)
class Place:
    """A study, its run folder, and where the witness writes."""

    study: Path
    out: Path
    notes: Path

    def arguments(self, *overrides: str, verb: str = "generate") -> list[str]:
        """Of the program, for this study and folder."""
        changes = [word for override in overrides for word in ("-s", override)]
        return [verb, str(self.study), "-o", str(self.out), *changes]

    @property
    def chunks(self) -> dict[Path, bytes]:
        """Finished chunks and their content."""
        return {path: path.read_bytes() for path in sorted(self.out.glob("*/chunks/*.safetensors"))}

    @property
    def parts(self) -> list[Path]:
        """Pieces of chunks that are not finished."""
        return sorted(self.out.glob("*/parts/*"))

    @property
    def leftovers(self) -> list[Path]:
        """What only unfinished work may have: temporary files, parts of chunks, claims."""
        temporary = [path for path in self.out.glob("**/*") if path.name.endswith(".tmp")]
        return [*temporary, *self.parts, *(self.out / "claims").glob("*")]

    def images(self) -> dict[str, torch.Tensor]:
        """Images of every variant, by its folder's name; each exactly once and in order."""
        found = {}
        for path in sorted(self.out.glob("*/chunks")):
            folder = VariantFolder(path.parent)
            parts = folder.finished()
            listed = [index for part in parts for index in part.indices]
            assert listed == list(range(len(listed)))
            found[folder.path.name] = torch.cat([folder.read_chunk(p).images for p in parts])
        return found

    def features(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors of every feature file, by its path in the run folder."""
        found = sorted(self.out.glob("*/features/*/*.safetensors"))
        return {str(path.relative_to(self.out)): read_sealed(path)[0] for path in found}

    def results(self) -> Any:
        """results.json without the times."""
        return without_times(json.loads((self.out / "results.json").read_text()))

    def witnessed(self) -> list[tuple[int, int, str]]:
        """Image, step and digest of the noise, of every note of every process and row."""
        lines = [line for notes in self.notes.iterdir() for line in notes.read_text().splitlines()]
        words = [line.split() for line in lines]
        return [(int(image), int(step), digest) for image, step, digest in words]

    def begun(self, batch_size: int) -> int:
        """Micro-batches of more than one image that any process began, if all are whole.

        Scoring runs the loop too, without a network: for image 0 alone, to count evaluations.
        """
        last = batch_size - 1
        return sum(step == 0 and image % batch_size == last for image, step, _ in self.witnessed())

    def noises(self) -> Noises:
        """Digests of all noise that each (image, step) was shown: of every row and process."""
        found = defaultdict(set)
        for image, step, digest in self.witnessed():
            found[image, step].add(digest)
        return dict(found)


def without_times(value: Any) -> Any:
    """A JSON value without what differs between two runs of the same study: seconds."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_alike(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal but for one pixel in a thousand, and there by one level."""
    difference = (one.int() - other.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) <= 0.001


def assert_identical(one: Place, other: Place) -> None:
    """The same images, bit for bit."""
    here, there = one.images(), other.images()
    assert here.keys() == there.keys()
    for name, images in here.items():
        assert torch.equal(images, there[name]), name


def assert_same_run(one: Place, other: Place) -> None:
    """The same images, features and results, and nothing left of the work."""
    assert_identical(one, other)
    here, there = one.features(), other.features()
    assert here.keys() == there.keys()
    for path, tensors in here.items():
        assert tensors.keys() == there[path].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, there[path][name]), (path, name)
    assert one.results() == other.results()
    assert one.leftovers == []
