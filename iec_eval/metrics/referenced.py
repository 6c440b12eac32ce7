"""What metrics share that compare an image set with a reference made beforehand."""

from __future__ import annotations

from functools import cached_property

from iec_eval.errors import complaints
from iec_eval.metrics.base import FeatureMetric, FeatureOptions
from iec_eval.metrics.statistics import ReferenceStatistics, open_reference


class ReferenceMetric(FeatureMetric):
    """A metric on features whose options name, as ``reference``, what they are compared with."""

    def __init__(self, options: FeatureOptions, reference: str) -> None:
        super().__init__(options)
        self._reference = reference

    @cached_property
    def reference(self) -> ReferenceStatistics:
        """What is compared with, opened when first asked for."""
        return open_reference(self._reference)

    def missing(self) -> list[str]:
        return [*super().missing(), *complaints(lambda: self.reference)]
