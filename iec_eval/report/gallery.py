"""The same seeds side by side: one row per variant, one column per image index."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from iec_eval.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

GAP = 4  # pixels around every cell
LABEL = 22  # pixels of the line above a row of images
TEXT_SIZE = 15
CELL = 64  # pixels that small images are enlarged to
PAPER = (255, 255, 255)
INK = (20, 20, 20)

GalleryRow = tuple[str, Tensor]
AMPLIFICATIONS = (1, 2, 4, 8, 16, 32)
SHARE_IN_RANGE = 0.95  # of amplified differences; the rest is clipped


def gallery(
    rows: Sequence[GalleryRow], *, columns: int = 8, scale: int | None = None
) -> Image.Image:
    """An RGB picture in which images of one column share their noise.

    Args:
        rows: label and uint8 images [N, C, H, W] of each variant, C = 1 or 3; image i of every
            row has index i. A row with fewer images than the others leaves cells empty.
        columns: at most this many images of each row.
        scale: whole enlargement factor (nearest neighbour); None brings small images to about
            64 pixels and leaves larger ones alone.

    Raises ConfigError for rows that do not fit together.
    """
    _check(rows, columns, scale)
    height, width = (int(size) for size in rows[0][1].shape[-2:])
    factor = scale or max(1, round(CELL / max(height, width)))
    cell = (width * factor, height * factor)
    shown = min(columns, max(len(images) for _, images in rows))
    sheet = _sheet(len(rows), shown, cell, max(_text_width(name) for name, _ in rows))
    for index, (name, images) in enumerate(rows):
        _write_label(sheet, name, cell_corner(index, 0, cell))
        for column, image in enumerate(images[:shown]):
            sheet.paste(_enlarged(image, cell), cell_corner(index, column, cell))
    return sheet


def differences(
    rows: Sequence[GalleryRow], reference: str, *, left_out: Collection[str] = ()
) -> tuple[list[GalleryRow], int]:
    """Each row's pixels minus those of the row ``reference``, around mid-grey.

    Returns pictures as :func:`gallery` takes them, 128 + factor * difference clipped to 0..255, and
    that factor: one for all rows, the largest that leaves most differences unclipped. Rows in
    ``left_out``, with other sizes or no counterpart, have no difference; nor has any if the
    reference is left out or not there.
    """
    base = dict(rows).get(reference)
    if base is None or reference in left_out:
        return [], 1
    compared = [
        (name, images)
        for name, images in rows
        if name != reference and name not in left_out and images.shape[1:] == base.shape[1:]
    ]
    factor = _amplification(_apart(images, base) for _, images in compared)
    shown = [
        (name, (128 + factor * _apart(images, base)).clamp(0, 255).byte())
        for name, images in compared
    ]
    return shown, factor


def _apart(images: Tensor, base: Tensor) -> Tensor:
    return images[: len(base)].short() - base[: len(images)].short()


def _amplification(apart: Iterable[Tensor]) -> int:
    # counted, not sorted: large images have many millions of pixels
    counts = torch.zeros(256, dtype=torch.int64)
    for difference in apart:
        counts += torch.bincount(difference.abs().flatten().int(), minlength=256)
    within = counts.cumsum(0)
    common = int((within < SHARE_IN_RANGE * within[-1]).sum())
    return max(factor for factor in AMPLIFICATIONS if factor == 1 or factor * common <= 127)


def cell_corner(row: int, column: int, cell: tuple[int, int]) -> tuple[int, int]:
    """Left and top pixel of an image in the gallery; ``cell`` is its (width, height) there."""
    width, height = cell
    return GAP + column * (width + GAP), GAP + row * (LABEL + height + 2 * GAP) + LABEL


def _check(rows: Sequence[GalleryRow], columns: int, scale: int | None) -> None:
    if not rows or columns < 1 or (scale is not None and scale < 1):
        raise ConfigError(
            "gallery: wanted at least one row, column and factor, got "
            f"{len(rows)} rows, columns={columns}, scale={scale}"
        )
    size = rows[0][1].shape[-2:]
    for name, images in rows:
        fits = images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[-2:] == size
        if not fits or images.dtype != torch.uint8:
            raise ConfigError(
                f"gallery row {name!r}: wanted uint8 images [N, 1 or 3, {size[0]}, {size[1]}], "
                f"got {images.dtype} {list(images.shape)}"
            )


def _text_width(text: str) -> int:
    from PIL import ImageFont

    return math.ceil(ImageFont.load_default(TEXT_SIZE).getlength(_one_line(text)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sheet(rows: int, columns: int, cell: tuple[int, int], text_width: int) -> Image.Image:
    from PIL import Image

    right, bottom = cell_corner(rows - 1, columns, cell)
    width = max(right, text_width + 2 * GAP)
    return Image.new("RGB", (width, bottom + cell[1] + GAP), PAPER)


def _write_label(sheet: Image.Image, name: str, corner: tuple[int, int]) -> None:
    from PIL import ImageDraw, ImageFont

    left, top = corner
    font = ImageFont.load_default(TEXT_SIZE)
    place = (left, top - LABEL // 2)
    ImageDraw.Draw(sheet).text(place, _one_line(name), fill=INK, font=font, anchor="lm")


def _enlarged(image: Tensor, cell: tuple[int, int]) -> Image.Image:
    from PIL import Image

    pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(pixels).resize(cell, Image.Resampling.NEAREST)
