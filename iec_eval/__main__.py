"""``python -m iec_eval`` is the same program as ``iec-eval``."""

from iec_eval.cli.main import cli

if __name__ == "__main__":
    cli(prog_name="iec-eval")
