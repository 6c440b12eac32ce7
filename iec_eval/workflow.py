"""The verbs of the command line, each a few steps of the modules below."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from iec_eval import hub, inspection, pictures, processes, slurm, stages
from iec_eval.analysis.question import Question
from iec_eval.analysis.run import analyze as analyze_rows
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.generation import set_threads, use_all_threads
from iec_eval.images import ImagePreparation
from iec_eval.influence import read_estimates
from iec_eval.metrics.statistics import FILE
from iec_eval.plugins import load_registry
from iec_eval.provenance import recorded_settings
from iec_eval.report.compare import compare as compare_runs
from iec_eval.report.experiments import Run
from iec_eval.report.scaling import scaling_as_text
from iec_eval.report.tables import table as results_table
from iec_eval.results import read_results, require_one_protocol
from iec_eval.session import Session, list_rows, open_run, prepare
from iec_eval.storage import write_json, write_text
from iec_eval.training.card import card_as_text
from iec_eval.training.classifier import ClassifierRecipe
from iec_eval.training.denoiser import DenoiserRecipe
from iec_eval.training.recipe import real_images_fid, train_folder
from iec_eval.work import Share
from iec_eval.workload import ScaleQuestion


@dataclass(frozen=True)
class Outcome:
    """What a command prints, and whether every variant was done."""

    text: str
    complete: bool


def launch(source: str, overrides: Sequence[str], out: Path | None) -> Outcome | None:
    """Make what is missing, score, report; None on ranks other than zero."""
    session = prepare(source, overrides, out)
    stages.make(session, Share())
    return _evaluate(session, heal=True) if processes.leads() else None


def submit(source: str, overrides: Sequence[str], out: Path | None, options: slurm.Options) -> str:
    """Submit what is missing as chained SLURM jobs; says what was submitted."""
    session = prepare(source, overrides, out)
    missing = inspection.missing(session.jobs, session.study, session.run)
    told = slurm.launch(session.study, session.run.path, missing, options)
    if not options.dry_run:
        list_rows(session)  # the first job, which does so too, may start tomorrow
    return told


def generate(source: str, overrides: Sequence[str], out: Path | None, shard: str | None) -> int:
    """Make images that are missing, of one shard; the exit status, 1 if a variant failed."""
    session = prepare(source, overrides, out)
    dropping = not session.study.execution.keep_images  # which takes looking at them
    stages.make(session, Share(features=dropping, shard=_shard(shard), wait=False))
    size = session.study.execution.chunk_size
    failed = any(job.folder.failure() is not None and job.missing(size) for job in session.jobs)
    return int(processes.leads() and failed)


def calibrate(source: str, overrides: Sequence[str], out: Path | None) -> Outcome:
    """Calibrate what is not calibrated yet, in this one process; says what there is."""
    session = prepare(source, overrides, out)
    open_run(session)
    stages.calibrate(session, session.jobs)
    failed = [job for job in session.jobs if job.folder.error_file.is_file()]
    rows = [inspection.calibration_as_text(job, session.run) for job in session.jobs]
    return Outcome("\n".join(rows), not failed)


def evaluate(source: str, overrides: Sequence[str], out: Path | None) -> Outcome | None:
    """Score what is there and write results and report; None on ranks other than zero."""
    session = prepare(source, overrides, out)
    stages.make(session, Share(images=False))
    return _evaluate(session, heal=False) if processes.leads() else None


def report(source: str, overrides: Sequence[str], out: Path | None) -> list[Path]:
    """Write the report again from results.json and the images.

    What the study says of a row besides how to make it is taken from the study as it is now.
    Raises Incompatible if the numbers are not of this study.
    """
    session = prepare(source, overrides, out)
    path = session.run.path / "results.json"
    results = read_results(path)
    if other := session.what_differs(results):
        raise Incompatible(
            f"report: {path} is not of this study: {other}; launch it, or report on "
            f"{session.run.path / 'study.yaml'}, which was run last"
        )
    rows = [row.model_copy(update=session.study.remarks(row.name)) for row in results.variants]
    return stages.report(session, results.model_copy(update={"variants": rows}))


def table(folders: Sequence[Path], form: str) -> str:
    """The table of one or more run folders, as md, csv, json or latex.

    Runs whose studies have one name are told apart by their folders.
    """
    found = {label: read_results(file) for label, file in _labelled(folders).items()}
    results, labels = list(found.values()), list(found)
    require_one_protocol(results, labels)
    if len({one.study for one in results}) < len(results):
        results = [one.model_copy(update={"study": label}) for label, one in found.items()]
    return results_table(results, form).rstrip("\n")


def compare(folders: Sequence[Path], form: str, rows: Sequence[str], metrics: Sequence[str]) -> str:
    """Rows of two or more run folders side by side, as md or json."""
    runs = [
        Run(
            label,
            results := read_results(file),
            recorded_settings(file.parent / "manifest.json"),
            read_estimates(file.parent, results),
        )
        for label, file in _labelled(folders).items()
    ]
    return compare_runs(runs, form, rows=rows, metrics=metrics)


def show(
    source: str,
    overrides: Sequence[str],
    out: Path | None,
    *,
    as_json: bool,
    tflops: float | None,
    scale: ScaleQuestion | None = None,
) -> str:
    """What a study would do, need and cost; no weights are read, and they need not be there."""
    lacking = list[str]()
    with hub.offline():
        session = prepare(source, overrides, out, lacking)
    if tflops is None:
        tflops = inspection.assumed_tflops(session.study, here=scale is None)
    rows = inspection.study_rows(session.jobs, session.study, session.run, tflops)
    scaled = None
    if scale is not None:
        macs = [
            row["macs_per_image"]
            for row, jobs in zip(rows, session.rows, strict=True)
            for _ in jobs
        ]
        scaled = scale.answered(session.jobs, macs, session.study, session.metrics, tflops)
    if not as_json:
        text = inspection.study_as_text(session.study, rows, lacking, tflops)
        return text if scaled is None else f"{text}\n\n{scaling_as_text(scaled)}"
    found = {
        "study": session.study.model_dump(mode="json", exclude_defaults=True),
        "out": str(session.run.path),
        "lacking": lacking,
        "tflops": tflops,
        "rows": rows,
    }
    if scaled is not None:
        found["scale"] = scaled.as_json()
    return json.dumps(found, indent=2)


def analyze(
    source: str, overrides: Sequence[str], out: Path | None, question: Question
) -> tuple[str, bool]:
    """Measure what correction does to a study's rows, as far as it is not measured yet.

    Returns what was found, and whether every row could be measured.
    """
    session = prepare(source, overrides, out)
    session.run.open()
    set_threads(session.study.execution)
    use_all_threads(session.study.execution)
    return analyze_rows(
        session.study,
        session.firsts,
        session.run,
        session.registry,
        question,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )


def plugins(*, as_json: bool) -> str:
    """What is installed, built-ins included, broken plugins with their error."""
    found = [asdict(distribution) for distribution in load_registry().distributions]
    if as_json:
        return json.dumps(found, indent=2)
    return "\n".join(inspection.distribution_as_text(item) for item in found)


def parts(*, as_json: bool) -> str:
    """Every registered part with its options."""
    found = inspection.registered_parts(load_registry())
    if as_json:
        return json.dumps(found, indent=2)
    return "\n".join(inspection.part_as_text(part) for part in found)


def export(out: Path, folder: Path, variant: str | None) -> Outcome:
    """Write a run's images as PNG files, one folder per variant; says how many and how large."""
    return Outcome(*pictures.export(out, folder, variant))


