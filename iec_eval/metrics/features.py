"""Feature networks: what FID and Inception Score see of an image.

Every network carries an identity (weights, resize, scaling); two sets of features may be compared
only if their identities are equal.
"""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iec_eval.embedded import FASHION_MNIST
from iec_eval.errors import ConfigError, CorruptFile, Incompatible, UnknownName
from iec_eval.options import BaseOptions, validated
from iec_eval.storage import load_weights, sha256

PACKAGED: Mapping[str, Path] = {"fashion-mnist": FASHION_MNIST}
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"  # as far as the name tells
FEATURES = 64
CARD, WEIGHTS = "features.json", "features.safetensors"


@dataclass(frozen=True)
class Features:
    """What a network read off B images: ``features [B, D]`` and ``logits [B, K]``, float32."""

    features: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> Features:
        return Features(self.features[rows], self.logits[rows])


class FeatureNetwork(ABC):
    """Images to features. Making one is cheap; weights are read by :meth:`load`.

    Attributes:
        tag: added to the names of the results, as in ``fid-<tag>``; only InceptionV3 has none.
        dimensions: D, the length of one feature vector.
        classes: K, the number of logits.
        macs: multiply-accumulates for one image; None where nobody has counted them.
    """

    tag: str
    dimensions: int
    classes: int = 0
    macs: float | None = None

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """The protocol: hash of the weights, resize, scaling. Equal exactly if comparable.

        Raises ConfigError if a file is missing.
        """

    @abstractmethod
    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the weights; loading twice is loading once.

        Raises ConfigError if a file is missing, CorruptFile if it is damaged.
        """

    @abstractmethod
    def check(self, shape: Sequence[int]) -> None:
        """Raise Incompatible if images of ``shape`` ``(C, H, W)`` cannot be read."""

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Features of uint8 ``images [B, C, H, W]``, on the CPU; each image's are its own alone.

        Loads the weights if nobody has. Raises Incompatible for images it cannot read.
        """


def feature_network(spec: str, weights: str | None = None) -> FeatureNetwork:
    """The network that ``spec`` names: ``inception``, a packaged one or a folder.

    ``weights`` is InceptionV3's weights file. Raises UnknownName, or ConfigError for weights given
    to a network that has its own.
    """
    if spec == "inception":
        return InceptionV3(None if weights is None else Path(weights))
    if weights is not None:
        raise ConfigError(f"features {spec!r} have their own weights; remove weights: {weights!r}")
    if spec in PACKAGED:
        return ClassifierFeatures(PACKAGED[spec] / "features")
    if Path(spec).is_dir():
        return ClassifierFeatures(Path(spec))
    hint = f"or a folder holding {CARD} and {WEIGHTS}"
    raise UnknownName("feature network", spec, ["inception", *PACKAGED], hint=hint)


class InceptionV3(FeatureNetwork):
    """The InceptionV3 of the original FID code, as torch-fidelity converted it from TensorFlow.

    Images are enlarged with TensorFlow 1's bilinear filter (no antialiasing), grey ones repeated
    over three channels. Features are the 2048 pooled ones, logits those without bias.
    """

    tag = ""
    dimensions = 2048
    classes = 1008
    macs = 5_713_232_480  # as torch counts them; whatever the size, images are enlarged first
    _outputs: ClassVar[list[str]] = ["2048", "logits_unbiased"]

    def __init__(self, weights: Path | None = None) -> None:
        self._given = weights
        self._network: nn.Module | None = None
        self._hash: str | None = None
        self._device = torch.device("cpu")

    def identity(self) -> dict[str, str]:
        self._hash = self._hash or self._checked_hash()
        return {
            "network": "inception-v3-compat",
            "weights": self._hash,
            "resize": "tensorflow-1 bilinear to 299, antialias=False",
            "channels": "grey repeated to 3",
            "outputs": " ".join(self._outputs),
        }

    @property
    def published(self) -> bool:
        """Whether the weights file is the published one, as far as its hash is known."""
        return self.identity()["weights"].startswith(INCEPTION_SHA256)

    def load(self, device: torch.device | str = "cpu") -> None:
        path = self._weights_file()
        if self._network is None:
            self._network = _inception_from(load_weights(path), path, self._outputs)
        self._device = torch.device(device)
        self._network.to(self._device)

    def check(self, shape: Sequence[int]) -> None:
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise Incompatible(
                f"features inception: wanted images of 1 or 3 channels, got {tuple(shape)}"
            )

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        self.check(images.shape[1:])
        if self._network is None:
            self.load()
        assert self._network is not None
        coloured = images.expand(-1, 3, -1, -1).to(self._device)
        features, logits = self._network(coloured)
        return Features(features.cpu(), logits.cpu())

    def _checked_hash(self) -> str:
        """Of the weights; those in the default place must be the ones their name says."""
        path = self._weights_file()
        found = sha256(path)
        if self._given is None and not found.startswith(INCEPTION_SHA256):
            raise CorruptFile(
                f"weights {path}: not the published file, whose sha256 begins with "
                f"{INCEPTION_SHA256} (got {found[:8]}); get it again from {INCEPTION_URL}"
            )
        return found

    def _weights_file(self) -> Path:
        path = self._given or default_inception_weights()
        if not path.is_file():
            raise ConfigError(
                f"features inception: no weights at {path}; nothing is downloaded here, so get "
                f"{INCEPTION_URL} (91 MB) and put it there, or say where it is with weights: PATH"
            )
        return path


