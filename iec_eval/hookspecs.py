"""The hooks: five nouns and one event.

Registration hooks take nothing and return classes. A plugin is a module with functions of these
names, marked with :data:`hookimpl`, and an entry point in the group ``iec_eval``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from iec_eval.callbacks.base import DenoisingCallback
    from iec_eval.efficiency.base import EfficiencyMethod
    from iec_eval.metrics.base import Metric
    from iec_eval.models.base import DiffusionModel
    from iec_eval.samplers.base import Sampler

PROJECT = "iec_eval"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def iec_eval_models() -> list[type[DiffusionModel]]:  # type: ignore[empty-body]
    """Register diffusion models."""


@hookspec
def iec_eval_samplers() -> list[type[Sampler]]:  # type: ignore[empty-body]
    """Register samplers."""


@hookspec
def iec_eval_efficiency_methods() -> list[type[EfficiencyMethod]]:  # type: ignore[empty-body]
    """Register efficiency methods."""


@hookspec
def iec_eval_callbacks() -> list[type[DenoisingCallback]]:  # type: ignore[empty-body]
    """Register denoising callbacks."""


@hookspec
def iec_eval_metrics() -> list[type[Metric]]:  # type: ignore[empty-body]
    """Register metrics."""


@hookspec
def iec_eval_run_finished(result: dict[str, Any]) -> None:
    """A launch has ended and ``result`` (the content of results.json) is on disk.

    Called on rank zero only, whatever the variants' status.
    """
