"""Options and arguments that several commands have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
POSITIVE, NATURAL = click.IntRange(min=1), click.IntRange(min=0)


class FiniteRange(click.FloatRange):
    """A number in a range, which nan and infinity are in for click."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return found


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


def format_option(*forms: str) -> Callable[[Command], Command]:
    """How to print a table, Markdown unless said otherwise."""
    return click.option(
        "-f",
        "--format",
        "style",
        default="md",
        show_default=True,
        type=click.Choice(forms),
        help="How to print it.",
    )
