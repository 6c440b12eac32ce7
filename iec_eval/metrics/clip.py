"""CLIP (Radford et al. 2021): images and texts as vectors of one space, by transformers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iec_eval import hub
from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.metrics.features import FeatureNetwork, Features
from iec_eval.pretrained import (
    load_model,
    load_part,
    quiet,
    require_transformers,
    transformers_for,
)
from iec_eval.storage import sha256

TOGETHER = 32  # images or texts in one evaluation
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "vocab.json")  # one of them
PREPROCESSOR = ("preprocessor_config.json", "processor_config.json")  # the same
CONFIG = "config.json"
WANTED = [
    CONFIG,
    *PREPROCESSOR,
    WEIGHTS,
    INDEX,
    "model-*.safetensors",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "*_tokens*.json",
]
USER = "clip-score"


class ClipNetwork(FeatureNetwork):
    """The image encoder of a transformers CLIP, and its text encoder.

    Features are the projected image embeddings, not normalized; there are no logits (``[B, 0]``).
    Images are resized and cropped by the model's own image processor in its PIL form, which is
    what CLIP was trained with; grey ones are repeated over three channels.

    ``spec`` is a folder as ``save_pretrained`` writes it, or ``hub:owner/name[@revision]``: looked
    for in the local cache, then fetched.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.tag = f"clip-{short_name(spec)}"
        self._model: Any = None
        self._device = torch.device("cpu")

    @cached_property
    def folder(self) -> Path:
        """The model's files. Raises ConfigError if they are neither here nor to be had."""
        require_transformers(USER)
        folder = resolved(self.spec)
        missing = _missing(folder)
        if missing:
            raise ConfigError(_incomplete(self.spec, folder, missing))
        return folder

    @cached_property
    def weights_hash(self) -> str:
        """Hex sha256 of the weights file; of the files' hashes where there are several."""
        hashes = [sha256(path) for path in _weight_files(self.folder)]
        return hashes[0] if len(hashes) == 1 else _joined(hashes)

    @cached_property
    def dimensions(self) -> int:  # type: ignore[override]  # known once the files are found
        return int(self._config.get("projection_dim", 512))  # transformers' default

    @cached_property
    def tokenizer_hash(self) -> str:
        """Hex digest of the files that texts are cut up by."""
        return _digest_of(self.folder, [*TOKENIZER, "merges.txt", "tokenizer_config.json"])

    @cached_property
    def token_limit(self) -> int:
        """Tokens of a text, those of its beginning and end included."""
        return int((self._config.get("text_config") or {}).get("max_position_embeddings", 77))

    def identity(self) -> dict[str, str]:
        return {
            "network": "clip",
            "weights": self.weights_hash,
            "config": sha256(self.folder / CONFIG),
            "preprocessing": f"PIL, {_digest_of(self.folder, PREPROCESSOR)}",
            "channels": "grey repeated to 3",
        }

    def load(self, device: torch.device | str = "cpu") -> None:
        self._model = self._model or load_model(transformers_for(USER).CLIPModel, self.folder)
        self._device = torch.device(device)
        self._model.to(self._device)

    def check(self, shape: Sequence[int]) -> None:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise Incompatible(
                f"clip {self.spec}: wanted images of 1 or 3 channels, got {tuple(shape)}"
            )

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        self.check(images.shape[1:])
        parts = [self._image_embeddings(part) for part in images.split(TOGETHER)]
        return Features(torch.cat(parts), torch.zeros(len(images), 0))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Projected embeddings ``[N, D]`` of texts, on the CPU, those too long cut short.

        A text over :attr:`token_limit` keeps its first tokens and the end token, at whose place
        CLIP reads off the whole text.
        """
        parts = [texts[start : start + TOGETHER] for start in range(0, len(texts), TOGETHER)]
        return torch.cat([self._text_embeddings(list(part)) for part in parts])

    def too_long(self, texts: Sequence[str]) -> list[bool]:
        """Which texts have more tokens than the model reads."""
        if not texts:
            return []
        with quiet():  # its own warning speaks of indexing errors, which there are none of here
            tokens = self._tokenizer(list(texts), truncation=False)["input_ids"]
        return [len(each) > self.token_limit for each in tokens]

    def _image_embeddings(self, images: Tensor) -> Tensor:
        model = self._loaded()
        coloured = list(images.expand(-1, 3, -1, -1).numpy())
        inputs = self._processor(coloured, return_tensors="pt", input_data_format="channels_first")
        pixels = inputs["pixel_values"].to(self._device)
        return _embeddings(model.get_image_features(pixel_values=pixels))

    def _text_embeddings(self, texts: list[str]) -> Tensor:
        model = self._loaded()
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.token_limit, return_tensors="pt"
        )
        chosen = {key: inputs[key].to(self._device) for key in ("input_ids", "attention_mask")}
        return _embeddings(model.get_text_features(**chosen))

    def _loaded(self) -> Any:
        if self._model is None:
            self.load()
        return self._model

    @cached_property
    def _config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        config = _read_json(path)
        if config.get("model_type") != "clip":
            raise ConfigError(
                f"clip {self.spec}: wanted a CLIP model, {path} describes a "
                f"{config.get('model_type')!r}; name another model"
            )
        return config

    @cached_property
    def _processor(self) -> Any:
        transformers = transformers_for(USER)
        # transformers 5 has two kinds of processor, with their own rounding; 4 has this one
        kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        return load_part(kind, self.folder, "image processor")

    @cached_property
    def _tokenizer(self) -> Any:
        return load_part(transformers_for(USER).AutoTokenizer, self.folder, "tokenizer")


def short_name(spec: str) -> str:
    """A model's name for tables: the last part of its id or folder, as a slug."""
    hub_id = hub.HubId.parse(spec)
    place = os.path.abspath(spec) if hub_id is None else hub_id.repository
    return re.sub(r"[^a-z0-9]+", "-", Path(place).name.lower()).strip("-") or "model"


