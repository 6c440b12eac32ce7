"""What a network is told beside the sample: nothing, a class, an embedded class, or a text.

Each conditioner makes a :class:`Condition` from image indices alone; under guidance the condition
holds both halves, and :class:`~iec_eval.denoising.Denoiser` combines them.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from iec_eval.denoising import Condition
from iec_eval.errors import ConfigError, Incompatible, complaints
from iec_eval.models.files import ModelFiles
from iec_eval.models.lists import LabelList, read_labels, read_prompts, spread
from iec_eval.options import NOT_DECISIVE, BaseOptions
from iec_eval.pretrained import (
    load_model,
    load_part,
    require_transformers,
    transformers_for,
)
from iec_eval.storage import load_weights, sha256

META = torch.device("meta")
TEXT = "encoder_hidden_states"  # what diffusers calls the states that cross-attention reads


Guidance = Annotated[
    float,
    Field(
        ge=0,
        allow_inf_nan=False,
        description="classifier-free guidance scale; 1 is none, at single cost",
    ),
]


class GuidanceOptions(BaseOptions):
    """Option of every conditional model."""

    guidance: Guidance = 1.0


class LabelOptions(GuidanceOptions):
    """How class-conditional models are told their class."""

    label: int | None = Field(
        None, ge=0, description="one class for every image; null: image i has class i mod classes"
    )
    labels: Annotated[str | None, NOT_DECISIVE] = Field(
        None, description="file of the images' classes, in order: lines of CLASS COUNT"
    )


class Conditioner(ABC):
    """Makes the condition of a batch. Nothing but lists is read before :meth:`condition`."""

    components: tuple[str, ...] = ()
    device = torch.device("cpu")

    @abstractmethod
    def condition(self, images: Sequence[int]) -> Condition:
        """The condition of these images."""

    @abstractmethod
    def skeleton(self) -> Condition:
        """The condition of one image on the meta device: right in shape, nothing read."""

    def calibration(self, images: Sequence[int]) -> Condition:
        """The condition of these images in calibration, which must see all sorts of conditions."""
        return self.condition(images)

    def captions(self, images: Sequence[int]) -> list[str] | None:
        """The images' texts; None where there are none."""
        return None

    def identity(self) -> dict[str, str]:
        """Hashes of the lists that conditions come from."""
        return {}

    def missing(self) -> list[str]:
        """Lists that must be had before anything can run, one line each."""
        return []


class Unconditional(Conditioner):
    """Tells the network nothing."""

    def condition(self, images: Sequence[int]) -> Condition:
        return Condition()

    def skeleton(self) -> Condition:
        return Condition()


# --- classes ----------------------------------------------------------------------------------


class Classes(Conditioner):
    """A class for each image; what the network makes of it, a subclass says.

    Args:
        options: guidance, and which class an image has.
        classes: number of real classes.
        none: the class that means "no class"; None if the network knows none.
        where: the model, for messages.
    """

    def __init__(self, options: LabelOptions, classes: int, none: int | None, where: str) -> None:
        self.options, self.classes, self.none = options, classes, none
        if options.guidance != 1.0 and none is None:
            raise Incompatible(
                f"model {where}: guidance needs a class-conditional network and "
                "unconditional_class, the class it was trained to take for 'no label'"
            )
        if options.label is not None and options.labels is not None:
            raise ConfigError(f"model {where}: give label or labels, not both")
        if options.label is not None and options.label >= classes:
            raise ConfigError(f"label {options.label}: the model has {classes} classes")
        self._file = None if options.labels is None else Path(options.labels)
        known = self._file is not None and self._file.is_file()
        self._list: LabelList | None = None
        if known:
            assert self._file is not None
            self._list = read_labels(self._file, classes)

    @abstractmethod
    def inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """The network's inputs for ``labels [B]``."""

    def condition(self, images: Sequence[int]) -> Condition:
        return self._condition([self._label(image) for image in images])

    def calibration(self, images: Sequence[int]) -> Condition:
        if self._list is None:
            return self.condition(images)
        return self._condition([self._list[i] for i in spread(images, len(self._list))])

    def skeleton(self) -> Condition:
        return self._condition([0])

    def identity(self) -> dict[str, str]:
        return {} if self._file is None else {"labels": sha256(self._file)}

    def missing(self) -> list[str]:
        return [] if self._file is None or self._list else [f"labels {self._file}: no such file"]

    def _condition(self, labels: Sequence[int]) -> Condition:
        inputs = self.inputs(torch.tensor(labels))
        if self.options.guidance == 1.0:
            return Condition(inputs)
        assert self.none is not None  # checked at construction
        nothing = torch.full((len(labels),), self.none)
        return Condition(inputs, self.inputs(nothing), self.options.guidance)

    def _label(self, image: int) -> int:
        if self.options.label is not None:
            return self.options.label
        if self._list is not None:
            return self._list[image]
        return image % self.classes


class LabelInput(Classes):
    """The network takes the class itself."""

    def inputs(self, labels: Tensor) -> dict[str, Tensor]:
        return {"class_labels": labels}


