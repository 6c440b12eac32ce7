"""Image collections on disk: folders, npz files and torchvision data sets, read one way.

A collection is named by one string:

* ``path/to/folder``: PNG, JPEG, BMP or WebP files; sub-folders, if any, are the classes.
* ``path/to/file.npz``: ``arr_0`` (or ``images``) as uint8 NHWC, ``arr_1`` (or ``labels``) optional.
* ``torchvision:NAME:ROOT:SPLIT``: a torchvision data set already on disk, for instance
  ``torchvision:FashionMNIST:/data:train``; nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from iec_eval.errors import ConfigError, CorruptFile

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


class ImageCollection(Protocol):
    """What every collection offers: uint8 CHW images by index, and their classes if it has any."""

    class_names: list[str] | None

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor:
        """Image ``index`` as uint8 ``[C, H, W]``."""

    def label(self, index: int) -> int | None:
        """Class of image ``index``, or None where the collection has no classes."""


@dataclass(frozen=True)
class ImagePreparation:
    """How stored images become network-sized ones: centre crop, black border, area average.

    ``pad`` is the border in pixels added on each side after the crop; ``size`` the final side
    length (None keeps it); ``channels`` 1 or 3 (None keeps them).
    """

    pad: int = 0
    size: int | None = None
    channels: int | None = None

    def __call__(self, image: Tensor) -> Tensor:
        """Prepare one uint8 ``[C, H, W]`` image; returns uint8, rounded to nearest."""
        image = _centre_crop(image)
        image = F.pad(image, (self.pad,) * 4)
        if self.size is not None and self.size != image.shape[-1]:
            area = F.interpolate(image[None].float(), size=(self.size, self.size), mode="area")
            image = area[0].round().to(torch.uint8)
        return _with_channels(image, self.channels)


def open_images(source: str) -> ImageCollection:
    """Open the collection that ``source`` names (see the module docstring).

    Raises ConfigError if it does not exist or holds no image, CorruptFile if it cannot be read.
    """
    if source.startswith("torchvision:"):
        return TorchvisionImages(source)
    path = Path(source)
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    raise ConfigError(
        f"images {source!r}: wanted a folder, an .npz file or torchvision:NAME:ROOT:SPLIT, "
        "found none of these; check the path"
    )


class FolderImages:
    """Image files under a folder, sorted by path; first-level sub-folders are classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            wanted = " ".join(sorted(IMAGE_SUFFIXES))
            raise ConfigError(f"images {str(folder)!r}: no image files there (wanted {wanted})")
        tops = [p.relative_to(folder).parts for p in self.files]
        names = sorted({parts[0] for parts in tops}) if all(len(p) > 1 for p in tops) else None
        self.class_names = names
        self._labels = [names.index(parts[0]) for parts in tops] if names else None

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        try:
            with Image.open(self.files[index]) as picture:
                return _pil_to_tensor(picture)
        except (OSError, SyntaxError, ValueError) as error:  # PIL's ways to say "damaged"
            raise CorruptFile(f"image {self.files[index]}: cannot be read ({error})") from error

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]


class NpzImages:
    """Images in an npz file, as guided-diffusion and EDM write them."""

    def __init__(self, path: Path) -> None:
        arrays = _read_npz(path)
        images = arrays.get("arr_0", arrays.get("images"))
        if images is None or images.dtype != np.uint8 or images.ndim != 4:
            got = {name: (str(a.dtype), a.shape) for name, a in arrays.items()}
            raise ConfigError(f"images {path}: wanted uint8 NHWC under arr_0 or images, got {got}")
        labels = arrays.get("arr_1", arrays.get("labels"))
        if labels is not None and labels.shape != (len(images),):
            raise ConfigError(
                f"images {path}: wanted {len(images)} labels in one row, got {labels.shape}"
            )
        self._images, self._labels = images, labels
        self.class_names = (
            None if labels is None else [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
        )

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Tensor:
        return torch.from_numpy(self._images[index]).permute(2, 0, 1).contiguous()

    def label(self, index: int) -> int | None:
        return None if self._labels is None else int(self._labels[index])


class TorchvisionImages:
    """A classification data set of torchvision, already on disk."""

    def __init__(self, source: str) -> None:
        parts = source.split(":")
        if len(parts) != 4:
            raise ConfigError(f"images {source!r}: wanted torchvision:NAME:ROOT:SPLIT")
        _, name, root, split = parts
        self._data = _open_torchvision(name, root, split)
        classes = getattr(self._data, "classes", None)
        self.class_names = None if classes is None else [str(c) for c in classes]

    def __len__(self) -> int:
        return len(self._data)

    def image(self, index: int) -> Tensor:
        return _pil_to_tensor(self._data[index][0])

    def label(self, index: int) -> int | None:
        return int(self._data[index][1])


class Subset:
    """The first ``count`` images of a collection.

    Raises ConfigError if there are fewer.
    """

    def __init__(self, images: ImageCollection, count: int) -> None:
        if not 0 < count <= len(images):
            raise ConfigError(f"{count} images wanted, the collection has {len(images)}")
        self._images, self._count = images, count
        self.class_names = images.class_names

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> Tensor:
        return self._images.image(index)

    def label(self, index: int) -> int | None:
        return self._images.label(index)


def load_all(
    images: ImageCollection, preparation: ImagePreparation
) -> tuple[Tensor, Tensor | None]:
    """The whole collection in memory: uint8 ``[N, C, H, W]`` and int64 labels ``[N]`` or None.

    Raises ConfigError if the prepared images are not all of one shape.
    """
    prepared = [preparation(images.image(index)) for index in range(len(images))]
    shapes = {tuple(image.shape) for image in prepared}
    if len(shapes) > 1:
        raise ConfigError(f"images of several shapes {sorted(shapes)}: give a size and channels")
    labels = None
    if images.class_names is not None:
        labels = torch.tensor([images.label(index) for index in range(len(images))])
    return torch.stack(prepared), labels


def _open_torchvision(name: str, root: str, split: str) -> Any:
    from torchvision import datasets

    factory = getattr(datasets, name, None)
    if factory is None:
        raise ConfigError(f"torchvision has no data set {name!r}")
    choice = {"train": split == "train"} if split in ("train", "test") else {"split": split}
    for arguments in ({"download": False, **choice}, {"split": split}):
        try:
            return factory(root, **arguments)
        except TypeError:  # data sets differ in what they take
            continue
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(f"torchvision {name} under {root!r}: {error}") from error
    raise ConfigError(f"torchvision {name}: no data set with a split {split!r}")


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise CorruptFile(f"{path}: not a readable npz file ({error})") from error


def _pil_to_tensor(picture: Image.Image) -> Tensor:
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    array = np.array(picture, dtype=np.uint8)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def _centre_crop(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def _with_channels(image: Tensor, channels: int | None) -> Tensor:
    if channels is None or image.shape[0] == channels:
        return image
    if image.shape[0] not in (1, 3):
        raise ConfigError(f"wanted images of 1 or 3 channels, got {image.shape[0]}")
    if channels == 3:
        return image.expand(3, -1, -1)
    # ITU-R 601 luma, the weights PIL uses
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (image.float() * luma).sum(0, keepdim=True).round().to(torch.uint8)
