"""The built-in models, registered like anybody's."""

from __future__ import annotations

from iec_eval.hookspecs import hookimpl
from iec_eval.models.base import DiffusionModel


@hookimpl
def iec_eval_models() -> list[type[DiffusionModel]]:
    from iec_eval.models import latent, unet

    return [*unet.MODELS, *latent.MODELS]
