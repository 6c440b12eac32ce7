"""An analysis from beginning to end: what is missing, its price, the measurements, the files.

<out>/analysis/<row>-<fingerprint8>/spectral.json  growth.json  residuals.json  ablation.json
                                    and a .csv and an .svg for each; recommendation.json and .yaml
<out>/analysis/<row>-<fingerprint8>/pieces/    a file for each step that is finished
<out>/analysis/pieces/                         trajectories, which rows share
<out>/analysis/ablation.yaml                   a study for ``iec-eval launch``
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from iec_eval import ranks
from iec_eval.analysis import ablation, growth, recommendation, residuals, spectral, writing
from iec_eval.analysis.affine import AffineStep, affine_steps
from iec_eval.analysis.bench import (
    Bench,
    Subject,
    correctors,
    full_precision_twin,
    why_uncorrectable,
)
from iec_eval.analysis.pieces import Pieces, step_name
from iec_eval.analysis.question import Question
from iec_eval.assembly import missing_for_schedule, uncalibrated
from iec_eval.cost import EvaluationCost, Uncounted, evaluation_costs, expected_evaluations
from iec_eval.errors import (
    ConfigError,
    CorruptFile,
    Incompatible,
    StorageError,
    UnknownName,
    one_line,
)
from iec_eval.jobs import Job
from iec_eval.noise import Noise
from iec_eval.planning import Plan
from iec_eval.plugins import Registry
from iec_eval.progress import Progress
from iec_eval.runs import RunFolder
from iec_eval.storage import write_text
from iec_eval.study import Study

ERROR_FILE = "error.txt"  # where a row's measurements failed last
PASSES = 1.5  # evaluations that a product takes the time of, about
LINEARIZATION = 4.0  # the same of a linearisation


@dataclass
class Analysis:
    """A study under a question.

    Attributes:
        subjects: the rows, then full-precision twins that are not among them, for the norms.
        affine: A and B of each subject's steps, by its fingerprint; only where norms are wanted.
        failures: why subjects could not be measured, by their fingerprint.
        tell: takes what is to be said before the work begins.
    """

    study: Study
    run: RunFolder
    registry: Registry
    question: Question
    rows: list[Subject]
    subjects: list[Subject]
    tell: Callable[[str], None]
    progress: Progress = field(default_factory=lambda: Progress("steps"))
    failures: dict[str, str] = field(default_factory=dict)
    affine: dict[str, list[AffineStep]] = field(default_factory=dict)
    without_norms: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.run.path / "analysis"

    def wants(self, part: str) -> bool:
        """Whether a part was asked for."""
        return part in self.question.parts


@dataclass(frozen=True)
class Work:
    """What one part of one row still lacks, and how to make it.

    Attributes:
        plan: whose network it runs.
        units: of progress.
        evaluations: of the network, per image, summed over images.
        products: with a Jacobian, at most.
        linearizations: evaluations whose graph is kept.
    """

    subject: Subject
    label: str
    make: Callable[[Bench], object]
    plan: Plan
    units: int
    evaluations: int
    products: int = 0
    linearizations: int = 0


def analyze(
    study: Study,
    jobs: Sequence[Job],
    run: RunFolder,
    registry: Registry,
    question: Question,
    tell: Callable[[str], None],
) -> tuple[str, bool]:
    """Do what of an analysis is missing, write its files, and say what it found.

    Returns that as text, and whether every row could be measured: one that cannot leaves its error
    in its folder and the others alone.

    Raises UnknownName for a row that is none, Incompatible if only norms were asked for and no
    sampler has A and B, ConfigError for a question that cannot be answered: all before anything
    expensive.
    """
    rows = _rows(jobs, run, question, tell)
    asked = Analysis(study, run, registry, question, rows, _with_twins(rows, registry, run), tell)
    _check(asked)
    bench = Bench(run, ranks.first_device(study.execution), asked.progress)
    asked = _with_schedules(asked, bench)
    work = _missing(asked)
    if work:
        tell(_price(asked, work, bench))
    try:
        for number, one in enumerate(work, start=1):
            with _failing_alone(asked, one.subject, one.label):
                bench.assembly(one.plan)  # calibration has a progress of its own
                asked.progress.start(one.units)  # steps of norms and of trajectories are not alike
                asked.progress.describe(f"{number} of {len(work)}, {one.subject.name}: {one.label}")
                one.make(bench)
    finally:
        asked.progress.close()
    return "\n\n".join(_results(asked, bench)), not asked.failures


@contextmanager
def _failing_alone(asked: Analysis, subject: Subject, label: str) -> Iterator[None]:
    """Within the block one subject's failure is noted: the others' measurements go on."""
    try:
        yield
    except (StorageError, CorruptFile):  # all share disk and weights
        raise
    except Exception as error:
        asked.failures.setdefault(subject.plan.fingerprint, f"{label}: {one_line(error)}")
        write_text(subject.folder / ERROR_FILE, traceback.format_exc())


def _rows(
    jobs: Sequence[Job], run: RunFolder, question: Question, tell: Callable[[str], None]
) -> list[Subject]:
    """The rows asked for; of those that are one experiment, the first."""
    names = [job.plan.experiment.name for job in jobs]
    for name in question.rows:
        if name not in names:
            raise UnknownName("row", name, names)
    found = dict[str, Subject]()
    for job, name in zip(jobs, names, strict=True):
        if not question.rows or name in question.rows:
            subject = _subject(name, job.plan, run)
            first = found.setdefault(job.plan.fingerprint, subject)
            if first is not subject:
                tell(f"{name} is the same experiment as {first.name}, and is analyzed as that")
    return list(found.values())


def _subject(name: str, plan: Plan, run: RunFolder) -> Subject:
    folder = run.variant(name, plan.fingerprint).path.name
    return Subject(name, run.path / "analysis" / folder, plan, plan.planned_full_steps())


def _with_twins(rows: Sequence[Subject], registry: Registry, run: RunFolder) -> list[Subject]:
    """The rows and the full-precision twin of each, each once."""
    found = {row.plan.fingerprint: row for row in rows}
    for row in rows:
        twin = full_precision_twin(row.plan, registry)
        found.setdefault(twin.fingerprint, _subject("full precision", twin, run))
    return list(found.values())


def analyzed_folders(jobs: Sequence[Job], run: RunFolder, registry: Registry) -> set[str]:
    """How the names of folders that an analysis of these rows writes to end, twins included.

    They end in the fingerprint: an analysis of other rows may call a twin otherwise. Of a row whose
    images depend on their batch it is how the name begins: an analysis may have had batches of
    another size.
    """
    rows = [_subject(job.plan.experiment.name, job.plan, run) for job in jobs]
    folders = [one.folder.name.rpartition("-") for one in _with_twins(rows, registry, run)]
    mixed = {row.folder.name.rpartition("-")[0] for row in rows if row.plan.depends_on_batch}
    return {ending for _, _, ending in folders} | mixed


def _with_schedules(asked: Analysis, bench: Bench) -> Analysis:
    """The same, the rows with the steps that calibration makes full: corrections follow them."""
    wanted = [
        row
        for row in asked.rows
        if asked.wants("growth") or (asked.wants("ablation") and correctors(row.plan))
    ]
    for row in wanted:
        if parts := missing_for_schedule(row.plan, asked.run):
            asked.tell(
                f"{row.name}: calibrating {', '.join(parts)} first, which decides the steps that "
                "are corrected"
            )
    rows = list(asked.rows)
    for place, row in enumerate(asked.rows):
        if row in wanted:
            with _failing_alone(asked, row, "steps that are corrected"):
                rows[place] = replace(row, full_steps=bench.full_steps(row.plan))
    known = {row.plan.fingerprint: row for row in rows}
    subjects = [known.get(one.plan.fingerprint, one) for one in asked.subjects]
    return replace(asked, rows=rows, subjects=subjects)


def _check(asked: Analysis) -> None:
    if asked.wants("spectral"):
        _find_coefficients(asked)
    for row in asked.rows if asked.wants("residuals") or asked.wants("ablation") else []:
        if isinstance(cost := _cost(row), Uncounted):
            asked.tell(
                f"{row.name}: MACs not counted, {cost.reason}; so no recommendation within a "
                "budget, and no predicted overhead"
            )
    corrected = [row for row in asked.rows if correctors(row.plan)]
    if list(asked.question.parts) == ["ablation"] and not corrected:
        raise ConfigError(
            "analyze: the ablation changes where a row corrects, and none of the rows "
            f"{', '.join(row.name for row in asked.rows)} has a corrector; name one that has with "
            "--rows, or add callbacks: [{name: iec}] to a row"
        )
    asked.question.check(asked.study.execution.batch_size)


def _find_coefficients(asked: Analysis) -> None:
    """A and B of each subject; one whose sampler has none has no norms, but all else.

    Raises Incompatible if that leaves nothing to do.
    """
    for subject in asked.subjects:
        try:
            asked.affine[subject.plan.fingerprint] = affine_steps(subject.plan)
        except Incompatible as error:
            asked.without_norms[subject.plan.fingerprint] = str(error)
            if subject in asked.rows:
                asked.tell(f"{error}. No norms of it")
    if not asked.affine and list(asked.question.parts) == ["spectral"]:
        raise Incompatible(next(iter(asked.without_norms.values())))


def _missing(asked: Analysis) -> list[Work]:
    work = list[Work]()
    if asked.wants("spectral"):
        work += [one for subject in asked.subjects if (one := _spectral_work(asked, subject))]
    if asked.wants("growth"):
        work += _growth_work(asked)
    if asked.wants("residuals"):
        work += [one for row in asked.rows if (one := _residual_work(asked, row))]
    return work


def _spectral_work(asked: Analysis, subject: Subject) -> Work | None:
    question, affine = asked.question, asked.affine.get(subject.plan.fingerprint)
    if affine is None:
        return None
    pieces = spectral.pieces_of(subject, question)
    wanted = spectral.measurable(subject, affine, question.spectral_steps(subject.total))
    lacking = [index for index in wanted if pieces.read(step_name(index)) is None]
    if not lacking:
        return None
    rows = question.spectral_images * len(spectral.operators(affine[0], question.lambdas))
    size = torch.Size(subject.plan.model.shape).numel()
    at_once = max(question.spectral_images, asked.study.execution.batch_size)

    def make(bench: Bench) -> object:
        probe = spectral.SpectralProbe(lacking, affine, question, pieces, bench, at_once)
        return bench.run(subject.plan, question.spectral_images, [probe])

    return Work(
        subject,
        "spectral norms",
        make,
        subject.plan,
        units=len(lacking),
        evaluations=_trajectory(subject.plan) * question.spectral_images,
        products=2 * rows * len(lacking) * (min(question.iterations, size) + 1),
        linearizations=rows * len(lacking),
    )


def _growth_work(asked: Analysis) -> list[Work]:
    """The trajectories that are not there yet, each once."""
    question, work, seen = asked.question, list[Work](), set[str]()
    for row in asked.rows:
        for label, plan in growth.trajectories(row, asked.registry)[0].items():
            kept = growth.states_file(plan, question, row).read_tensor("states")
            if kept is None and plan.fingerprint not in seen:
                seen.add(plan.fingerprint)
                work.append(_trajectory_work(row, label, plan, question))
    return work


def _trajectory_work(row: Subject, label: str, plan: Plan, question: Question) -> Work:
    return Work(
        row,
        f"trajectory of {label}",
        lambda bench: growth.obtain_states(plan, question, row, bench),
        plan,
        units=row.total,
        evaluations=_trajectory(plan) * question.images,
    )


def _residual_work(asked: Analysis, row: Subject) -> Work | None:
    question = asked.question
    if why_uncorrectable(row.plan, asked.registry) is not None:
        return None
    pieces = residuals.pieces_of(row, question)
    wanted = question.residual_steps(row.total)
    lacking = [index for index in wanted if pieces.read(step_name(index)) is None]
    if not lacking:
        return None
    each = _trajectory(row.plan, row.full_steps) + residuals.EVALUATIONS * len(lacking)
    return Work(
        row,
        "residuals",
        lambda bench: residuals.run(row, lacking, question, pieces, bench),
        row.plan,
        units=len(lacking),
        evaluations=each * question.images,
    )


def _trajectory(plan: Plan, full_steps: frozenset[int] | None = None) -> int:
    expected = expected_evaluations(plan, full_steps)
    return expected.full + expected.cached


def _price(asked: Analysis, work: Sequence[Work], bench: Bench) -> str:
    """What is to be done and how long it takes, from one evaluation that is timed."""
    seconds = _seconds_per_evaluation(asked, bench)
    evaluations = sum(one.evaluations for one in work)
    linearizations = sum(one.linearizations for one in work)
    products = sum(one.products for one in work)
    least = seconds * (evaluations + LINEARIZATION * linearizations)
    told = (
        f"To do: {evaluations:,} network evaluations of one image in {len(work)} trajectories, "
        f"about {writing.duration(least)} ({1000 * seconds:.3g} ms each, timed at full precision; "
        f"simulated bits take longer{_calibrations(asked, work)})"
    )
    if not products:
        return told
    most = writing.duration(PASSES * seconds * products)
    return (
        f"{told}; {linearizations:,} linearisations and at most {products:,} products with "
        f"Jacobians, at most {most} more: searches that converge, as most do within 30 "
        f"iterations of {asked.question.iterations}, end early"
    )


def _calibrations(asked: Analysis, work: Sequence[Work]) -> str:
    """What has to be calibrated first, which no price is known of."""
    plans = {(one.subject.name, one.plan.fingerprint): one.plan for one in work}  # each read once
    lacking = ((name, uncalibrated(plan, asked.run)) for (name, _), plan in plans.items())
    told = dict.fromkeys(f"{name} ({', '.join(parts)})" for name, parts in lacking if parts)
    return f"; calibration comes on top: {', '.join(told)}" if told else ""


def _seconds_per_evaluation(asked: Analysis, bench: Bench) -> float:
    row, images = asked.rows[0], min(asked.question.images, asked.study.execution.batch_size)
    plan = full_precision_twin(row.plan, asked.registry)
    denoiser = bench.denoiser(plan, images)
    noise = Noise(0, range(images), plan.model.shape, bench.device).initial()
    taken = []
    with torch.no_grad():
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            denoiser(noise, plan.sampler.timesteps[0]).sum().item()
            taken.append(time.perf_counter() - began)
    return min(taken) / images


def _results(asked: Analysis, bench: Bench) -> list[str]:
    """Every file, and a paragraph for each row."""
    told = list[str]()
    for subject in asked.subjects:
        if subject.plan.fingerprint not in asked.failures:
            with _failing_alone(asked, subject, "results"):
                told += _subject_results(asked, subject, bench)
                (subject.folder / ERROR_FILE).unlink(missing_ok=True)
        if reason := asked.failures.get(subject.plan.fingerprint):
            told.append(f"{subject.name}\n  FAILED, {reason}; see {subject.folder / ERROR_FILE}")
    if asked.wants("ablation"):
        told += _write_ablation(asked)
    return [*told, f"Written to {asked.folder}"]


def _subject_results(asked: Analysis, subject: Subject, bench: Bench) -> list[str]:
    found = dict[str, Any]()
    if asked.wants("spectral"):
        found["spectral"] = _spectral_result(asked, subject)
    if subject in asked.rows:
        found |= _row_results(asked, subject, bench)
    return [writing.write_row(subject, found)] if found else []


def _row_results(asked: Analysis, row: Subject, bench: Bench) -> dict[str, Any]:
    found = dict[str, Any]()
    scored = _scored(asked, row)
    if asked.wants("growth"):
        found["growth"] = growth.measure(row, asked.question, bench, asked.registry)
    if asked.wants("residuals"):
        refused = why_uncorrectable(row.plan, asked.registry)
        steps = [] if refused else asked.question.residual_steps(row.total)
        pieces = _finished(residuals.pieces_of(row, asked.question), steps)
        found["residuals"] = residuals.summary(row, pieces, asked.question, refused)
        cost = _cost(row)
        if isinstance(cost, EvaluationCost) and not refused:
            plain = recommendation.uncorrected_macs(row, cost, asked.registry)
            advice = recommendation.recommend(row, pieces, cost, asked.question.budget, plain)
            found["recommendation"] = {**advice, "scored": ablation.judgements(scored)}
    if scored is not None:
        found["ablation"] = scored
    return found


def _cost(row: Subject) -> EvaluationCost | Uncounted:
    return evaluation_costs([row.plan])[0]


def _scored(asked: Analysis, row: Subject) -> dict[str, Any] | None:
    """The ablation of a row, where it is wanted and the row has a corrector."""
    if not asked.wants("ablation") or not correctors(row.plan):
        return None
    chosen = ablation.choices(row, asked.registry)
    return ablation.overheads(row, chosen, _cost(row), _ablation_results(asked))


def _ablation_results(asked: Analysis) -> Path:
    """Of the ablation if it has been run, else of the study itself, whose rows may be the same."""
    own = asked.folder / "ablation" / "results.json"
    return own if own.is_file() else asked.run.path / "results.json"


def _spectral_result(asked: Analysis, subject: Subject) -> dict[str, Any]:
    affine = asked.affine.get(subject.plan.fingerprint)
    wanted = asked.question.spectral_steps(subject.total)
    steps = [] if affine is None else spectral.measurable(subject, affine, wanted)
    pieces = _finished(spectral.pieces_of(subject, asked.question), steps)
    found = spectral.summary(subject, pieces, asked.question)
    reason = asked.without_norms.get(subject.plan.fingerprint)
    reason = (
        reason or subject.plan.sampler.uncorrectable or "their prediction takes two evaluations"
    )
    return {**found, "left_out": sorted(set(wanted) - set(steps)), "left_out_because": reason}


def _finished(pieces: Pieces, steps: Sequence[int]) -> list[dict[str, Any]]:
    found = [pieces.read(step_name(index)) for index in steps]
    assert None not in found, "everything missing was made"
    return [piece for piece in found if piece is not None]


def _write_ablation(asked: Analysis) -> list[str]:
    """The study of all rows' choices; what runs it."""
    corrected = [row for row in asked.rows if correctors(row.plan)]
    if not corrected:
        return ["Ablation: left out, no row has a corrector."]
    distinct = dict[str, tuple[Subject, ablation.Choice]]()
    for row in corrected:
        for choice in ablation.choices(row, asked.registry):
            distinct.setdefault(choice.fingerprint, (row, choice))
    kept = [choice for _, choice in distinct.values()]
    path = asked.folder / "ablation.yaml"
    ablation.write_study(path, ablation.study_of(asked.study, kept))
    count = asked.study.images.count * len(asked.study.images.each())
    each = [_trajectory(choice.plan, row.full_steps) for row, choice in distinct.values()]
    evaluations = sum(each) * count
    return [
        f"Ablation: {len(kept)} rows in {path}, which take {evaluations:,.0f} network evaluations "
        f"for {count:,} images each, and full precision. For their scores, and the measured "
        f"overheads here the next time, run\n  "
        f"iec-eval launch {path} -o {asked.folder / 'ablation'}"
    ]
