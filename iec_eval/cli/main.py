"""The ``iec-eval`` command: parse, call one verb of the workflow, print.

Only click is imported at start-up, so that ``--help`` is instant.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from iec_eval import __version__, processes
from iec_eval.cli import outcomes, studies, supplies
from iec_eval.errors import IecEvalError
from iec_eval.stopping import Terminated, ending_when_asked

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


for command in (
    studies.launch,
    outcomes.status,
    studies.calibrate,
    studies.generate,
    studies.evaluate,
    studies.report,
    studies.show,
    studies.analyze,
    outcomes.table,
    outcomes.compare,
    supplies.plugins,
    supplies.models,
    supplies.reference,
    outcomes.export,
    supplies.train,
    supplies.convert,
):
    cli.add_command(command)
