"""The built-in metrics, registered like anybody's."""

from __future__ import annotations

from iec_eval.hookspecs import hookimpl
from iec_eval.metrics.base import Metric


@hookimpl
def iec_eval_metrics() -> list[type[Metric]]:
    from iec_eval.metrics.clip_score import ClipScore
    from iec_eval.metrics.fid import FID
    from iec_eval.metrics.inception_score import InceptionScore
    from iec_eval.metrics.kid import KID
    from iec_eval.metrics.lpips import LPIPS
    from iec_eval.metrics.paired import PSNR, SSIM
    from iec_eval.metrics.precision_recall import PrecisionRecall

    return [ClipScore, FID, InceptionScore, KID, LPIPS, PSNR, PrecisionRecall, SSIM]
