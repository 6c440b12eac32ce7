"""LPIPS (Zhang et al. 2018): distance to full precision as a classification network sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from iec_eval.errors import ConfigError, CorruptFile, Incompatible, complaints
from iec_eval.metrics.base import Pairs
from iec_eval.metrics.paired import MeanOverPairs
from iec_eval.options import BaseOptions
from iec_eval.storage import load_weights, sha256

if TYPE_CHECKING:
    from iec_eval.models.base import DiffusionModel

Net = Literal["alex", "vgg", "squeeze"]
BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}  # in torchvision
SMALLEST = {"alex": 31, "vgg": 16, "squeeze": 17}  # side of an image that the last layer still sees


class LPIPSOptions(BaseOptions):
    """Options of LPIPS."""

    net: Net = Field("alex", description="backbone: alex, vgg or squeeze")
    weights: str | None = Field(
        None, description="the backbone's torchvision weights; null: torch.hub's checkpoints folder"
    )


class LPIPS(MeanOverPairs):
    """Distance of deep features to full precision (eq. 1), mean of images; 0 is equal.

    Images are scaled to [-1, 1] at their own size, grey ones repeated over three channels. The
    result is called ``lpips-<net>``; with other than torchvision's published weights the first
    eight hex digits of their sha256 follow. Nothing is downloaded.
    """

    name = "lpips"
    Options = LPIPSOptions
    higher_is_better = False

    def __init__(self, options: LPIPSOptions) -> None:
        super().__init__(options)
        self._net = options.net
        self._backbone = Backbone(options.net, options.weights)

    @property
    def result_name(self) -> str:
        found = self._backbone.hash()
        published = found.startswith(published_weights(self._net).sha256)
        return f"lpips-{self._net}" + ("" if published else f"-{found[:8]}")

    def bind(self, model: DiffusionModel) -> None:
        channels, *sides = model.image_shape
        smallest = SMALLEST[self._net]
        if channels not in (1, 3) or min(sides) < smallest:
            raise Incompatible(
                f"lpips: net {self._net!r} wants images of 1 or 3 channels and "
                f"{smallest}x{smallest} pixels or more, got {tuple(model.image_shape)}; remove "
                f"lpips or use another net (smallest sides: {SMALLEST})"
            )

    def missing(self) -> list[str]:
        return complaints(self._backbone.hash)

    def prepare(self, count: int) -> None:
        self._backbone.hash()

    def protocol(self) -> dict[str, Any]:
        return {
            **super().protocol(),
            "net": self._net,
            "weights": self._backbone.hash(),
            "linear": "torchmetrics' copy of version 0.1",
            "resize": "none",
        }

    def compare(self, pairs: Pairs) -> Tensor:
        return self._backbone.distance(pairs.images, pairs.reference)


class Backbone:
    """The network of LPIPS, with the weights of a file; read when first needed."""

    def __init__(self, net: Net, weights: str | None) -> None:
        self.net, self._given = net, weights
        self._network: nn.Module | None = None
        self._hash: str | None = None

    def hash(self) -> str:
        """Hex sha256 of the weights file.

        Raises ConfigError if it is missing, CorruptFile if it lies in the default place but is not
        the published one.
        """
        self._hash = self._hash or self._checked_hash()
        return self._hash

    @torch.no_grad()
    def distance(self, images: Tensor, reference: Tensor) -> Tensor:
        """LPIPS ``[B]`` of uint8 ``[B, C, H, W]``, float32."""
        if self._network is None:
            path = self._file()
            self._network = lpips_network(self.net, load_weights(path), path)
        first, second = (_scaled(each) for each in (images, reference))
        found: Tensor = self._network(first, second)
        return found.reshape(-1)

    def _checked_hash(self) -> str:
        path = self._file()
        found, published = sha256(path), published_weights(self.net)
        if self._given is None and not found.startswith(published.sha256):
            raise CorruptFile(
                f"weights {path}: not the published file, whose sha256 begins with "
                f"{published.sha256} (got {found[:8]}); get it again from {published.url}"
            )
        return found

    def _file(self) -> Path:
        published = published_weights(self.net)
        path = published.default_place if self._given is None else Path(self._given)
        if not path.is_file():
            raise ConfigError(
                f"lpips: no weights for net {self.net!r} at {path}; nothing is downloaded here, so "
                f"get {published.url} ({published.megabytes:.0f} MB) and put it there, or say "
                "where it is with weights: PATH"
            )
        return path


class PublishedWeights:
    """torchvision's file for a backbone: where it is published, and what it must be."""

    def __init__(self, url: str, megabytes: float) -> None:
        self.url, self.megabytes = url, megabytes
        self.sha256 = url.rpartition("-")[2].partition(".")[0]  # its beginning, as far as told

    @property
    def default_place(self) -> Path:
        """torch.hub's checkpoints folder, where torchvision keeps it too."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.url.rpartition("/")[2]


def published_weights(net: Net) -> PublishedWeights:
    """The weights LPIPS was published with, in torchvision's form."""
    from torchvision.models import get_model_weights

    weights = get_model_weights(BACKBONES[net]).IMAGENET1K_V1
    return PublishedWeights(weights.url, weights.meta["_file_size"])


def lpips_network(net: Net, state: dict[str, Tensor], path: Path) -> nn.Module:
    """torchmetrics' LPIPS network around a backbone with the weights ``state`` of ``path``.

    Called with two batches ``[B, 3, H, W]`` in [-1, 1]. Raises CorruptFile if weights are missing
    or of another shape.
    """
    # torchmetrics' metric always lets torchvision download the backbone. Its network does not if
    # asked for a random one, and gets every weight from the file.
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    with torch.random.fork_rng(devices=[]):
        network: nn.Module = _NoTrainLpips(net=net, pnet_rand=True)
    backbone: Any = network.net
    try:
        backbone.load_state_dict(
            {key: state[_published_name(key)] for key in backbone.state_dict()}
        )
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CorruptFile(
            f"weights {path}: not those of torchvision's {BACKBONES[net]} ({reason}); "
            "wanted the file that belongs to this net"
        ) from error
    return network


def _published_name(key: str) -> str:
    """torchvision's name of a weight, which LPIPS has cut into slices: ``features.N.…``."""
    # slice1.0.weight, or for squeezenet slices.1.3.squeeze.weight
    words = key.split(".")
    return ".".join(["features", *words[2 if words[0] == "slices" else 1 :]])


def _scaled(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)
