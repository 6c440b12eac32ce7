"""Look-ahead refresh: spend a cached run's full evaluations where the next steps will be.

A refresh step of a cached run evaluates the whole network at x_i, and the cached steps after it
recall a feature of a sample they have left. Here the step is taken from the cheap path, and the
one full evaluation is made at the sample it leads to.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.callbacks.iec import PREDICTIONS
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.errors import Incompatible
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler


class LookAheadOptions(BaseOptions):
    """Options of look-ahead refresh."""

    weight: float = Field(
        0.0,
        description="share of the full evaluation in the step's prediction; 0: the cheap path's "
        "alone, 0.5: their mean, as IEC would take it",
    )


class LookAhead(DenoisingCallback):
    """At full steps but the first: ``e = cheap(x_i)``, then a full evaluation at the estimate.

    With x^(0) the sample that e leads to, the step takes ``(1 - w) e + w full(x^(0), tau_i)``,
    and the cache holds the feature of the latter. As many full evaluations as without it, and a
    cached one more at each of these steps. Changes nothing in a run without a cache.
    """

    name = "look-ahead"
    Options = LookAheadOptions
    options: LookAheadOptions

    def check(self, sampler: Sampler, clock: Clock) -> None:
        """Raise Incompatible where the sample a prediction leads to is no estimate of the next."""
        if sampler.uncorrectable:
            raise Incompatible(f"look-ahead: sampler {sampler.name}: {sampler.uncorrectable}")
        if sampler.predictions - PREDICTIONS:
            raise Incompatible(
                "look-ahead: takes the noise predicted at another sample for that of its own; this "
                f"run predicts {', '.join(sorted(sampler.predictions))}"
            )

    def evaluate(self, step: Step) -> Tensor | None:
        if step.index == 0 or not step.full or not step.caches:
            return None
        cheap = step.predict(step.sample, full=False)
        ahead = step.predict(step.preview(cheap), level="next", full=True)
        return cheap.lerp(ahead, self.options.weight) if self.options.weight else cheap

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction
