"""Every paper config, run whole on a small stand-in: calibration, IEC, decoding, scoring."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

PAPER = Path(__file__).parents[1] / "configs" / "paper"
STUDIES = sorted(PAPER.glob("*.yaml"))
STEPS = 20  # of every sampler here: no interval of the paper is longer
SIDES = {"ddpm-cifar10": 8, "ldm-lsun-churches": 128, "stable-diffusion-v1": 64}
BLOCKS = {"granularity": "block"}  # a fifth of the time; one study is left to its layers
SHORT = {"iterations": 1, "items": 16, "batch_size": 2, "images": 2}

Cli = Callable[..., Result]


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_every_row_runs_for_two_images(
    cli: Cli,
    standins: dict[str, Path],
    scoring: Callable[[int], Path],
    clip: Path,
    tmp_path: Path,
    path: Path,
) -> None:
    study = yaml.safe_load(path.read_text())
    rows = len(study["variants"]) + len(study["controls"])
    shrink(study, standins, scoring, clip)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    done = cli("launch", tmp_path / "study.yaml", "-o", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    failed = {row["name"]: row["error"] for row in results["variants"] if row["error"]}
    assert done.exit_code == 0, (failed, done.stderr)
    assert [row["status"] for row in results["variants"]] == ["done"] * rows
    names = {"fid", "is", "clip-score"} if "coco" in path.stem else {"fid"}
    for row in results["variants"]:
        measured = {name.removesuffix("-standin") for name in row["metrics"]}
        assert all(any(found.startswith(name) for found in measured) for name in names)
        assert row["cost"]["macs_per_image"] > 0


def shrink(
    study: dict[str, Any], standins: dict[str, Path], scoring: Callable[[int], Path], clip: Path
) -> None:
    """Change sizes and places, nothing that a row is about."""
    name = study["model"]["name"]
    study["model"] |= {"path": str(standins[name]), "weights": None}
    if "prompts" in study["model"]:
        study["model"]["prompts"] = str(standins["prompts"])
    study["sampler"]["steps"] = STEPS
    study["images"]["count"] = study["calibration"]["images"] = 2
    study["execution"] = {"batch_size": 2, "threads": 1, "accelerator": "cpu", "devices": 1}
    place = scoring(SIDES.get(name, 32))
    for metric in study["metrics"]:
        _shrink_metric(metric, place, clip)
    for part in parts(study):
        _shorten(part, {} if study["study"] == "table1-cifar10" else BLOCKS)


def _shrink_metric(metric: dict[str, Any], place: Path, clip: Path) -> None:
    if metric["name"] == "clip-score":
        metric["model"] = str(clip)
        return
    metric["features"] = str(place)
    if metric["name"] == "fid":
        metric |= {"reference": str(place / "reference.safetensors"), "allow_biased": True}
    else:
        metric["splits"] = 1


def parts(study: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for variant in study["variants"]:
        yield from variant.get("efficiency", [])


def _shorten(part: dict[str, Any], more: dict[str, Any]) -> None:
    """One optimiser step for each block instead of thousands."""
    if part["name"] == "reconstruction":
        part |= SHORT | more
    bits = part.get("quantizer", {}).get("weight_bits", 8)
    if part["name"] == "cachequant" and bits < 8:
        part["reconstruction"] = {**part.get("reconstruction", {}), **SHORT, **more}


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_show_needs_no_files(
    cli: Cli, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, evaluations, work, disk and time of the true size, and what must be had first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PAPER.parent)
    shown = cli("show", path, "--json")
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    study = yaml.safe_load(path.read_text())
    names = [row["name"] for row in study["variants"]]
    assert [row["name"] for row in found["rows"] if not row["control"]] == names
    steps = study["sampler"]["steps"]
    for row in found["rows"]:
        total = row["evaluations_full"] + row["evaluations_cached"]
        assert total >= steps
        assert row["hours"] > 0
        assert row["fingerprint"] is None
        assert row["missing"] == study["images"]["count"]
    lacking = " ".join(found["lacking"])
    assert study["model"]["path"] in lacking
    for metric in study["metrics"]:
        if metric["name"] == "fid":
            assert metric["reference"] in lacking
    text = cli("show", path, "--tflops", "15").stdout
    assert "Before it can run:" in text
    assert "estimated from the U-Net's multiply-accumulates at 15 TFLOP/s" in text
