"""Contract checks for plugin authors, one line each, in any test framework.

    def test_my_sampler() -> None:
        check_sampler(MySampler, {"steps": 8})

Each ``check_*`` builds the class from its options, runs it on a tiny network, and raises
AssertionError saying which property does not hold. Properties have names; ``skip`` leaves some
out, for a class that breaks one on purpose and says so.
"""

from __future__ import annotations

from iec_eval.testing.callbacks import check_callback
from iec_eval.testing.efficiency import check_efficiency_method
from iec_eval.testing.metrics import check_metric
from iec_eval.testing.models import check_model
from iec_eval.testing.samplers import check_sampler
from iec_eval.testing.tiny import TinyModel

__all__ = [
    "TinyModel",
    "check_callback",
    "check_efficiency_method",
    "check_metric",
    "check_model",
    "check_sampler",
]
