"""The verbs of the command line, each a few steps of the modules below."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from iec_eval import hub, inspection, provenance
from iec_eval import study as studies
from iec_eval.assembly import Plan, missing_artifacts, plan_metrics, plan_study
from iec_eval.assembly import calibrate as calibrate_plan
from iec_eval.cost import evaluation_costs
from iec_eval.errors import ConfigError, CorruptFile, MissingArtifact, StorageError
from iec_eval.evaluation import covering, groups, protocol, score
from iec_eval.generation import (
    Job,
    calibration_device,
    is_rank_zero,
    launched_in_parallel,
    record_failure,
    use_all_threads,
)
from iec_eval.generation import generate as generate_images
from iec_eval.images import ImagePreparation
from iec_eval.metrics.base import Metric
from iec_eval.metrics.statistics import FILE
from iec_eval.plugins import Registry, load_registry
from iec_eval.progress import Progress
from iec_eval.report.page import write_report
from iec_eval.report.tables import table as results_table
from iec_eval.results import (
    Results,
    read_results,
    with_deltas,
    with_relative_costs,
    write_results,
)
from iec_eval.storage import RunFolder, VariantFolder, write_json, write_text
from iec_eval.study import Study, full_precision
from iec_eval.training.card import card_as_text
from iec_eval.training.classifier import ClassifierRecipe
from iec_eval.training.denoiser import DenoiserRecipe
from iec_eval.training.recipe import real_images_fid, train_folder

GALLERY_IMAGES = 10


@dataclass(frozen=True)
class Session:
    """A study with everything checked and built but the weights."""

    study: Study
    registry: Registry
    run: RunFolder
    jobs: list[Job]
    metrics: list[Metric]

    @property
    def plans(self) -> list[Plan]:
        return [job.plan for job in self.jobs]

    @property
    def directions(self) -> dict[str, bool]:
        """Which way is better, for metrics that say so, by result name."""
        known = [metric for metric in self.metrics if metric.higher_is_better is not None]
        return {metric.name: bool(metric.higher_is_better) for metric in known}


@dataclass(frozen=True)
class Outcome:
    """What a command prints, and whether every variant was done."""

    text: str
    complete: bool


def prepare(
    source: str, overrides: Sequence[str], out: Path | None, lacking: list[str] | None = None
) -> Session:
    """Read a study and check all of it: names, options, files, numbers.

    With a list ``lacking``, files that are not there are noted in it; the study can be shown.

    Raises ConfigError and its kin for anything wrong, before anything expensive.
    """
    study = studies.load(source, overrides)
    registry = load_registry()
    _tell_broken(registry)
    plans = plan_study(study, registry, lacking)
    metrics = plan_metrics(study, registry, plans[0].model, lacking)
    run = RunFolder(out if out is not None else Path("runs") / study.study)
    jobs = [Job(plan, run.variant(plan.experiment.name, plan.fingerprint)) for plan in plans]
    return Session(study, registry, run, jobs, metrics)


def launch(source: str, overrides: Sequence[str], out: Path | None) -> Outcome | None:
    """Generate what is missing, evaluate, report; None on ranks other than zero."""
    session = prepare(source, overrides, out)
    if not _generate(session, (0, 1)):
        return None
    return _evaluate(session)


def generate(source: str, overrides: Sequence[str], out: Path | None, shard: str | None) -> int:
    """Generate what is missing of one shard; the exit status, 1 if a variant failed."""
    session = prepare(source, overrides, out)
    leads = _generate(session, _shard(shard))
    return int(leads and any(job.folder.error_file.is_file() for job in session.jobs))


def calibrate(source: str, overrides: Sequence[str], out: Path | None) -> Outcome:
    """Calibrate what is not calibrated yet, in this one process; says what there is."""
    session = prepare(source, overrides, out)
    _open_run(session)
    _calibrate(session, session.jobs)
    failed = [job for job in session.jobs if job.folder.error_file.is_file()]
    rows = [inspection.calibration_as_text(job, session.run) for job in session.jobs]
    return Outcome("\n".join(rows), not failed)


def evaluate(source: str, overrides: Sequence[str], out: Path | None) -> Outcome:
    """Score what is there and write results and report."""
    session = prepare(source, overrides, out)
    _set_aside_corrupt(session)
    return _evaluate(session)


def report(source: str, overrides: Sequence[str], out: Path | None) -> list[Path]:
    """Write the report again from results.json and the images."""
    session = prepare(source, overrides, out)
    results = read_results(session.run.path / "results.json")
    return _write_report(session, results)


def table(folders: Sequence[Path], form: str) -> str:
    """The table of one or more run folders, as md, csv, json or latex."""
    return results_table([read_results(_results_file(f)) for f in folders], form).rstrip("\n")


def show(
    source: str, overrides: Sequence[str], out: Path | None, *, as_json: bool, tflops: float
) -> str:
    """What a study would do, need and cost; no weights are read, and they need not be there."""
    lacking = list[str]()
    with hub.offline():
        session = prepare(source, overrides, out, lacking)
    rows = inspection.study_rows(session.jobs, session.study, session.run, tflops)
    if not as_json:
        return inspection.study_as_text(session.study, rows, lacking, tflops)
    return json.dumps(
        {
            "study": session.study.model_dump(mode="json", exclude_defaults=True),
            "out": str(session.run.path),
            "lacking": lacking,
            "tflops": tflops,
            "rows": rows,
        },
        indent=2,
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


def export(out: Path, folder: Path, variant: str | None) -> str:
    """Write a run's images as PNG files, one folder per variant; says how many."""
    folders = _variant_folders(out, variant)
    RunFolder(folder).open()
    written = [_export_variant(found, folder / found.path.name) for found in folders]
    return "\n".join(
        f"{folder / f.path.name}: {n} images" for f, n in zip(folders, written, strict=True)
    )


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


def _open_run(session: Session) -> None:
    """Make the run folder ready to be written to."""
    session.run.open()
    resolved = session.study.model_dump(mode="json", exclude_defaults=True)
    write_text(session.run.path / "study.yaml", yaml.safe_dump(resolved, sort_keys=False))
    if is_rank_zero():  # other ranks may start late
        for job in session.jobs:
            job.folder.error_file.unlink(missing_ok=True)


def _calibrate(session: Session, jobs: Sequence[Job]) -> None:
    """Calibrate what is not yet; a variant whose calibration fails is recorded and left out."""
    use_all_threads(session.study.execution)
    device = calibration_device(session.study.execution)
    progress = Progress("steps")
    for job in jobs:
        if not missing_artifacts(job.plan, session.run):
            continue
        try:
            calibrate_plan(job.plan, session.run, device=device, progress=progress)
        except (StorageError, CorruptFile):
            raise  # all variants share disk and weights
        except Exception as error:  # one variant's failure must not stop the others
            record_failure(job.folder, error)
        finally:
            progress.close()


def _generate(session: Session, shard: tuple[int, int]) -> bool:
    """Make missing images; whether this process is rank zero."""
    _open_run(session)
    _set_aside_corrupt(session)
    execution = session.study.execution
    unfinished = [job for job in session.jobs if job.missing(execution.chunk_size)]
    if not unfinished:
        return True
    if is_rank_zero() and shard[1] == 1 and not launched_in_parallel():
        _calibrate(session, unfinished)
    progress = Progress("images")
    try:
        return generate_images(session.jobs, execution, session.run, progress=progress, shard=shard)
    finally:
        progress.close()


def _set_aside_corrupt(session: Session) -> None:
    """Out of the way with chunks that cannot be read: they are missing from now on."""
    for job in session.jobs:
        for path in job.folder.set_aside_corrupt():
            print(f"iec-eval: {path}: unreadable, set aside to be made again", file=sys.stderr)