def train(
    images: str,
    out: Path,
    *,
    test_images: str | None,
    tag: str,
    steps: int,
    epochs: int,
    pad: int,
    size: int | None,
    channels: str | None,
    threads: int | None,
    samples: int,
) -> str:
    """Train a model folder from images, resuming, and measure it; the data card as text."""
    if threads:
        torch.set_num_threads(threads)
    preparation = ImagePreparation(pad, size, int(channels) if channels else None)
    card = train_folder(
        images,
        out,
        test_images=test_images,
        tag=tag,
        preparation=preparation,
        denoiser=DenoiserRecipe(steps=steps),
        classifier=ClassifierRecipe(epochs=epochs),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if samples:
        floor = real_images_fid(test_images, preparation, out, samples) if test_images else None
        card["fid"] = {**_measure_model(out, card, samples, threads), "real_test_images": floor}
    write_json(out / "card.json", card)
    write_text(out / "card.md", card_as_text(card))
    return card_as_text(card)


def _measure_model(
    out: Path, card: dict[str, Any], samples: int, threads: int | None
) -> dict[str, Any]:
    """FID of samples of the trained model, by an ordinary study in OUT/work/card."""
    study = {
        "study": "card",
        "model": {"name": "unet", "path": str(out), "unconditional_class": len(card["classes"])},
        "sampler": {"name": "ddim", "steps": 100},
        "images": {"seed": 0, "count": samples},
        "metrics": [
            {"name": "fid", "features": str(out / "features"), "reference": str(out / FILE)}
        ],
        "controls": [],
        "variants": [{"name": "full precision"}],
        "execution": {"threads": threads, "batch_size": 64},
    }
    write_text(out / "work" / "card.yaml", yaml.safe_dump(study, sort_keys=False))
    launch(str(out / "work" / "card.yaml"), (), out / "work" / "card")
    row = read_results(out / "work" / "card" / "results.json").variants[0]
    metric, measured = next(iter(row.metrics.items()))
    return {
        "metric": metric,
        "samples": samples,
        "sampler": "ddim, 100 steps, uniform",
        "model": measured.value,
    }


def _evaluate(session: Session, *, heal: bool) -> Outcome:
    """Score every variant, write all result files, tell the plugins."""
    results = stages.score(session, heal=heal)
    paths = stages.report(session, results, scored=True)
    for complaint in session.registry.run_finished(results.model_dump(mode="json", by_alias=True)):
        print(f"iec-eval: {complaint}", file=sys.stderr)
    text = results_table([results], "md")
    complete = all(row.status == "done" for row in results.variants)
    return Outcome(f"{text}\nWritten: {', '.join(str(path) for path in paths)}", complete)


def _labelled(folders: Sequence[Path]) -> dict[str, Path]:
    """Results files by what to call their runs: the folder's name, or its path if that is taken.

    A file that is given by its own name is called after that, unless it is ``results.json``.

    Raises ConfigError for a run that is given twice.
    """
    files = [path if path.suffix == ".json" else path / "results.json" for path in folders]
    for file, folder in zip(files, folders, strict=True):
        if [other.resolve() for other in files].count(file.resolve()) > 1:
            raise ConfigError(f"{folder} is given twice")
    names = [
        file.parent.resolve().name if file.name == "results.json" else file.stem for file in files
    ]
    labels = [
        name if names.count(name) == 1 else str(folder)
        for name, folder in zip(names, folders, strict=True)
    ]
    return dict(zip(labels, files, strict=True))


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    index, slash, shards = text.partition("/")
    if not (slash and index.isdecimal() and shards.isdecimal() and int(index) < int(shards)):
        raise ConfigError(f"--shard {text!r}: wanted I/N with I from 0 to N-1, such as 3/16")
    return int(index), int(shards)
