"""Which multiply-accumulates count as the same work."""

from __future__ import annotations

TOLERANCE = 0.02  # costs this near each other are equal
JUST_ABOVE = 0.1  # what a rival may cost more, where nothing between is to be had


def is_near(macs: float, target: float) -> bool:
    """Whether a cost is at least 98 % and at most 110 % of another."""
    return (1 - TOLERANCE) * target <= macs <= (1 + JUST_ABOVE) * target
