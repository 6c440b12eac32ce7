"""Where a result comes from: everything needed to judge it or make it again."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from iec_eval import __version__
from iec_eval.errors import CorruptFile
from iec_eval.jobs import Job
from iec_eval.plugins import Distribution
from iec_eval.study import Study

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "torch-fidelity",
    "diffusers",
    "safetensors",
    "numpy",
    "pillow",
    "pluggy",
)
OPTIONAL = ("transformers",)


def manifest(
    study: Study,
    jobs: Sequence[Job],
    protocol: Mapping[str, Any],
    plugins: Sequence[Distribution],
) -> dict[str, Any]:
    """The content of ``manifest.json``: configuration, hashes, versions, plugins and device."""
    return {
        "iec_eval": __version__,
        "git": git_state(Path(__file__).parent),
        "study": study.model_dump(mode="json"),
        "fingerprints": {job.name: job.plan.fingerprint for job in jobs},
        "samplers": {job.plan.experiment.name: job.plan.experiment.sampler for job in jobs},
        "model_files": dict(jobs[0].plan.identity),
        "protocol": dict(protocol),
        "versions": versions(),
        "plugins": [asdict(plugin) for plugin in plugins],
        "device": device(),
    }


def recorded(path: Path) -> dict[str, Any] | None:
    """The content of a ``manifest.json``; None if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def recorded_settings(path: Path) -> dict[str, Any] | None:
    """What a run's images were made of besides a row's own parts, from its ``manifest.json``.

    ``images`` (but the count), ``model``, ``model_files``, ``calibration`` and ``samplers``, by
    row; older manifests lack the last. None if there is no such file. Raises CorruptFile if it is
    not a manifest.
    """
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        study = made["study"]
        silent = "seed" if study["images"].get("seeds") else "seeds"  # the one that says nothing
        images = {k: v for k, v in study["images"].items() if k not in ("count", silent)}
        shared = {key: study[key] for key in ("model", "calibration") if key in study}
        own = {key: made[key] for key in ("model_files", "samplers") if key in made}
        return {"images": images, **shared, **own}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CorruptFile(f"{path}: not the manifest of a run; report on the run again") from None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    installed = {name for name in OPTIONAL if find_spec(name) is not None}
    found = {name: metadata.version(name) for name in (*PACKAGES, *sorted(installed))}
    return {"python": platform.python_version(), **found}


def device() -> dict[str, Any]:
    """What the images were computed on."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": names,
    }


def git_state(folder: Path) -> str | None:
    """Commit of the checkout the code runs from, marked if it was changed; None if it is none."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
