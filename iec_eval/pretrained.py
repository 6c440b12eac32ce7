"""Models of the package transformers: optional, read from folders, never with silent gaps."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iec_eval.errors import ConfigError, CorruptFile


def require_transformers(user: str) -> None:
    """Raise ConfigError, naming what needs it, unless transformers is installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            f"{user} needs the package transformers, which is not installed: "
            'pip install "iec-eval[text]"'
        )


def transformers_for(user: str) -> Any:
    """The package, imported when first needed: it is slow to import.

    Raises ConfigError, naming what needs it, unless it is installed.
    """
    require_transformers(user)
    return importlib.import_module("transformers")


def load_model(kind: Any, folder: Path) -> Any:
    """A transformers model in float32 and eval mode, every weight from its safetensors files.

    Raises CorruptFile if they are damaged or some are missing.
    """
    try:
        with quiet():
            model, report = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # safetensors', transformers' and torch's, by version
        raise CorruptFile(f"{folder}: weights cannot be read ({_first(error)})") from error
    # transformers would go on with random ones
    lacking = [str(key) for key in report["missing_keys"]]
    if lacking or report["mismatched_keys"]:
        wrong = sorted([*lacking, *map(str, report["mismatched_keys"])])[:3]
        raise CorruptFile(f"{folder}: weights missing or of another shape: {', '.join(wrong)}")
    return model.float().eval().requires_grad_(False)


def load_part(kind: Any, folder: Path, what: str) -> Any:
    """A tokenizer or processor; ``what`` names it in the message.

    Raises CorruptFile if it cannot be read.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers has its own exceptions, all plain Exception
        raise CorruptFile(f"{folder}: its {what} cannot be read ({_first(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and warnings: what matters is raised."""
    logging = importlib.import_module("transformers").utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
