"""Every name that a plugin or a library user may import; the rest may change without notice."""

from __future__ import annotations

from iec_eval.calibration import Bench
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser, Step, denoise
from iec_eval.efficiency.base import Artifact, CompositeMethod, EfficiencyMethod
from iec_eval.errors import (
    ConfigError,
    CorruptFile,
    IecEvalError,
    Incompatible,
    MissingArtifact,
    PluginError,
    StorageError,
    UnknownName,
)
from iec_eval.hookspecs import hookimpl
from iec_eval.intervals import Estimate
from iec_eval.metrics.base import Metric, PairedMetric, Pairs
from iec_eval.metrics.features import FeatureNetwork, Features
from iec_eval.models.base import DiffusionModel, to_uint8
from iec_eval.noise import Draw, Noise
from iec_eval.options import NOT_DECISIVE, BaseOptions
from iec_eval.samplers.base import Sampler, State
from iec_eval.schedule import NoiseSchedule
from iec_eval.storage import sha256

__all__ = [
    "NOT_DECISIVE",
    "Artifact",
    "BaseOptions",
    "Bench",
    "Clock",
    "CompositeMethod",
    "Condition",
    "ConfigError",
    "CorruptFile",
    "Denoiser",
    "DenoisingCallback",
    "DiffusionModel",
    "Draw",
    "EfficiencyMethod",
    "Estimate",
    "FeatureNetwork",
    "Features",
    "IecEvalError",
    "Incompatible",
    "Metric",
    "MissingArtifact",
    "Noise",
    "NoiseSchedule",
    "PairedMetric",
    "Pairs",
    "PluginError",
    "Sampler",
    "State",
    "Step",
    "StorageError",
    "UnknownName",
    "denoise",
    "hookimpl",
    "sha256",
    "to_uint8",
]
