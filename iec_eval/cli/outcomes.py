"""The commands that read a run folder: what is done, and what came of it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from iec_eval.cli.options import format_option, json_option


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def status(out: Path, as_json: bool) -> None:
    """Show what of the run folder OUT is done, running, missing and failed; changes nothing.

    With SLURM jobs and their states, and the time that the rest will take.
    """
    from iec_eval import status as look

    click.echo(look.report(out, as_json=as_json))


@click.command()
@click.argument("out", nargs=-1, required=True, type=click.Path(path_type=Path))
@format_option("md", "csv", "json", "latex")
@json_option
def table(out: tuple[Path, ...], style: str, as_json: bool) -> None:
    """Print the table of one or several run folders."""
    from iec_eval import workflow

    click.echo(workflow.table(out, "json" if as_json else style))


@click.command()
@click.argument("out", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--row", "rows", multiple=True, metavar="NAME", help="Only this row; repeatable.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Only this; repeatable.")
@format_option("md", "json")
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


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--variant", help="Only this row; its name or the start of its folder's name.")
def export(out: Path, folder: Path, variant: str | None) -> None:
    """Write the images of run folder OUT as PNG files under FOLDER.

    Ends with status 1 if some of the study's images are not there.
    """
    from iec_eval import workflow

    outcome = workflow.export(out, folder, variant)
    click.echo(outcome.text)
    sys.exit(0 if outcome.complete else 1)
