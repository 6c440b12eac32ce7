"""The commands that run a study, or say what running it would take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from iec_eval.cli.options import (
    POSITIVE,
    Command,
    FiniteRange,
    bound_option,
    json_option,
    study_options,
)

SLURM_OPTIONS = (
    click.option("--slurm", is_flag=True, help="Submit it as chained SLURM jobs instead."),
    click.option("--array", type=POSITIVE, metavar="N", help="Generate in an array of N tasks."),
    click.option("--nodes", type=POSITIVE, metavar="N", help="Generate in one job of N nodes."),
    click.option(
        "--gpus-per-node",
        type=POSITIVE,
        metavar="G",
        help="GPUs, and processes, on each node that generates.",
    ),
    click.option("--partition", metavar="NAME", help="As sbatch takes it."),
    click.option("--time", metavar="LIMIT", help="Of each job, as sbatch takes it."),
    click.option("--account", metavar="NAME", help="As sbatch takes it."),
    click.option(
        "--scripts",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Your versions of the four SLURM scripts.",
    ),
    click.option("--dry-run", is_flag=True, help="Print sbatch's command lines, submit nothing."),
    click.option("--force", is_flag=True, help="Submit although an earlier launch is queued."),
    click.argument("extra", nargs=-1, metavar="[-- SBATCH_OPTIONS]"),
)


def slurm_options(command: Command) -> Command:
    """How to submit; what follows ``--`` goes to sbatch as it is."""
    for option in reversed(SLURM_OPTIONS):
        command = option(command)
    return command


@click.command()
@study_options
@slurm_options
def launch(
    study: str, overrides: tuple[str, ...], out: Path | None, slurm: bool, **options: Any
) -> None:
    """Do everything that is missing: calibrate, generate, evaluate, report.

    With --slurm as jobs that follow one another, each with the options of sbatch given after --;
    otherwise here and now.
    """
    if not slurm:
        _refuse_slurm_options(options)
    from iec_eval import workflow
    from iec_eval.slurm import Options

    if slurm:
        click.echo(workflow.submit(study, overrides, out, Options(**options)))
    else:
        _finish(workflow.launch(study, overrides, out))


def _refuse_slurm_options(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        words = "what follows the study" if given == ["extra"] else f"--{given[0]}"
        raise click.UsageError(f"{words.replace('_', '-')} is for --slurm, which is not given")


@click.command()
@study_options
def calibrate(study: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Calibrate the methods that need it and are not calibrated yet."""
    from iec_eval import workflow

    _finish(workflow.calibrate(study, overrides, out))


@click.command()
@study_options
@click.option("--shard", metavar="I/N", help="Only this share of the chunks: 0/16 to 15/16.")
def generate(study: str, overrides: tuple[str, ...], out: Path | None, shard: str | None) -> None:
    """Make the images that are missing."""
    from iec_eval import workflow

    sys.exit(workflow.generate(study, overrides, out, shard))


@click.command()
@study_options
def evaluate(study: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Score the images that are there and write results.json and the report."""
    from iec_eval import workflow

    _finish(workflow.evaluate(study, overrides, out))


@click.command()
@study_options
def report(study: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Write table.md, gallery.png and report.html again from the results."""
    from iec_eval import workflow

    for path in workflow.report(study, overrides, out):
        click.echo(path)


@click.command()
@study_options
@json_option
@click.option(
    "--tflops",
    type=FiniteRange(min=0, min_open=True),
    help="Sustained speed of one process to estimate times with: 10^12 floating-point operations "
    "a second.  [default: 15; 0.1 on a CPU, which auto is where no GPU is found, but for --scale]",
)
@click.option("--scale", metavar="P,P,...", help="Estimate for so many processes: 1,8,64,512.")
@click.option(
    "--seconds-per-image",
    multiple=True,
    metavar="[ROW=]SECONDS",
    help="With --scale: what one process needs where no run has measured it; repeatable. Without "
    "ROW the full-precision row's; other rows follow by their work.",
)
@click.option(
    "--assume",
    multiple=True,
    metavar="NAME=VALUE",
    help="With --scale: another speed than it prints at its end; repeatable.",
)
def show(
    study: str,
    overrides: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    tflops: float | None,
    scale: str | None,
    seconds_per_image: tuple[str, ...],
    assume: tuple[str, ...],
) -> None:
    """Show what a study would do, need and cost; reads no weights, works without them."""
    from iec_eval import workflow
    from iec_eval.workload import ScaleQuestion

    if scale is None and (seconds_per_image or assume):
        raise click.UsageError("--seconds-per-image and --assume need --scale")
    asked = None if scale is None else ScaleQuestion(scale, seconds_per_image, assume)
    click.echo(workflow.show(study, overrides, out, as_json=as_json, tflops=tflops, scale=asked))


@click.command()
@study_options
@click.option("--rows", multiple=True, metavar="NAME", help="Only this row; repeatable.")
@click.option(
    "--what",
    default="spectral,growth,residuals,ablation",
    show_default=True,
    metavar="PART,...",
    help="Which parts; residuals come with a recommendation.",
)
@bound_option("--images", 8, "Images for growth and residuals, denoised together.")
@bound_option("--spectral-images", 2, "Images for spectral norms.")
@bound_option("--steps", None, "Evenly spaced steps [default: 10 for norms, all for residuals].")
@bound_option("--iterations", 200, "Of the search for a norm, at most.")
@click.option("--lambdas", metavar="X,X,...", help="For ||grad G|| [default: 0.1,0.2,...,1].")
@click.option(
    "--budget",
    type=FiniteRange(min=0),
    default=0.1,
    show_default=True,
    metavar="SHARE",
    help="What recommended corrections may add to a row's multiply-accumulates.",
)
def analyze(
    study: str, overrides: tuple[str, ...], out: Path | None, what: str, **bounds: Any
) -> None:
    """Measure what correction does: norms, error growth, residuals; recommend steps and lambda.

    On each row's network as it is deployed, and at full precision. Says first what it will take,
    resumes, and writes JSON, CSV and plots under OUT/analysis.
    """
    from iec_eval import workflow
    from iec_eval.analysis.question import Question, lambdas_listed, parts_named

    lambdas = bounds.pop("lambdas")
    if lambdas is not None:
        bounds["lambdas"] = lambdas_listed(lambdas)
    found, whole = workflow.analyze(study, overrides, out, Question(parts_named(what), **bounds))
    click.echo(found)
    sys.exit(0 if whole else 1)


def _finish(outcome: Any) -> None:
    """Print the table and end with status 1 if a variant failed; other ranks stay silent."""
    if outcome is None:
        return
    click.echo(outcome.text)
    sys.exit(0 if outcome.complete else 1)
