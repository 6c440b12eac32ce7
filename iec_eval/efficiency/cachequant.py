"""CacheQuant (Liu et al., CVPR 2025): cache and quantize at once, and correct for both.

Stacking a cache and a quantizer adds up more error than either makes. CacheQuant undoes much of it
by affine maps, and with ``schedule: dps`` chooses the full steps so that recalling loses least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from iec_eval.efficiency.base import CompositeMethod, EfficiencyMethod
from iec_eval.efficiency.deepcache import DeepCache, DeepCacheOptions
from iec_eval.efficiency.error_correction import (
    CacheCorrection,
    QuantizationCorrection,
    QuantizationCorrectionOptions,
)
from iec_eval.efficiency.reconstruction import Reconstruction, ReconstructionOptions
from iec_eval.efficiency.timestep_quantizer import TimestepQuantizer, TimestepQuantizerOptions
from iec_eval.options import BaseOptions


class CacheQuantOptions(DeepCacheOptions):
    """Those of the cache, and of each further stage under its name."""

    quantizer: TimestepQuantizerOptions = Field(
        default_factory=TimestepQuantizerOptions, description="options of timestep-quantizer"
    )
    correction: QuantizationCorrectionOptions = Field(
        default_factory=QuantizationCorrectionOptions,
        description="options of quantization-correction, where weights are not reconstructed",
    )
    reconstruct: bool | None = Field(
        None, description="learn the rounding of weights; null: where they have less than 8 bits"
    )
    reconstruction: ReconstructionOptions = Field(
        default_factory=ReconstructionOptions, description="options of reconstruction"
    )

    @property
    def reconstructs(self) -> bool:
        """Whether reconstruction is the last stage, or the correction of quantized layers."""
        return self.quantizer.weight_bits < 8 if self.reconstruct is None else self.reconstruct

    @model_validator(mode="after")
    def _refuse_unused_stage(self) -> Self:
        """Options of the stage that the bits leave out; who says ``reconstruct`` has chosen."""
        unused = "correction" if self.reconstructs else "reconstruction"
        if self.reconstruct is None and unused in self.model_fields_set:
            raise ValueError(
                f"{unused} has no effect, for weights of {self.quantizer.weight_bits} bits are "
                f"{'' if self.reconstructs else 'not '}reconstructed; leave it out, or say "
                f"reconstruct: {'false' if self.reconstructs else 'true'}"
            )
        return self


class CacheQuant(CompositeMethod):
    """Scheduled cache, its correction, quantizer, and correction or reconstruction of that."""

    name = "cachequant"
    Options = CacheQuantOptions
    options: CacheQuantOptions

    def parts(self) -> Sequence[EfficiencyMethod]:
        """The stages; the last one is as in the paper, whose W4 models are reconstructed."""
        options, of_cache = self.options, {*DeepCacheOptions.model_fields}
        given = options.model_dump(include=options.model_fields_set & of_cache)
        return [
            DeepCache(DeepCacheOptions(**given)),
            CacheCorrection(BaseOptions()),
            TimestepQuantizer(options.quantizer),
            Reconstruction(options.reconstruction)
            if options.reconstructs
            else QuantizationCorrection(options.correction),
        ]
