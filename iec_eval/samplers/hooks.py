"""The built-in samplers, registered like anybody's."""

from __future__ import annotations

from iec_eval.hookspecs import hookimpl
from iec_eval.samplers.base import Sampler


@hookimpl
def iec_eval_samplers() -> list[type[Sampler]]:
    from iec_eval.samplers.ddim import DDIM
    from iec_eval.samplers.diffusers import DiffusersSampler
    from iec_eval.samplers.plms import PLMS

    return [DDIM, PLMS, DiffusersSampler]
