"""The built-in denoising callbacks, registered like anybody's."""

from __future__ import annotations

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.hookspecs import hookimpl


@hookimpl
def iec_eval_callbacks() -> list[type[DenoisingCallback]]:
    from iec_eval.callbacks.iec import IEC

    return [IEC]