class ClassEmbedding(Classes):
    """Cross-attention reads one embedded class, as in LDM's class-conditional ImageNet model.

    The last row of the embedding means "no class".
    """

    components = ("class_embedder",)

    def __init__(self, options: LabelOptions, files: ModelFiles) -> None:
        config = files.config("class_embedder")
        rows, self._width = (_whole(config, key, files) for key in ("num_embeddings", "dim"))
        super().__init__(options, rows - 1, rows - 1, files.spec)
        self._files = files
        self._table: Tensor | None = None

    def inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """The states ``[B, 1, D]``."""
        if self._table is None:
            self._table = self._read()
        return {TEXT: self._table[labels].unsqueeze(1)}

    def calibration(self, images: Sequence[int]) -> Condition:
        if self._list is not None or self.options.label is not None:
            return super().calibration(images)
        return self._condition(spread(images, self.classes))  # the first ones are few of so many

    def skeleton(self) -> Condition:
        blank = {TEXT: torch.empty(1, 1, self._width, device=META)}
        return Condition(blank, dict(blank), self.options.guidance)

    def _read(self) -> Tensor:
        path = self._files.weights("class_embedder")
        found, wanted = load_weights(path), (self.classes + 1, self._width)
        shapes = {key: tuple(value.shape) for key, value in found.items()}
        if shapes != {"weight": wanted}:
            raise ConfigError(f"weights {path}: wanted one tensor weight {wanted}, got {shapes}")
        return found["weight"].float()


# --- texts ------------------------------------------------------------------------------------


class PromptOptions(GuidanceOptions):
    """How text-conditional models are told what to show."""

    prompts: Annotated[str | None, NOT_DECISIVE] = Field(
        None, description="file of the images' prompts, in order, one a line"
    )
    prompt: str | None = Field(None, description="one prompt for every image")
    negative_prompt: str = Field("", description="what guidance leads away from")


class TextEncoding(Conditioner):
    """Cross-attention reads a text encoded by CLIP, as in Stable Diffusion 1.

    Texts longer than the encoder's limit (77 tokens) are cut, the end token kept; how many of the
    prompts are is told once on stderr.
    """

    components = ("text_encoder", "tokenizer")

    def __init__(self, options: PromptOptions, files: ModelFiles) -> None:
        self.options, self._files = options, files
        if (options.prompt is None) == (options.prompts is None):
            raise ConfigError(f"model {files.spec}: give prompts, a file, or prompt, a text")
        if options.negative_prompt and options.guidance == 1.0:
            raise Incompatible(
                f"model {files.spec}: guidance 1 is none, so negative_prompt would have no effect; "
                "leave it out"
            )
        config = files.config("text_encoder")
        self._limit = _whole(config, "max_position_embeddings", files)
        self._width = _whole(config, "hidden_size", files)
        self._file = None if options.prompts is None else Path(options.prompts)
        self._prompts = [] if options.prompt is None else [options.prompt]
        if self._file is not None and self._file.is_file():
            self._prompts = read_prompts(self._file)
        self._encoder: Any = None
        self._tokenizer: Any = None

    def captions(self, images: Sequence[int]) -> list[str]:
        if not self._prompts:
            raise ConfigError("; ".join(self.missing()))
        return [self._prompts[image % len(self._prompts)] for image in images]

    def condition(self, images: Sequence[int]) -> Condition:
        return self._condition(self.captions(images))

    def calibration(self, images: Sequence[int]) -> Condition:
        return self._condition([self._prompts[i] for i in spread(images, len(self._prompts))])

    def skeleton(self) -> Condition:
        blank = {TEXT: torch.empty(1, self._limit, self._width, device=META)}
        return Condition(blank, dict(blank), self.options.guidance)

    def identity(self) -> dict[str, str]:
        return {} if self._file is None else {"prompts": sha256(self._file)}

    def missing(self) -> list[str]:
        lines = complaints(lambda: require_transformers(f"model {self._files.spec}"))
        if self._file is None or self._file.is_file():
            return lines
        return [*lines, f"prompts {self._file}: no such file; wanted one prompt a line"]

    @torch.no_grad()
    def _condition(self, texts: Sequence[str]) -> Condition:
        inputs = {TEXT: self._encode(texts)}
        if self.options.guidance == 1.0:
            return Condition(inputs)
        nothing = self._encode([self.options.negative_prompt])
        others = nothing.expand(len(texts), -1, -1)
        return Condition(inputs, {TEXT: others}, self.options.guidance)

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """The encoder's last states ``[B, 77, D]``."""
        if self._encoder is None:
            self._tokenizer, self._encoder = self._read()
            self._tell_cut()
        self._encoder.to(self.device)
        tokens = self._tokens(texts).to(self.device)
        states: Tensor = self._encoder(tokens)[0]
        return states

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        found = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=self._limit,
            truncation=True,
            return_tensors="pt",
        )
        tokens: Tensor = found.input_ids
        return tokens

    def _tell_cut(self) -> None:
        """Say how many prompts are longer than what the encoder reads."""
        lengths = [len(self._tokenizer(text).input_ids) for text in self._prompts]
        cut = sum(length > self._limit for length in lengths)
        if cut:
            print(
                f"iec-eval: {cut} of {len(lengths)} prompts are longer than {self._limit} tokens "
                "and are cut there",
                file=sys.stderr,
            )

    def _read(self) -> tuple[Any, Any]:
        transformers = transformers_for(f"model {self._files.spec}")
        encoder, tokenizer = (self._files.place(component) for component in self.components)
        load_weights(self._files.weights("text_encoder"))  # names a damaged file
        return (
            load_part(transformers.CLIPTokenizer, tokenizer, "tokenizer"),
            load_model(transformers.CLIPTextModel, encoder),
        )


def _whole(config: dict[str, Any], key: str, files: ModelFiles) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ConfigError(f"model {files.spec}: {key} must be a whole number, got {value!r}")
    return value
