"""The built-in efficiency methods, registered like anybody's."""

from __future__ import annotations

from iec_eval.efficiency.base import EfficiencyMethod
from iec_eval.hookspecs import hookimpl


@hookimpl
def iec_eval_efficiency_methods() -> list[type[EfficiencyMethod]]:
    from iec_eval.efficiency.cachequant import CacheQuant
    from iec_eval.efficiency.deepcache import DeepCache
    from iec_eval.efficiency.error_correction import CacheCorrection, QuantizationCorrection
    from iec_eval.efficiency.reconstruction import Reconstruction
    from iec_eval.efficiency.timestep_quantizer import TimestepQuantizer

    after_quantizer = [QuantizationCorrection, Reconstruction]
    return [CacheCorrection, CacheQuant, DeepCache, *after_quantizer, TimestepQuantizer]