def _evaluate(session: Session) -> Outcome:
    """Score every variant, write all result files, tell the plugins."""
    results = _scored(session)
    write_results(session.run.path / "results.json", results)
    paths = _write_report(session, results)
    for complaint in session.registry.run_finished(results.model_dump(mode="json", by_alias=True)):
        print(f"iec-eval: {complaint}", file=sys.stderr)
    text = results_table([results], "md", session.directions)
    complete = all(row.status == "done" for row in results.variants)
    return Outcome(f"{text}\nWritten: {', '.join(str(path) for path in paths)}", complete)


def _scored(session: Session) -> Results:
    progress = Progress("features")
    progress.start(len(session.jobs) * session.study.images.count * groups(session.metrics))
    base = _full_precision_job(session)
    rows = []
    for job, cost in zip(session.jobs, evaluation_costs(session.plans), strict=True):
        name = job.plan.experiment.name
        progress.describe(f"scoring {name}")
        row = score(job, session.metrics, cost, progress, base)
        rows.append(row.model_copy(update=session.study.remarks(name)))
    progress.close()
    results = Results(
        study=session.study.study,
        images=session.study.images.count,
        protocol=protocol(session.metrics),
        variants=rows,
    )
    return with_deltas(with_relative_costs(results))


def _full_precision_job(session: Session) -> Job | None:
    row = full_precision(plan.experiment for plan in session.plans)
    return next((job for job in session.jobs if job.plan.experiment is row), None)


def _write_report(session: Session, results: Results) -> list[Path]:
    folder = session.run.path
    made = provenance.manifest(
        session.study, session.plans, results.protocol, session.registry.distributions
    )
    write_json(folder / "manifest.json", made)
    rows = [row for job in session.jobs if (row := _gallery_row(job)) is not None]
    paths = write_report(
        folder, results, rows, made, directions=session.directions, columns=GALLERY_IMAGES
    )
    return [folder / "results.json", *paths, folder / "manifest.json"]


def _gallery_row(job: Job) -> tuple[str, torch.Tensor] | None:
    count = min(GALLERY_IMAGES, job.plan.experiment.images.count)
    try:
        parts = covering(job.folder.finished(), count)
    except MissingArtifact:
        return None
    images = [job.folder.read_chunk(part).images[rows] for part, rows in parts]
    return job.plan.experiment.name, torch.cat(images)


def _variant_folders(out: Path, variant: str | None) -> list[VariantFolder]:
    found = sorted(path.parent for path in out.glob("*/chunks"))
    if not found:
        raise ConfigError(f"{out}: no images of a run there")
    slug = "" if variant is None else _slug_of(variant)
    wanted = [path for path in found if path.name.rpartition("-")[0] == slug]
    wanted = wanted or [path for path in found if path.name.startswith(slug)]
    if not wanted:
        names = ", ".join(path.name for path in found)
        raise ConfigError(f"{out}: no variant {variant!r} there (folders: {names})")
    return [VariantFolder(path) for path in wanted]


def _slug_of(variant: str) -> str:
    return RunFolder(Path()).variant(variant, "").path.name.rstrip("-")


def _export_variant(found: VariantFolder, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for part in found.finished():
        chunk = found.read_chunk(part)
        for index, image in zip(part.indices, chunk.images, strict=True):
            array = image.permute(1, 2, 0).numpy()
            picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
            picture.save(folder / f"{index:06d}.png")
            count += 1
    return count


def _results_file(folder: Path) -> Path:
    return folder if folder.suffix == ".json" else folder / "results.json"


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    index, slash, shards = text.partition("/")
    if not (slash and index.isdecimal() and shards.isdecimal() and int(index) < int(shards)):
        raise ConfigError(f"--shard {text!r}: wanted I/N with I from 0 to N-1, such as 3/16")
    return int(index), int(shards)


def _tell_broken(registry: Registry) -> None:
    for distribution in _broken(registry):
        print(
            f"iec-eval: plugin {distribution} is broken and was not loaded; see iec-eval plugins",
            file=sys.stderr,
        )


def _broken(registry: Registry) -> Iterable[str]:
    return (found.distribution for found in registry.distributions if found.error is not None)
