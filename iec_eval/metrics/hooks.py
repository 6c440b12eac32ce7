"""The built-in metrics, registered like anybody's."""

from __future__ import annotations

from iec_eval.hookspecs import hookimpl
from iec_eval.metrics.base import Metric


@hookimpl
def iec_eval_metrics() -> list[type[Metric]]:
    from iec_eval.metrics.fid import FID
    from iec_eval.metrics.inception_score import InceptionScore

    return [FID, InceptionScore]
