"""What tests of whole runs share: a toy model on disk, studies of it, the program as it is used."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # several threads in several processes crawl
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from cluster import Cluster, require_slurm, virtual_cluster
from helpers import unet

from iec_eval.cli.main import cli as program

DEEPCACHE = {"name": "deepcache", "interval": 3, "cut": 2}
VARIANTS: list[dict[str, Any]] = [
    {"name": "full precision"},
    {"name": "cached", "efficiency": [DEEPCACHE]},
    {"name": "cached + IEC", "extends": "cached", "callbacks": [{"name": "iec"}]},
]


# A callback that writes down what noise it is shown, and may pause or fail as it is told to.
WITNESS = """
import hashlib, os, time
from pydantic import Field
from iec_eval.api import BaseOptions, DenoisingCallback, hookimpl

class WitnessOptions(BaseOptions):
    fails: bool = Field(False, description="whether WITNESS_FAILS concerns this row")

class Witness(DenoisingCallback):
    name = "witness"
    Options = WitnessOptions

    def refine(self, step, prediction):
        time.sleep(float(os.environ.get("WITNESS_PAUSE", 0)))
        if self.options.fails and max(step.images) >= int(os.environ.get("WITNESS_FAILS", 10**9)):
            raise RuntimeError("the witness was told to fail")
        if "WITNESS_NOTES" in os.environ:
            self.note(step)
        return prediction

    def note(self, step):
        shown = [step.draw.value] + [step.sample] * (step.index == 0)
        with open(f"{os.environ['WITNESS_NOTES']}/{os.getpid()}.txt", "a") as notes:
            for row, image in enumerate(step.images):
                bits = b"".join(noise[row].numpy().tobytes() for noise in shown)
                notes.write(f"{image} {step.index} {hashlib.sha256(bits).hexdigest()}\\n")

@hookimpl
def iec_eval_callbacks():
    return [Witness]
"""


PICKY = """
from torch import nn
from iec_eval.api import BaseOptions, EfficiencyMethod, hookimpl
from pydantic import Field

class Looking(nn.Module):
    def __init__(self, network, fails):
        super().__init__()
        self.network, self.fails = network, fails

    def forward(self, sample, timestep, **inputs):
        found = self.network(sample, timestep, **inputs)
        shown = getattr(found, "sample", found)
        if shown.abs().max().item() > 0 and self.fails:
            raise ValueError("too much light")
        return found

class PickyOptions(BaseOptions):
    fails: bool = Field(False, description="whether it ends in an error")

class Picky(EfficiencyMethod):
    "Looks at what the network predicts."
    name = "picky"
    Options = PickyOptions

    def apply(self, network, clock, artifact):
        return Looking(network, self.options.fails)

@hookimpl
def iec_eval_efficiency_methods():
    return [Picky]
"""


@dataclass(frozen=True)
class Toy:
    """A model folder with 8x8 grey images of 4 classes, and everything to score it with."""

    folder: Path

    @property
    def features(self) -> Path:
        return self.folder / "features"

    @property
    def reference(self) -> Path:
        return self.folder / "reference.safetensors"

    @property
    def weights(self) -> Path:
        return self.folder / "unet" / "diffusion_pytorch_model.safetensors"

    def metrics(self) -> list[dict[str, Any]]:
        """Metrics that any number of images will do for."""
        fid = {"name": "fid", "reference": str(self.reference), "allow_biased": True}
        score = {"name": "is", "splits": 2}
        return [{**metric, "features": str(self.features)} for metric in (fid, score)]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Random weights, but a schedule so short that most pixels stay off black and white."""
    from diffusers import DDPMScheduler

    made = Toy(tmp_path_factory.mktemp("toy"))
    network = unet(in_channels=1, out_channels=1, num_class_embeds=4)
    network.conv_out.weight *= 4  # a network that matters
    network.save_pretrained(made.folder / "unet")
    DDPMScheduler(100, beta_end=0.005).save_pretrained(made.folder / "scheduler")
    _write_features(made)
    return made


def _write_features(toy: Toy) -> None:
    from iec_eval.metrics.features import ClassifierFeatures, ImageClassifier
    from iec_eval.metrics.statistics import Moments, ReferenceStatistics
    from iec_eval.training.classifier import save_features

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = ImageClassifier(1, 8, classes=4, width=4)
        for parameter in classifier.parameters():
            parameter.data *= 2  # else all images look alike to it
        save_features(classifier, toy.features, "toy")
        images = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8)
    network = ClassifierFeatures(toy.features)
    moments = Moments(network.dimensions)
    moments.update(network.extract(images).features)
    found = moments.mean, moments.covariance(), moments.count
    ReferenceStatistics(*found, network.identity()).save(toy.reference)


