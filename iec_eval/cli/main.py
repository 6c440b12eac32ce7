"""The ``iec-eval`` command: parse, call one verb of the workflow, print.

Only click is imported at start-up, so that ``--help`` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from iec_eval import __version__, processes
from iec_eval.errors import IecEvalError
from iec_eval.stopping import Terminated, ending_when_asked

Command = TypeVar("Command", bound=Callable[..., Any])
POSITIVE, NATURAL = click.IntRange(min=1), click.IntRange(min=0)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class ErrorBoundary(click.Group):
    """Turns the project's errors and interruptions into one message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with ending_when_asked():
                return super().invoke(ctx)
        except IecEvalError as error:
            click.echo(f"iec-eval{processes.name()}: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            _say_kept("interrupted")
            sys.exit(130)
        except Terminated as error:
            _say_kept("asked to stop")
            sys.exit(error.status)


def _say_kept(what: str) -> None:
    if not processes.leads():
        return
    click.echo(
        f"\niec-eval: {what}; everything finished is kept, run the same command again to go on",
        err=True,
    )


@click.group(cls=ErrorBoundary, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="iec-eval")
def cli() -> None:
    """Evaluate efficient diffusion models, with and without iterative error correction.

    STUDY is the path of a study file or the name of a packaged one, such as quickstart.
    """


def study_options(command: Command) -> Command:
    """The argument STUDY with overrides and output folder."""
    command = click.option(
        "-o", "--out", type=click.Path(path_type=Path), help="Run folder [default: runs/<study>]."
    )(command)
    command = click.option(
        "-s",
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key of the study, as in -s images.count=128; repeatable.",
    )(command)
    return click.argument("study")(command)


def bound_option(name: str, default: int | None, text: str) -> Callable[[Command], Command]:
    """An option that takes a number from 1."""
    shown = default is not None
    return click.option(
        name, type=POSITIVE, default=default, show_default=shown, metavar="N", help=text
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON value.")


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


@cli.command()
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


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def status(out: Path, as_json: bool) -> None:
    """Show what of the run folder OUT is done, running, missing and failed; changes nothing.

    With SLURM jobs and their states, and the time that the rest will take.
    """
    from iec_eval import status as look

    click.echo(look.report(out, as_json=as_json))


@cli.command()
@study_options
def calibrate(study: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Calibrate the methods that need it and are not calibrated yet."""
    from iec_eval import workflow

    _finish(workflow.calibrate(study, overrides, out))


@cli.command()
@study_options
@click.option("--shard", metavar="I/N", help="Only this share of the chunks: 0/16 to 15/16.")
def generate(study: str, overrides: tuple[str, ...], out: Path | None, shard: str | None) -> None:
    """Make the images that are missing."""
    from iec_eval import workflow

    sys.exit(workflow.generate(study, overrides, out, shard))


@cli.command()
@study_options
def evaluate(study: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Score the images that are there and write results.json and the report."""
    from iec_eval import workflow

    _finish(workflow.evaluate(study, overrides, out))


@cli.command()
@study_options
def report(study: str, overrides: tuple[str, ...], out: Path | None) -> None:
    """Write table.md, gallery.png and report.html again from the results."""
    from iec_eval import workflow

    for path in workflow.report(study, overrides, out):
        click.echo(path)


@cli.command()
@study_options
@json_option
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    default=15.0,
    show_default=True,
    help="Sustained speed to estimate times with: 10^12 floating-point operations a second.",
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
    tflops: float,
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


@cli.command()
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
    type=click.FloatRange(min=0),
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
    click.echo(workflow.analyze(study, overrides, out, Question(parts_named(what), **bounds)))


@cli.command()
@click.argument("out", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-f",
    "--format",
    "style",
    default="md",
    show_default=True,
    type=click.Choice(["md", "csv", "json", "latex"]),
    help="How to print it.",
)
@json_option
def table(out: tuple[Path, ...], style: str, as_json: bool) -> None:
    """Print the table of one or several run folders."""
    from iec_eval import workflow

    click.echo(workflow.table(out, "json" if as_json else style))


@cli.command()
@click.argument("out", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--row", "rows", multiple=True, metavar="NAME", help="Only this row; repeatable.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Only this; repeatable.")
@click.option(
    "-f",
    "--format",
    "style",
    default="md",
    show_default=True,
    type=click.Choice(["md", "json"]),
    help="How to print it.",
)
@json_option
def compare(
    out: tuple[Path, ...],
    rows: tuple[str, ...],
    metrics: tuple[str, ...],
    style: str,
    as_json: bool,
) -> None:
    """Print rows of two or more run folders side by side, with differences from the first.

    Refuses runs that were measured in different ways.
    """
    from iec_eval import workflow

    click.echo(workflow.compare(out, "json" if as_json else style, rows, metrics))


@cli.command()
@json_option
def plugins(as_json: bool) -> None:
    """List what is installed: distributions, their hooks and names, and broken ones."""
    from iec_eval import workflow

    click.echo(workflow.plugins(as_json=as_json))


@cli.command()
@json_option
def models(as_json: bool) -> None:
    """List the models, samplers, methods, callbacks and metrics, with their options."""
    from iec_eval import workflow

    click.echo(workflow.parts(as_json=as_json))


@cli.command()
@click.argument("images")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--features", default="inception", show_default=True, help="Feature network.")
@click.option("--weights", help="Weights file of the feature network.")
@click.option(
    "--crop",
    type=click.Choice(["center", "none"]),
    default="center",
    show_default=True,
    help="The middle square, or all of the image.",
)
@click.option("--pad", type=NATURAL, default=0, show_default=True, help="Black border in pixels.")
@click.option("--size", type=POSITIVE, help="Final side length in pixels.")
@click.option(
    "--resize",
    type=click.Choice(["area", "bilinear", "bicubic", "lanczos", "adm", "none"]),
    default="area",
    show_default=True,
    help="How to get to --size: average of areas, a filter of PIL's, guided-diffusion's box and "
    "bicubic, or not at all.",
)
@click.option("--channels", type=click.Choice(["1", "3"]), help="Final number of channels.")
@click.option("--count", type=POSITIVE, help="Only the first COUNT images.")
@click.option(
    "--keep-features",
    type=POSITIVE,
    metavar="N",
    help="Store the features of N images too, for kid and precision-recall.",
)
@click.option(
    "--statistics",
    type=click.Choice(["pytorch-fid", "guided-diffusion", "edm"]),
    help="IMAGES is an .npz file of this project's statistics, of COUNT images if that is given.",
)
def reference(images: str, out: Path, **options: Any) -> None:
    """Make reference statistics OUT from IMAGES.

    IMAGES is a folder, a .zip or .npz file or torchvision:NAME:ROOT:SPLIT; with --statistics an
    .npz file of published statistics. Both need the weights of the feature network.
    """
    from iec_eval import references

    click.echo(references.make(images, out, **options))


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--variant", help="Only this row; its name or the start of its folder's name.")
def export(out: Path, folder: Path, variant: str | None) -> None:
    """Write the images of run folder OUT as PNG files under FOLDER."""
    from iec_eval import workflow

    click.echo(workflow.export(out, folder, variant))


@cli.command()
@click.argument("images")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--samples",
    type=NATURAL,
    default=5000,
    show_default=True,
    help="Samples to measure the FID of; 0 measures nothing.",
)
@click.option("--test", "test_images", help="Held-out images, for accuracy and the FID floor.")
@click.option("--tag", required=True, help="Names the scores: fid-TAG.")
@click.option("--steps", type=POSITIVE, default=9000, show_default=True, help="Denoiser steps.")
@click.option("--epochs", type=POSITIVE, default=15, show_default=True, help="Classifier epochs.")
@click.option("--pad", type=NATURAL, default=0, show_default=True, help="Black border in pixels.")
@click.option("--size", type=POSITIVE, help="Final side length in pixels.")
@click.option("--channels", type=click.Choice(["1", "3"]), help="Final number of channels.")
@click.option("--threads", type=POSITIVE, help="CPU threads.")
def train(images: str, out: Path, **options: Any) -> None:
    """Train a small model on IMAGES into the folder OUT; resumes.

    Makes what the packaged model has: network, feature network, reference statistics.
    """
    from iec_eval import workflow

    click.echo(workflow.train(images, out, **options))


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--family",
    required=True,
    metavar="NAME",
    help="ddpm-cifar10, ldm-lsun-churches, ldm-lsun-bedrooms, ldm-imagenet or stable-diffusion-v1.",
)
@click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    help="Averaged or raw weights: which to take where the file has both, which they are where "
    "it does not say.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The YAML that CHECKPOINT was published with, for other sizes than the family's.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Folder with vocab.json and merges.txt, which Stable Diffusion's file lacks.",
)
def convert(checkpoint: Path, out: Path, **options: Any) -> None:
    """Convert an original CHECKPOINT into the folder OUT, in diffusers' layout; resumes.

    CHECKPOINT is a .ckpt, .pth or .safetensors file of latent diffusion, Stable Diffusion v1 or
    the DDIM code. Nothing in it is run, and little memory is needed. OUT/conversion.json says
    what was made from what. Progress goes to stderr.
    """
    from iec_eval.conversion.convert import convert as convert_checkpoint

    click.echo(convert_checkpoint(checkpoint, out, **options))


def _finish(outcome: Any) -> None:
    """Print the table and end with status 1 if a variant failed; other ranks stay silent."""
    if outcome is None:
        return
    click.echo(outcome.text)
    sys.exit(0 if outcome.complete else 1)
