"""The contract of models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser
from iec_eval.models.base import DiffusionModel
from iec_eval.noise import Noise
from iec_eval.testing.checks import (
    IMAGES,
    PREDICTIONS,
    SEED,
    Options,
    build,
    check_declaration,
    check_version,
    ensure,
    run_checks,
    same,
)


def check_model(
    cls: type[DiffusionModel], options: Options | None = None, *, skip: Collection[str] = ()
) -> None:
    """Check that a model's parts agree with each other.

    Properties: ``declaration``, ``schedule``, ``labels`` and ``captions`` (depend on the index
    alone), ``skeleton`` (on the meta device, with the parameters of the network), ``weights`` (in
    eval mode, on the CPU, the same every time), ``prediction`` (has the latent's shape),
    ``decode`` (uint8, image by image), ``identity``.
    """
    case = _ModelCase(cls, options or {})
    checks: dict[str, Callable[[], None]] = {
        "declaration": case.declaration,
        "schedule": case.schedule,
        "labels": case.labels,
        "captions": case.captions,
        "skeleton": case.skeleton,
        "weights": case.weights,
        "prediction": case.prediction,
        "decode": case.decode,
        "identity": case.identity,
    }
    run_checks(cls, checks, skip)


@dataclass(frozen=True)
class _ModelCase:
    cls: type[DiffusionModel]
    options: Options

    def declaration(self) -> None:
        check_declaration(self.cls)
        check_version(self.cls)
        model = self.model()
        ensure(
            model.prediction in PREDICTIONS,
            f"prediction: wanted one of {', '.join(sorted(PREDICTIONS))}, got {model.prediction!r}",
        )
        ensure(
            len(model.shape) == 3 and all(type(n) is int and n > 0 for n in model.shape),
            f"shape: wanted (C, H, W), got {model.shape!r}",
        )

    def schedule(self) -> None:
        abar = self.model().schedule.alphas_cumprod
        ensure(
            abar.dtype == torch.float64 and abar.ndim == 1,
            f"alphas_cumprod: wanted float64 [N], got {abar.dtype} {list(abar.shape)}",
        )
        falls = bool((abar[1:] <= abar[:-1]).all() and (abar >= 0).all() and (abar <= 1).all())
        ensure(falls, "alphas_cumprod must fall from at most 1 to at least 0")

    def labels(self) -> None:
        model = self.model()
        together = model.condition(IMAGES)
        for position, image in enumerate(IMAGES):
            alone = model.condition([image])
            ensure(
                alone.scale == together.scale and alone.guided == together.guided,
                f"condition: guidance of image {image} depends on the batch",
            )
            ensure(
                same(_row(together.inputs, position), dict(alone.inputs))
                and same(
                    _row(together.unconditional or {}, position), dict(alone.unconditional or {})
                ),
                f"condition: image {image} is told something else in another batch",
            )

    def captions(self) -> None:
        model = self.model()
        together = model.captions(IMAGES)
        if together is None:
            ensure(model.captions([0]) is None, "captions(): of some images there are none")
            return
        ensure(
            len(together) == len(IMAGES) and all(isinstance(text, str) for text in together),
            f"captions(): wanted a text for each of {len(IMAGES)} images, got {together!r}",
        )
        for image, text in zip(IMAGES, together, strict=True):
            ensure(
                model.captions([image]) == [text],
                f"captions(): image {image} is told something else in another batch",
            )

    def skeleton(self) -> None:
        model = self.model()
        empty, full = model.skeleton().state_dict(), model.load().state_dict()
        real = [name for name, value in empty.items() if not value.is_meta]
        ensure(not real, f"skeleton(): {real[:3]} are not on the meta device")
        differing = sorted(
            name
            for name in empty.keys() | full.keys()
            if name not in empty or name not in full or empty[name].shape != full[name].shape
        )
        ensure(not differing, f"skeleton() and load() differ in {differing[:3]}")

    def weights(self) -> None:
        model = self.model()
        network = model.load()
        ensure(not any(m.training for m in network.modules()), "load() is not in eval mode")
        state = network.state_dict()
        away = [name for name, value in state.items() if value.device.type != "cpu"]
        ensure(not away, f"load(): {away[:3]} are not on the CPU")
        ensure(same(state, model.load().state_dict()), "load() gives other weights every time")

    @torch.inference_mode()
    def prediction(self) -> None:
        model = self.model()
        noise = Noise(SEED, IMAGES, model.shape).initial()
        denoiser = Denoiser(model.load(), model.condition(IMAGES), Clock(1))
        predicted = denoiser(noise, len(model.schedule) // 2)
        ensure(
            predicted.shape == noise.shape,
            f"the network maps {list(noise.shape)} to {list(predicted.shape)}",
        )
        ensure(bool(predicted.isfinite().all()), "the network's output is not finite")

    @torch.inference_mode()
    def decode(self) -> None:
        model = self.model()
        latents = Noise(SEED, IMAGES, model.shape).initial()
        images = model.decode(latents)
        ensure(
            images.dtype == torch.uint8 and images.ndim == 4 and len(images) == len(latents),
            f"decode(): wanted uint8 [{len(latents)}, C, H, W], got {images.dtype} "
            f"{list(images.shape)}",
        )
        alone = torch.cat([model.decode(row[None]) for row in latents])
        off = int((images.int() - alone.int()).abs().max())
        ensure(off <= 1, f"decode(): an image differs by {off} levels in another batch")

    def identity(self) -> None:
        model = self.model()
        identity = model.identity()
        ensure(
            bool(identity)
            and all(isinstance(v, str) and v for v in (*identity, *identity.values())),
            f"identity(): wanted a hash for each file, got {identity!r}",
        )
        ensure(identity == self.model().identity(), "identity() differs from time to time")

    def model(self) -> DiffusionModel:
        model: DiffusionModel = build(self.cls, self.options)
        return model


def _row(inputs: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
    return {name: value[position : position + 1] for name, value in inputs.items()}
