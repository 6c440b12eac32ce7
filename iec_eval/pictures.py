"""A run's images as PNG files, for other tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from iec_eval.errors import ConfigError
from iec_eval.report.wording import quantity
from iec_eval.runs import RunFolder, VariantFolder


@dataclass(frozen=True)
class Exported:
    """Images written, and the bytes of them as PNG files and as the chunk files they come from."""

    images: int
    png_bytes: int
    chunk_bytes: int


def export(out: Path, folder: Path, variant: str | None) -> str:
    """Write a run's images as PNG files, one folder per variant; says how many and how large."""
    folders = _variant_folders(out, variant)
    RunFolder(folder).open()
    written = [_export_variant(found, folder / found.path.name) for found in folders]
    lines = [
        f"{folder / f.path.name}: {one.images} images"
        for f, one in zip(folders, written, strict=True)
    ]
    return "\n".join([*lines, *_sizes_as_text(written)])


def _export_variant(found: VariantFolder, folder: Path) -> Exported:
    folder.mkdir(parents=True, exist_ok=True)
    written, read = list[Path](), 0
    for part in found.finished():
        chunk = found.read_chunk(part)
        read += (found.chunks / f"{part.stem}.safetensors").stat().st_size
        for index, image in zip(part.indices, chunk.images, strict=True):
            array = image.permute(1, 2, 0).numpy()
            picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
            picture.save(folder / f"{index:06d}.png")
            written.append(folder / f"{index:06d}.png")
    return Exported(len(written), sum(path.stat().st_size for path in written), read)


def _sizes_as_text(written: Sequence[Exported]) -> list[str]:
    """A line on the bytes of 1,000 images in both forms; none where there are no images."""
    images = sum(one.images for one in written)
    if not images:
        return []
    png = quantity(1000 * sum(one.png_bytes for one in written) / images, "B")
    chunks = quantity(1000 * sum(one.chunk_bytes for one in written) / images, "B")
    return [f"1,000 images take {png} as PNG files, {chunks} as chunk files"]


def _variant_folders(out: Path, variant: str | None) -> list[VariantFolder]:
    found = sorted(path.parent for path in out.glob("*/chunks"))
    if not found:
        raise ConfigError(f"{out}: no images of a run there")
    slug = "" if variant is None else _slug_of(variant)
    wanted = [path for path in found if path.name.rpartition("-")[0] == slug]
    wanted = wanted or [path for path in found if path.name.startswith(slug)]
    if not wanted:
        names = ", ".join(path.name for path in found)
        raise ConfigError(f"{out}: no variant {variant!r} there (folders: {names})")
    return [VariantFolder(path) for path in wanted]


def _slug_of(variant: str) -> str:
    return RunFolder(Path()).variant(variant, "").path.name.rstrip("-")
