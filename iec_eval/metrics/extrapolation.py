"""FID of infinitely many images (Chong & Forsyth, CVPR 2020, section 4.1), with its derivative.

The FID of N images is too high by a term that is linear in 1/N, so that a line through the FIDs of
fewer images points at the one without it. Chong & Forsyth fit it to 15 random subsets; here the
images are cut into 1, 2 and 3 parts and the mean FID of the parts stands for its size: every image
counts at every size, which leaves the line less noise and takes 6 distances instead of 15.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from iec_eval.intervals import Estimate, parts_of
from iec_eval.metrics.frechet import FrechetDistance, FrechetTangent
from iec_eval.metrics.statistics import Moments

CUTS = (1, 2, 3)  # into how many parts
LEAST = 2  # images per dimension of a feature in the smallest part: below, 1/N is no line

Again = Iterable[tuple[Any, Tensor]]


def needed(dimensions: int) -> int:
    """Images that extrapolation takes, for features of so many dimensions."""
    return LEAST * max(CUTS) * dimensions


def intercept_weights(places: Sequence[float]) -> Tensor:
    """What the values at ``places`` of a least-squares line count at 0; they sum to one."""
    x = torch.tensor(places, dtype=torch.float64)
    centred = x - x.mean()
    return 1 / len(x) - x.mean() * centred / (centred**2).sum()


def influence_of_all(
    tangents: Sequence[FrechetTangent], again: Again, listed: Tensor, part: Tensor
) -> Tensor:
    """Each image's influence ``[N]`` on the distance of its own part.

    ``listed [N]`` are the images' indices, sorted, ``part [N]`` says which of ``tangents`` is each
    one's.
    """
    found = torch.empty(len(listed), dtype=torch.float64)
    for features, indices in again:
        places = torch.searchsorted(listed, indices)
        for number, tangent in enumerate(tangents):
            rows = part[places] == number
            found[places[rows]] = tangent.influence(features.features[rows])
    return found


def extrapolate(
    distance: FrechetDistance, whole: Estimate, again: Again, listed: Tensor
) -> Estimate:
    """The distance at 1/N = 0, from that of all images (``listed [N]``) and those of parts.

    For each cut two passes over the images and, in float64, two matrices ``[D, D]`` a part.
    """
    assert whole.influence is not None
    count = len(listed)
    places, estimates = [1.0], [whole]
    for cut in CUTS[1:]:
        part = parts_of(listed.tolist(), cut)
        tangents = _tangents(distance, again, listed, part, cut)
        sizes = torch.tensor([float(one.count) for one in tangents], dtype=torch.float64)
        shares = (count / (cut * sizes))[part]
        influence = shares * influence_of_all(tangents, again, listed, part)
        estimates.append(Estimate(sum(one.distance for one in tangents) / cut, influence))
        places.append(float((count / sizes).mean()))
    weights = intercept_weights(places)
    values = torch.tensor([one.value for one in estimates], dtype=torch.float64)
    influences = torch.stack([one.influence for one in estimates if one.influence is not None])
    return Estimate(float(weights @ values), weights @ influences)


def _tangents(
    distance: FrechetDistance, again: Again, listed: Tensor, part: Tensor, cut: int
) -> list[FrechetTangent]:
    moments: list[Moments] = []
    for features, indices in again:
        vectors = features.features
        moments = moments or [Moments(vectors.shape[1]) for _ in range(cut)]
        where = part[torch.searchsorted(listed, indices)]
        for number, one in enumerate(moments):
            if bool((where == number).any()):
                one.update(vectors[where == number])
    return [distance.at(one.mean, one.covariance(), one.count) for one in moments]