def default_inception_weights() -> Path:
    """Where torch-fidelity keeps the file: torch.hub's checkpoints folder."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[-1]


def _inception_from(state: dict[str, Tensor], path: Path, outputs: list[str]) -> nn.Module:
    """torch-fidelity's network with these weights, every key present and of the right shape."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity would unpickle the file without restriction. It gets a copy made here, of
    # tensors that have been read safely.
    copy = io.BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        network: nn.Module = FeatureExtractorInceptionV3("inception-v3-compat", outputs, copy)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CorruptFile(_wrong_layout(path, error)) from error
    return network


def _wrong_layout(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"weights {path}: not the tensors of this network ({reason}); wanted the right file"


class ClassifierCard(BaseOptions):
    """``features.json``: everything about a classifier but its weights."""

    tag: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", description="as in fid-<tag>")
    channels: int = Field(ge=1, description="of the images")
    size: int = Field(ge=4, description="side of the images in pixels")
    classes: int = Field(ge=2, description="number of logits")
    width: int = Field(ge=1, description="channels of the first convolutions")
    notes: dict[str, Any] = Field({}, description="how it was made; changes no feature")


class ImageClassifier(nn.Module):
    """Five 3x3 convolutions, global average pool, 64 features, linear logits.

    Called with uint8 images ``[B, C, H, W]``; returns features ``[B, 64]`` and logits ``[B, K]``.
    """

    def __init__(self, channels: int, size: int, classes: int, width: int) -> None:
        super().__init__()
        self.channels, self.size, self.classes, self.width = channels, size, classes, width
        self.body = nn.Sequential(
            _convolution(channels, width),
            _convolution(width, width, stride=2),
            _convolution(width, 2 * width),
            _convolution(2 * width, 2 * width, stride=2),
            _convolution(2 * width, FEATURES),
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images.float() / 127.5 - 1).mean(dim=(2, 3))
        return features, self.head(features)


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class ClassifierFeatures(FeatureNetwork):
    """A small classifier of the user's own images, for sizes InceptionV3 was not made for.

    ``folder`` holds ``features.json`` and ``features.safetensors``, as
    ``iec_eval.training.classifier.save_features`` writes them. Raises ConfigError if they are
    missing or the card is wrong.
    """

    dimensions = FEATURES

    def __init__(self, folder: Path) -> None:
        self.card = _read_card(folder / CARD)
        self.tag, self.classes = self.card.tag, self.card.classes
        self._weights = folder / WEIGHTS
        self._network: ImageClassifier | None = None
        self._hash: str | None = None
        self._device = torch.device("cpu")

    @cached_property
    def macs(self) -> float:  # type: ignore[override]  # counted when asked for
        with torch.device("meta"):
            network, size = _classifier(self.card), self.card.size
            image = torch.empty(1, self.card.channels, size, size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(image)
        return int(counter.get_total_flops()) // 2

    def identity(self) -> dict[str, str]:
        self._hash = self._hash or sha256(self._weights_file())
        card = self.card
        return {
            "network": f"classifier {card.tag}, width {card.width}, {card.classes} classes",
            "weights": self._hash,
            "resize": f"none, wants {card.channels}x{card.size}x{card.size}",
            "scaling": "x / 127.5 - 1",
        }

    def load(self, device: torch.device | str = "cpu") -> None:
        path = self._weights_file()
        if self._network is None:
            self._network = _classifier_from(self.card, load_weights(path), path)
        self._device = torch.device(device)
        self._network.to(self._device)

    def check(self, shape: Sequence[int]) -> None:
        card = self.card
        wanted = (card.channels, card.size, card.size)
        if tuple(shape) != wanted:
            raise Incompatible(
                f"features {card.tag}: wanted images of shape {wanted}, got {tuple(shape)}; "
                "use features made for these images"
            )

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        self.check(images.shape[1:])
        if self._network is None:
            self.load()
        assert self._network is not None
        features, logits = self._network(images.to(self._device))
        return Features(features.cpu(), logits.cpu())

    def _weights_file(self) -> Path:
        if not self._weights.is_file():
            raise ConfigError(f"features {self.tag}: no weights at {self._weights}")
        return self._weights


def _read_card(path: Path) -> ClassifierCard:
    if not path.is_file():
        raise ConfigError(f"features {path.parent}: no {path.name} there; wanted a classifier's")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFile(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CorruptFile(f"{path}: wanted an object, got {type(values).__name__}")
    return validated(ClassifierCard, values, str(path))


def _classifier(card: ClassifierCard) -> ImageClassifier:
    return ImageClassifier(card.channels, card.size, card.classes, card.width)


def _classifier_from(card: ClassifierCard, state: dict[str, Tensor], path: Path) -> ImageClassifier:
    network = _classifier(card)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CorruptFile(_wrong_layout(path, error)) from error
    return network.eval().requires_grad_(False)
