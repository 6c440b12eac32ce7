"""The grouped jackknife of any metric, through its ``update``, ``merge_state`` and ``compute``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from iec_eval import processes
from iec_eval.intervals import FEWEST, GROUPS, Estimate, groups_of, is_spread
from iec_eval.metrics.base import Metric

Batches = Iterable[tuple[Any, Tensor]]
_State = dict[str, Any]


def with_groups(
    metric: Metric, estimates: Mapping[str, Estimate], again: Batches
) -> dict[str, Estimate]:
    """``estimates``, those without influence values computed without each group of images too.

    Spreads are left as they are, and so is everything of fewer than two images a group. A metric
    that cannot be computed of fewer images is named on stderr and has no interval. The metric's
    states are used up. Batches are tensors, or can be indexed by a mask as they can.
    """
    lacking = [
        name
        for name, one in estimates.items()
        if one.influence is None and one.without is None and not is_spread(name)
    ]
    listed = [index for _, indices in again for index in indices.tolist()] if lacking else []
    if len(listed) < FEWEST:
        return dict(estimates)
    group_of = dict(zip(listed, groups_of(listed).tolist(), strict=True))
    try:
        values = _values_without_groups(metric, again, group_of)
        computed = [name for name in lacking if all(name in one for one in values)]
        made = {name: _tensor([one[name] for one in values]) for name in computed}
    except Exception as error:  # its number is there; only the interval is not
        _tell_lacking(metric, lacking, f"{type(error).__name__}: {error}")
        return dict(estimates)
    finite = {name: one for name, one in made.items() if one.isfinite().all()}
    if other := [name for name in lacking if name not in computed]:
        _tell_lacking(metric, other, "compute() does not give it")
    if undefined := [name for name in computed if name not in finite]:
        _tell_lacking(metric, undefined, "it is not finite")
    return {
        **estimates,
        **{name: replace(estimates[name], without=finite[name]) for name in finite},
    }


def _tell_lacking(metric: Metric, names: Sequence[str], why: str) -> None:
    processes.say(
        f"{metric.name}: no confidence interval for {', '.join(names)}; without a {GROUPS}th "
        f"of the images it cannot be computed ({why})"
    )


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _values_without_groups(
    metric: Metric, again: Batches, group_of: Mapping[int, int]
) -> list[dict[str, float]]:
    states = _group_states(metric, again, group_of)
    values = []
    for left_out in range(GROUPS):
        metric.reset()
        for group, state in enumerate(states):
            if group != left_out:
                metric.merge_state(state)
        with warnings.catch_warnings():
            # torchmetrics warns of a compute() before any update(), which merging makes possible
            warnings.simplefilter("ignore", UserWarning)
            values.append(metric.compute())
    return values


def _group_states(metric: Metric, again: Batches, group_of: Mapping[int, int]) -> list[_State]:
    """The metric's states after seeing the images of one group only, for each group."""
    metric.reset()
    states = [_state(metric) for _ in range(GROUPS)]
    for batch, indices in again:
        groups = torch.tensor([group_of[index] for index in indices.tolist()])
        for group in groups.unique().tolist():
            metric.reset()
            metric.update(batch[groups == group], indices[groups == group])
            metric.merge_state(states[group])
            states[group] = _state(metric)
    return states


def _state(metric: Metric) -> _State:
    # lists are emptied by reset(); tensors are replaced
    return {
        name: list(value) if isinstance(value, list) else value.clone()
        for name, value in metric.metric_state.items()
    }