@pytest.fixture(scope="session")
def standins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small folder for each published model by its name; under ``prompts`` a prompt file."""
    from standins import PROMPTS, PUBLISHED, make_standin

    root = tmp_path_factory.mktemp("standins")
    made = {name: make_standin(name, root / name) for name in PUBLISHED}
    made["prompts"] = root / "prompts.txt"
    made["prompts"].write_text("\n".join(PROMPTS) + "\n")
    return made


@pytest.fixture(scope="session")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """``scoring(side)``: a folder with what scores colour images of that side."""
    from standins import make_scoring

    return cache(lambda side: make_scoring(tmp_path_factory.mktemp(f"scoring{side}"), side))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small CLIP model."""
    from standins import make_clip

    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Installs the callback ``witness``, for this process and for real ones."""
    with installed_plugin(tmp_path_factory.mktemp("site"), "witness", WITNESS):
        yield


@pytest.fixture(scope="session")
def picky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Installs the method ``picky``, which a network without data cannot be run with."""
    with installed_plugin(tmp_path_factory.mktemp("site"), "picky", PICKY):
        yield


@contextmanager
def installed_plugin(place: Path, name: str, source: str) -> Iterator[None]:
    """The plugin ``name`` made of one module, for this process and for real ones."""
    place.mkdir(exist_ok=True)
    (place / f"{name}.py").write_text(source)
    about = place / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[iec_eval]\n{name} = {name}\n")
    # only this entry is taken away again: others may have come in between, and stay longer
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    _set_python_path([str(place), *_python_path()])
    try:
        yield
    finally:
        sys.path.remove(str(place))
        _set_python_path([one for one in _python_path() if one != str(place)])


def _python_path() -> list[str]:
    return [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]


def _set_python_path(places: list[str]) -> None:
    if places:
        os.environ["PYTHONPATH"] = os.pathsep.join(places)
    else:
        os.environ.pop("PYTHONPATH", None)


@pytest.fixture(scope="session")
def write_study(toy: Toy) -> Callable[..., Path]:
    """``write_study(folder, **changes)`` writes ``folder/study.yaml`` and returns its path.

    It is a study of the toy with three variants and no controls; ``changes`` replace whole
    top-level keys.
    """

    def write(folder: Path, **changes: Any) -> Path:
        content = {
            "study": "toy",
            "model": {"name": "unet", "path": str(toy.folder)},
            "sampler": {"name": "ddim", "steps": 5},
            "images": {"seed": 7, "count": 10},
            "metrics": toy.metrics(),
            "controls": [],
            "variants": VARIANTS,
            "execution": {"batch_size": 4, "chunk_size": 4, "threads": 1, "accelerator": "cpu"},
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def make_place(
    tmp_path_factory: pytest.TempPathFactory, write_study: Callable[..., Path]
) -> Callable[..., Any]:
    """``make_place(**changes)``: a ``Place`` for a study whose rows all have the witness."""
    from places import COUNT, EXECUTION, ROWS, STEPS, Place

    def make(**changes: Any) -> Place:
        folder = tmp_path_factory.mktemp("place")
        settings = {
            "sampler": {"name": "ddim", "steps": STEPS, "eta": 0.5},
            "images": {"seed": 7, "count": COUNT},
            "variants": ROWS,
            "execution": EXECUTION,
        }
        study = write_study(folder, **{**settings, **changes})
        (folder / "notes").mkdir()
        return Place(study, folder / "out", folder / "notes")

    return make


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """``cli(*arguments)`` runs the program in this process; what it does not catch is raised."""

    def call(*arguments: Any) -> Result:
        result = CliRunner().invoke(program, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A virtual SLURM cluster of two nodes; skips or fails where SLURM is not installed."""
    require_slurm()
    with virtual_cluster() as running:
        yield running


def command(*arguments: Any) -> list[str]:
    """The command line of a real process."""
    return [sys.executable, "-m", "iec_eval", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """Of a real process: one thread, none of the test's ranks."""
    ranks = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in ranks}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run(*arguments, timeout=..., **environment)`` runs ``python -m iec_eval`` to its end."""

    def call(
        *arguments: Any,
        timeout: float = 120,
        preexec_fn: Callable[[], None] | None = None,
        **more: str,
    ) -> subprocess.CompletedProcess[str]:
        with started(*arguments, preexec_fn=preexec_fn, **more) as process:
            out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return call


@contextmanager
def started(
    *arguments: Any, preexec_fn: Callable[[], None] | None = None, **more: str
) -> Iterator[subprocess.Popen[str]]:
    """A real process in a group of its own; none of the group survives the block."""

    def prepare() -> None:
        # a shell that starts the tests in the background has them, and all they start, ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if preexec_fn is not None:
            preexec_fn()

    process = subprocess.Popen(
        command(*arguments),
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
