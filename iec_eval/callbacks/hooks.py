"""The built-in denoising callbacks, registered like anybody's."""

from __future__ import annotations

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.hookspecs import hookimpl


@hookimpl
def iec_eval_callbacks() -> list[type[DenoisingCallback]]:
    from iec_eval.callbacks.epsilon_scaling import EpsilonScaling
    from iec_eval.callbacks.iec import IEC
    from iec_eval.callbacks.look_ahead import LookAhead
    from iec_eval.callbacks.scale_matched import ScaleMatched
    from iec_eval.callbacks.self_consistent import SelfConsistent
    from iec_eval.callbacks.time_shift import TimeShift

    return [IEC, EpsilonScaling, LookAhead, ScaleMatched, SelfConsistent, TimeShift]
