"""The gallery inside the page: a strip of images per row, and its difference to full precision."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from torch import Tensor

from iec_eval.report.gallery import GalleryRow, differences

if TYPE_CHECKING:
    from PIL import Image

BUDGET = 2_200_000  # bytes of all strips; base64 makes a third more of them
GAP = 24  # a strip's gap is its image's width divided by this, at least one pixel
_GREY = (128, 128, 128)  # of gaps where the format has no transparency
_SMALL = 64  # pixels: up to here images are stored without loss and enlarged by the browser
_CELL = 72  # pixels that small images are enlarged to, about
# side in pixels (None: as it is) and JPEG quality (None: PNG), tried in this order
_ENCODINGS: tuple[tuple[int | None, int | None], ...] = (
    (None, None),
    (256, 85),
    (128, 85),
    (128, 70),
    (96, 60),
    (64, 50),
    (48, 30),
)


@dataclass(frozen=True)
class Strip:
    """One row's pictures as ``data:`` addresses; no difference for the full-precision row."""

    name: str
    images: str
    difference: str | None


@dataclass(frozen=True)
class Filmstrips:
    """The strips of all rows; ``width`` and ``height`` in CSS pixels are what a strip takes.

    ``factor`` is how much differences are amplified; ``sharp`` says whether pixels are enlarged;
    ``shrunk`` is the side in pixels that larger images were brought to.
    """

    strips: list[Strip]
    reference: str | None
    factor: int
    count: int
    width: int
    height: int
    sharp: bool
    shrunk: int | None


def filmstrips(
    rows: Sequence[GalleryRow],
    reference: str | None,
    *,
    left_out: Collection[str] = (),
    columns: int = 8,
    budget: int = BUDGET,
) -> Filmstrips | None:
    """The strips that fit into ``budget`` bytes, with as little loss as that allows.

    ``rows`` as :func:`gallery` takes them; ``reference`` names the row that differences are
    against, rows in ``left_out`` have none. None where there are no rows.
    """
    if not rows:
        return None
    chosen = [(name, images[:columns]) for name, images in rows]
    apart, factor = differences(chosen, reference or "", left_out=left_out)
    pictures = [images for _, images in (*chosen, *apart)]
    side, encoded = _encoded(pictures, budget)
    count = max(len(images) for _, images in chosen)
    height, width = (int(size) for size in chosen[0][1].shape[-2:])
    scale = max(1.0, round(_CELL / max(height, width))) if side is None else 1.0
    scale = scale if side is None else min(1.0, side / max(height, width))
    addresses = dict(zip([name for name, _ in apart], encoded[len(chosen) :], strict=True))
    return Filmstrips(
        [Strip(n, data, addresses.get(n)) for (n, _), data in zip(chosen, encoded, strict=False)],
        reference if apart else None,
        factor,
        count,
        round(scale * _strip_width(width, count)),
        round(scale * height),
        scale > 1,
        side if side is not None and side < max(height, width) else None,
    )


def _encoded(pictures: Sequence[Tensor], budget: int) -> tuple[int | None, list[str]]:
    """The ``data:`` addresses of strips in the first encoding that fits, and its side."""
    small = max(pictures[0].shape[-2:]) <= _SMALL
    for side, quality in _ENCODINGS if small else _ENCODINGS[1:]:
        made = list(_within(pictures, side, quality, budget))
        if len(made) == len(pictures):
            break
    else:  # the last resort may be too large, and is still shown
        made = [_encode(_strip(images, side), quality) for images in pictures]
    kind = "png" if quality is None else "jpeg"
    return side, [f"data:image/{kind};base64,{base64.b64encode(data).decode()}" for data in made]


def _within(
    pictures: Sequence[Tensor], side: int | None, quality: int | None, budget: int
) -> Iterator[bytes]:
    """Encoded strips, as far as they fit into the budget together."""
    for images in pictures:
        data = _encode(_strip(images, side), quality)
        budget -= len(data)
        if budget < 0:
            return
        yield data


def _strip_width(width: int, count: int) -> int:
    return count * width + (count - 1) * max(1, width // GAP)


def _strip(images: Tensor, side: int | None) -> Image.Image:
    """Images [N, C, H, W] beside each other, with transparent gaps; at most ``side`` high."""
    from PIL import Image

    height, width = (int(size) for size in images.shape[-2:])
    scale = 1.0 if side is None else min(1.0, side / max(height, width))
    strip = Image.new("RGBA", (_strip_width(width, len(images)), height), (*_GREY, 0))
    for column, image in enumerate(images):
        pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
        strip.paste(Image.fromarray(pixels), (column * (width + max(1, width // GAP)), 0))
    size = (max(1, round(strip.width * scale)), max(1, round(height * scale)))
    return strip if scale == 1.0 else strip.resize(size, Image.Resampling.BOX)


def _encode(strip: Image.Image, quality: int | None) -> bytes:
    from PIL import Image

    file = BytesIO()
    if quality is None:
        strip.save(file, format="PNG", optimize=True)
        return file.getvalue()
    flat = Image.new("RGB", strip.size, _GREY)
    flat.paste(strip, mask=strip.getchannel("A"))
    flat.save(file, format="JPEG", quality=quality, optimize=True)
    return file.getvalue()