def resolved(spec: str) -> Path:
    """The folder of a model: ``spec`` itself, or where the hub's cache has it, fetched if need be.

    Raises ConfigError if there is no such folder or model, or no network to fetch it.
    """
    hub_id = hub.HubId.parse(spec)
    if hub_id is not None:
        cached = hub.cached(hub_id)
        whole = cached is not None and not _missing(cached)
        return cached if cached is not None and whole else hub.download(hub_id, WANTED)
    if not Path(spec).is_dir():
        raise ConfigError(
            f"clip model {spec!r}: no such folder; one on the Hugging Face hub is "
            "hub:owner/name or hub:owner/name@revision"
        )
    return Path(spec)


def _missing(folder: Path) -> list[str]:
    """What a folder lacks to be a CLIP that is safe to read."""
    alternatives = [(CONFIG,), PREPROCESSOR, TOKENIZER, (WEIGHTS, INDEX)]
    return [" or ".join(names) for names in alternatives if not _present(folder, names)]


def _present(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]


def _digest_of(folder: Path, names: Sequence[str]) -> str:
    """Hex digest of those of the files that are there."""
    return _joined([sha256(folder / name) for name in _present(folder, names)])


def _joined(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _incomplete(spec: str, folder: Path, missing: Sequence[str]) -> str:
    message = f"clip model {spec!r}: {', '.join(missing)} not in {folder}"
    if not _present(folder, (WEIGHTS, INDEX)) and any(folder.glob("*.bin")):
        message += "; its weights are pickled, which could run any code, so they are not read"
    return (
        f"{message}; wanted a folder as save_pretrained writes it, or a revision "
        "(hub:owner/name@revision) with safetensors"
    )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    content = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(content, dict):
        raise CorruptFile(f"{folder / INDEX}: no weight_map in it; get the model again")
    paths = [folder / str(name) for name in sorted(set(content.values()))]
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise ConfigError(f"{folder / INDEX}: names {path.name}, which is missing")
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path}: not readable JSON ({error}); get the model again") from error
    if not isinstance(content, dict):
        raise CorruptFile(f"{path}: wanted an object, got {type(content).__name__}")
    return content


def _embeddings(output: Any) -> Tensor:
    """transformers 4 returns the embeddings, 5 an object that holds them."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found.float().cpu()
