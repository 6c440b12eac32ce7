"""How sure a number is: 95 % confidence intervals, of one number and of a paired difference.

Every metric here is a functional of the empirical distribution of N images. Its *influence values*
are its derivatives with respect to the weights of the images, times N, centred (the infinitesimal
jackknife: Jaeckel 1972; Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans",
section 6). Their standard deviation over sqrt(N) is the standard error. Two rows that start
from the same noise have their influence values image by image, so the standard error of their
difference is that of the differences, which counts what they have in common only once.

Where a metric has no derivative it is computed without each of G groups of images in turn (the
grouped jackknife: Efron 1982, section 2.2), the same groups for all rows.

What resampling would do instead is biased for FID: a resample repeats images, which makes a
covariance smaller than that of as many different images.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

GROUPS = 20
FEWEST = 2 * GROUPS  # images, below which a standard error says nothing
LEVEL = 0.95
Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A number, with what its interval is made of.

    Attributes:
        value: the number; the mean over seeds where there are several.
        influence: float64 ``[N]``, in the order of the images' indices: the derivative of the
            number with respect to the weight of each image, times N, less its mean. None where
            there is none. Of S seeds ``[S N]``, seed after seed.
        without: float64 ``[G]``, the number without each of :data:`GROUPS` groups of images, as
            :func:`groups_of` groups them; for a number without influence values. Of S seeds
            ``[S, G]``. Empty where nothing may tell how sure the number is: see :meth:`unsure`.
        by_seed: the number of each seed; empty for that of one.
    """

    value: float
    influence: Tensor | None = None
    without: Tensor | None = None
    by_seed: tuple[float, ...] = ()

    @classmethod
    def mean(cls, of_seeds: Sequence[Estimate]) -> Estimate:
        """The mean of one number over seeds, which are independent of each other."""
        values = tuple(one.value for one in of_seeds)
        return cls(
            math.fsum(values) / len(values),
            _joined([one.influence for one in of_seeds], torch.cat),
            _joined([one.without for one in of_seeds], torch.stack),
            values,
        )

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference: both are of rows that share their images' noise by index."""
        return Estimate(
            self.value - other.value,
            _difference(self.influence, other.influence),
            _difference(self.without, other.without),
            tuple(one - two for one, two in zip(self.by_seed, other.by_seed, strict=True)),
        )

    def unsure(self) -> Estimate:
        """The same number, for which no interval is to be found, not even without groups."""
        return replace(self, influence=None, without=torch.empty(0, dtype=torch.float64))

    def spread(self) -> float | None:
        """The standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None

    def standard_error(self) -> float | None:
        """The standard deviation of the number over draws of N images; None if nothing tells.

        Fewer than :data:`FEWEST` images, of each seed, tell nothing.
        """
        if self.influence is not None:
            count = len(self.influence)
            enough = count >= FEWEST * max(len(self.by_seed), 1)
            return float(self.influence.std()) / math.sqrt(count) if enough else None
        if self.without is not None and self.without.numel():
            *seeds, groups = self.without.shape
            # a mean of independent numbers: variances add up, over the square of their count
            variance = float(self.without.var(-1, correction=0).sum()) * (groups - 1)
            return math.sqrt(variance) / math.prod(seeds)
        return None

    def interval(self, level: float = LEVEL) -> Interval | None:
        """The confidence interval, by the normal distribution or by Student's for groups.

        It is about the noise of N images: what it covers is the number's mean over draws of
        N images, bias included. Raises ValueError for values that are not finite.
        """
        error = self.standard_error()
        if error is None:
            return None
        if not math.isfinite(error):
            raise ValueError(f"the standard error of {self.value} is {error}")
        freedom = None
        if self.influence is None and self.without is not None:
            freedom = self.without.numel() - self.without.numel() // self.without.shape[-1]
        half = quantile(level, freedom) * error
        return self.value - half, self.value + half


Estimates = Mapping[str, Mapping[str, Estimate]]  # by row and metric


def _difference(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return None
    if one.shape != other.shape:
        raise ValueError(f"no paired difference of {one.shape} and {other.shape} values")
    return one - other


def _joined(
    found: Sequence[Tensor | None], join: Callable[[list[Tensor]], Tensor]
) -> Tensor | None:
    known = [one for one in found if one is not None]
    return join(known) if len(known) == len(found) else None


def is_spread(name: str) -> bool:
    """Whether a number, such as ``is-std``, measures noise itself: its name has the word std."""
    return "std" in re.split(r"[^a-z0-9]+", name.lower())


def simultaneous(rivals: int, level: float = LEVEL) -> float:
    """The level of each of ``rivals`` intervals that all hold together with ``level`` (Bonferroni).

    Whoever looks for the strongest of several rivals finds the luckiest one more often than not.
    """
    return 1 - (1 - level) / max(rivals, 1)


def quantile(level: float, freedom: int | None = None) -> float:
    """Half the width, in standard errors, of a two-sided interval.

    ``freedom`` degrees, or None for the normal distribution. Student's quantile is expanded in
    1 / freedom (Abramowitz & Stegun 1964, 26.7.5): good to 1e-4 from 15 degrees on up to 99.9 %.
    """
    x = NormalDist().inv_cdf((1 + level) / 2)
    if freedom is None:
        return x
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))


def groups_of(indices: Sequence[int]) -> Tensor:
    """The group, 0 to :data:`GROUPS` - 1, of each index; int64 ``[N]``.

    Groups are equally large but for one image, and the same for any rows of the same images. They
    follow a hash, not the index: classes go round with the index.
    """
    return parts_of(indices, GROUPS)


def parts_of(indices: Sequence[int], parts: int, seed: int = 0) -> Tensor:
    """Which of ``parts`` parts each index is in, int64 ``[N]``; as :func:`groups_of`."""
    order = sorted(range(len(indices)), key=lambda position: _rank(indices[position], seed))
    found = torch.empty(len(indices), dtype=torch.int64)
    found[torch.tensor(order, dtype=torch.int64)] = (
        torch.arange(len(indices)) * parts // max(len(indices), 1)
    )
    return found


def _rank(index: int, seed: int) -> bytes:
    return hashlib.blake2b(f"part {seed}:{index}".encode(), digest_size=16).digest()
