"""Which steps run the whole network, as pure functions.

A schedule is the sorted list of full steps of a run of T steps, step 0 first; the steps after each
until the next recall what it stored. The interval N says how many there are: about T / N.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

Rows = list[list[float]]
POWER_STEP = 0.02  # a centred power is lowered by so much until all its steps differ


def uniform_schedule(total: int, interval: int) -> list[int]:
    """S = {0, N, 2N, ...} below T."""
    return list(range(0, total, interval))


def power_schedule(total: int, interval: int, power: float = 1.5) -> list[int]:
    """Denser at the start: floor(u^p) for ceil(T / N) values of u, even from 0 below T^(1/p).

    Equal steps are one, so there may be fewer than ceil(T / N). With p = 1 about the uniform one.

    Source: Ma et al., DeepCache (CVPR 2024), its non-uniform 1:N inference as released for LDMs.
    """
    count = math.ceil(total / interval)
    points = np.linspace(0, total ** (1 / power), count + 1)[:-1].tolist()
    # u^p of a whole number may come out just below it: rounded down all the same, as released
    return sorted({int(u**power) for u in points})


def centred_power_schedule(
    total: int, interval: int, power: float = 1.2, center: int = 0
) -> list[int]:
    """Densest around step c: c + sign(u) |u|^p for ceil(T / N) even values of u.

    u goes from -c^(1/p) to (T - c)^(1/p), its last value left out and the first taken as step 0;
    |u|^p is rounded down. The power is lowered by 0.02, to no less than 1, until all steps differ.

    Source: Ma et al., DeepCache (CVPR 2024), its non-uniform 1:N inference. The released code
    takes the power of negative numbers and drops the imaginary part; here the power is signed.
    """
    count = math.ceil(total / interval)
    while True:
        steps = _centred(total, count, power, center)
        if len(steps) == count or power <= 1:
            return steps
        power = max(1.0, power - POWER_STEP)


def _centred(total: int, count: int, power: float, center: int) -> list[int]:
    low, high = -(center ** (1 / power)), (total - center) ** (1 / power)
    points = np.linspace(low, high, count + 1)[1:-1].tolist()
    return sorted({0, *(center + int(math.copysign(abs(u) ** power, u)) for u in points)})


def group_limits(total: int, interval: int) -> tuple[int, int]:
    """Least and largest number of steps in a group of :func:`dps_schedule`."""
    return min(math.ceil(interval / 2), total), 2 * interval


def dps_schedule(distances: Tensor, interval: int, *, limited: bool = True) -> list[int]:
    """The ceil(T / N) groups with the least sum of distances to each group's first step.

    Args:
        distances: ``[T, L]``, of step j's feature to that of step j + l, l = 0..L-1. Where L is
            too short for a group, such a group is left out.
        interval: N.
        limited: groups have ceil(N / 2) to 2N steps; False: any number.

    O(G T L) additions. Of equally good schedules the one whose last groups are longest is taken.
    Raises ValueError if no schedule fits, which ``limited`` ones with L >= 2N always do.

    Source: Liu et al., CacheQuant (CVPR 2025), dynamic programming schedule.
    """
    total, length = distances.shape
    least, most = group_limits(total, interval) if limited else (1, total)
    lengths = range(least, min(most, length) + 1)
    cost: Rows = distances.double().cumsum(1).tolist()  # of the group of l + 1 steps from j
    best, starts = [0.0] + [math.inf] * total, list[list[int]]()
    for _ in range(math.ceil(total / interval)):
        best, start = _one_more_group(best, cost, lengths)
        starts.append(start)
    if not math.isfinite(best[total]):
        raise ValueError(f"no schedule of {total} steps has groups of at most {length} steps")
    schedule, end = list[int](), total
    for start in reversed(starts):
        end = start[end]
        schedule.append(end)
    return schedule[::-1]


def _one_more_group(best: list[float], cost: Rows, lengths: range) -> tuple[list[float], list[int]]:
    """The least cost of the first n steps with one more group, and where that group starts."""
    after, starts = [math.inf] * len(best), [0] * len(best)
    for end in range(len(best)):
        begins = [end - length for length in lengths if length <= end]
        found = [(best[j] + cost[j][end - j - 1], j) for j in begins]
        if found:
            after[end], starts[end] = min(found)
    return after, starts
