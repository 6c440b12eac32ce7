"""Image collections on disk: folders, zips, npz files and torchvision data sets, read one way.

A collection is named by one string:

* ``path/to/folder``: PNG, JPEG, BMP or WebP files; sub-folders, if any, are the classes.
* ``path/to/file.zip``: the same inside a zip file, read as if it were unpacked.
* ``path/to/file.npz``: ``arr_0`` (or ``images``) as uint8 NHWC, ``arr_1`` (or ``labels``) optional.
* ``torchvision:NAME:ROOT:SPLIT``: a torchvision data set already on disk, for instance
  ``torchvision:FashionMNIST:/data:train``; nothing is downloaded.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from iec_eval.errors import ConfigError, CorruptFile

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
WANTED_SUFFIXES = " ".join(sorted(IMAGE_SUFFIXES))
STATISTICS_KEYS = {"mu", "sigma"}
CROPS = ("center", "none")
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
RESIZES = ("area", *FILTERS, "adm", "none")
# PIL's ways to say "damaged", and those of zip files: bad headers, checksums, encryption
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
DAMAGED_ZIP = (*DAMAGED, RuntimeError, zlib.error, zipfile.BadZipFile)


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
    """How stored images become network-sized ones: crop, black border, resize, channels.

    Attributes:
        pad: border in pixels added on each side after the crop.
        size: final side length; None keeps it.
        channels: 1 or 3; None keeps them.
        crop: ``center`` takes the largest square in the middle, ``none`` nothing: what is not
            square is then stretched.
        resize: ``area`` averages whole pixels (torch's area interpolation); ``bilinear``,
            ``bicubic`` and ``lanczos`` are PIL's antialiased filters; ``adm`` halves with PIL's
            box filter while twice the size fits, goes on with bicubic until the shorter side fits
            and then crops, as guided-diffusion prepares ImageNet and LSUN; ``none`` demands
            images that have the size already.

    Raises ConfigError for settings that contradict each other.
    """

    pad: int = 0
    size: int | None = None
    channels: int | None = None
    crop: str = "center"
    resize: str = "area"

    def __post_init__(self) -> None:
        _check_choice("crop", self.crop, CROPS)
        _check_choice("resize", self.resize, RESIZES)
        if self.size is None and self.resize not in ("area", "none"):
            raise ConfigError(f"resize {self.resize} wants a size, got none; give --size")
        if self.resize == "adm" and (self.pad or self.crop != "center"):
            raise ConfigError(
                f"resize adm crops by itself and has no border, got crop {self.crop} and pad "
                f"{self.pad}; leave both out or choose another resize"
            )

    def __call__(self, image: Tensor) -> Tensor:
        """Prepare one uint8 ``[C, H, W]`` image; returns uint8, rounded to nearest.

        Raises ConfigError if it cannot be prepared.
        """
        if self.resize == "adm":
            return _with_channels(_adm_resized(image, self.size or 0), self.channels)
        if self.crop == "center":
            image = _centre_crop(image)
        image = F.pad(image, (self.pad,) * 4)
        if self.size is not None and tuple(image.shape[-2:]) != (self.size, self.size):
            image = _resized(image, self.size, self.resize)
        return _with_channels(image, self.channels)

    def record(self) -> dict[str, Any]:
        """The settings as JSON values; no ``crop`` means center, no ``resize`` area.

        Left out where they are the defaults, so that statistics made before there was a choice
        and the same ones made again have one description.
        """
        defaults = asdict(ImagePreparation())
        always = ("pad", "size", "channels")
        return {k: v for k, v in asdict(self).items() if k in always or v != defaults[k]}


def open_images(source: str) -> ImageCollection:
    """Open the collection that ``source`` names (see the module docstring).

    Raises ConfigError if it does not exist or holds no image, CorruptFile if it cannot be read.
    """
    if source.startswith("torchvision:"):
        return TorchvisionImages(source)
    path = Path(source)
    if path.is_dir():
        return FolderImages(path)
    if path.suffix.lower() == ".zip" and path.is_file():
        return ZipImages(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    raise ConfigError(
        f"images {source!r}: wanted a folder, a .zip or .npz file or torchvision:NAME:ROOT:SPLIT, "
        "found none of these; check the path"
    )


class FolderImages:
    """Image files under a folder, sorted by path; first-level sub-folders are classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise ConfigError(
                f"images {str(folder)!r}: no image files there (wanted {WANTED_SUFFIXES})"
            )
        self.class_names, self._labels = _classes([p.relative_to(folder) for p in self.files])

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        try:
            with Image.open(self.files[index]) as picture:
                return _pil_to_tensor(picture, f"image {self.files[index]}")
        except DAMAGED as error:
            raise CorruptFile(f"image {self.files[index]}: cannot be read ({error})") from error

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]


