"""What an analysis is asked, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iec_eval.analysis.lanczos import MAX_ITERATIONS
from iec_eval.errors import ConfigError, UnknownName

PARTS = ("spectral", "growth", "residuals", "ablation")
LAMBDAS = tuple(round(0.1 * i, 1) for i in range(1, 11))
SPECTRAL_STEPS = 10  # unless another number is asked for: they are what takes long


@dataclass(frozen=True)
class Question:
    """Parts, rows and bounds of an analysis.

    Attributes:
        parts: some of ``PARTS``, in their order.
        rows: names of the study's rows; none: all of them.
        images: denoised together, for growth and residuals; see :func:`.bench.first_image`.
        spectral_images: the first so many, for spectral norms.
        steps: at most so many of the steps, evenly spaced with both ends; None: 10 for spectral
            norms, all for residuals. Growth always follows whole trajectories.
        lambdas: relaxations for which the norm of grad G is measured.
        iterations: of the Lanczos search, at most.
        budget: extra multiply-accumulates that a recommendation may spend, as a share of the row's
            own without correction.
    """

    parts: Sequence[str] = PARTS
    rows: Sequence[str] = ()
    images: int = 8
    spectral_images: int = 2
    steps: int | None = None
    lambdas: Sequence[float] = LAMBDAS
    iterations: int = MAX_ITERATIONS
    budget: float = 0.1

    def spectral_steps(self, total: int) -> list[int]:
        """Steps whose spectral norms are wanted."""
        return spaced(total, self.steps or SPECTRAL_STEPS)

    def residual_steps(self, total: int) -> list[int]:
        """Steps whose residuals are wanted."""
        return spaced(total, self.steps or total)

    def check(self, batch_size: int) -> None:
        """Raise ConfigError if more images are asked for than are denoised together."""
        asked = {self.spectral_images} if "spectral" in self.parts else {0}
        asked |= {self.images} if {"growth", "residuals"} & set(self.parts) else {0}
        wanted = max(asked)
        if wanted > batch_size:
            raise ConfigError(
                f"analyze: {wanted} images wanted, which are denoised together, and the study's "
                f"execution.batch_size is {batch_size}; take fewer, or raise it with "
                f"-s execution.batch_size={wanted}"
            )


def spaced(total: int, count: int) -> list[int]:
    """``count`` of the steps 0 .. total - 1, evenly spaced with both ends; all if it has fewer."""
    if count >= total:
        return list(range(total))
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def parts_named(text: str) -> list[str]:
    """Parts from their names with commas between.

    Raises UnknownName for a name that is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise UnknownName("part of the analysis", name, PARTS)
    if not names:
        raise ConfigError(f"--what: wanted some of {', '.join(PARTS)}, got nothing")
    return [part for part in PARTS if part in names]


def lambdas_listed(text: str) -> list[float]:
    """Relaxations from numbers with commas between, rising, each once.

    Raises ConfigError for what is no number in (0, 2].
    """
    try:
        found = sorted({float(number) for number in text.split(",")})
    except ValueError:
        raise ConfigError(
            f"--lambdas {text!r}: wanted numbers with commas, as 0.25,0.5,1"
        ) from None
    if not all(0 < value <= 2 for value in found):
        raise ConfigError(f"--lambdas {text!r}: wanted numbers above 0, at most 2")
    return found