class ZipImages:
    """Image files in a zip file, in the order and with the classes of the unpacked folder.

    Everything that is no image is passed over, as are macOS's resource forks. Threads may read at
    once; a forked process opens the file anew, as it would share the position in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        members = {name for name in self._archive().namelist() if _is_image(name)}
        self.members = sorted(members, key=PurePosixPath)
        if not self.members:
            raise ConfigError(
                f"images {str(path)!r}: no image files in it (wanted {WANTED_SUFFIXES})"
            )
        self.class_names, self._labels = _classes([PurePosixPath(m) for m in self.members])

    def __len__(self) -> int:
        return len(self.members)

    def image(self, index: int) -> Tensor:
        archive, member = self._archive(), self.members[index]
        try:
            with Image.open(io.BytesIO(archive.read(member))) as picture:
                return _pil_to_tensor(picture, f"image {member} in {self.path}")
        except DAMAGED_ZIP as error:
            raise CorruptFile(f"image {member} in {self.path}: cannot be read ({error})") from error

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def _archive(self) -> zipfile.ZipFile:
        """The zip file as this process opened it."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            except DAMAGED_ZIP as error:
                raise CorruptFile(f"{self.path}: not a readable zip file ({error})") from error
        return self._opened[1]


class NpzImages:
    """Images in an npz file, as guided-diffusion and EDM write them.

    A file that holds published statistics too is refused unless ``beside_statistics``.
    """

    def __init__(self, path: Path, *, beside_statistics: bool = False) -> None:
        arrays = _read_npz(path, beside_statistics)
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
        return _pil_to_tensor(self._data[index][0], f"image {index} of {self._data}")

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


def _read_npz(path: Path, beside_statistics: bool) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as data:
            refused = set(data.files) >= STATISTICS_KEYS and not beside_statistics
            arrays = {name: data[name] for name in data.files if not refused}
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise CorruptFile(f"{path}: not a readable npz file ({error})") from error
    if refused:
        raise ConfigError(
            f"images {path}: wanted images, got published statistics (mu and sigma); import them "
            "with iec-eval reference and --statistics pytorch-fid, guided-diffusion or edm, after "
            "who made them"
        )
    return arrays


def _is_image(member: str) -> bool:
    """Whether a zip's entry is a picture, not a folder or what macOS keeps beside one."""
    path = PurePosixPath(member)
    if member.endswith("/") or path.suffix.lower() not in IMAGE_SUFFIXES:
        return False
    return path.parts[0] != "__MACOSX" and not path.name.startswith("._")


def _classes(files: Sequence[PurePath]) -> tuple[list[str] | None, list[int] | None]:
    """Class names and labels by first-level folder; None if a file is in no folder."""
    tops = [file.parts[0] for file in files]
    if any(len(file.parts) == 1 for file in files):
        return None, None
    names = sorted(set(tops))
    position = {name: label for label, name in enumerate(names)}
    return names, [position[top] for top in tops]


def _pil_to_tensor(picture: Image.Image, where: str) -> Tensor:
    """A picture as uint8 ``[1 or 3, H, W]``; raises ConfigError for one of more bits a channel."""
    if picture.mode[0] in "IF":  # which Pillow would cut off at 255
        raise ConfigError(
            f"{where}: has more than 8 bits a channel ({picture.mode}); convert it to 8 bits first"
        )
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    array = np.array(picture, dtype=np.uint8)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def _centre_crop(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def _check_choice(what: str, got: str, wanted: Sequence[str]) -> None:
    if got not in wanted:
        raise ConfigError(f"{what}: wanted one of {', '.join(wanted)}, got {got!r}")


def _resized(image: Tensor, size: int, how: str) -> Tensor:
    """``[C, H, W]`` to ``[C, size, size]``."""
    if how == "none":
        height, width = image.shape[-2:]
        raise ConfigError(
            f"resize none wants images of {size}x{size} pixels, got {width}x{height}; choose "
            "another resize or the size they have"
        )
    if how == "area":
        area = F.interpolate(image[None].float(), size=(size, size), mode="area")
        return area[0].round().to(torch.uint8)
    return _pil_resized(image, (size, size), FILTERS[how])


def _adm_resized(image: Tensor, size: int) -> Tensor:
    """Guided-diffusion's way to a square: box halvings, bicubic to the shorter side, crop."""
    height, width = image.shape[-2:]
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        image = _pil_resized(image, (height, width), Image.Resampling.BOX)
    scale = size / min(height, width)
    target = (round(height * scale), round(width * scale))
    return _centre_crop(_pil_resized(image, target, Image.Resampling.BICUBIC))


def _pil_resized(image: Tensor, size: tuple[int, int], how: Image.Resampling) -> Tensor:
    """``[C, H, W]`` to ``size`` (height, width); PIL filters every channel alike."""
    pictures = [Image.fromarray(channel.numpy()) for channel in image]
    resized = [np.array(picture.resize(size[::-1], how)) for picture in pictures]
    return torch.from_numpy(np.stack(resized))


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
