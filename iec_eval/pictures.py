"""A run's images as PNG files, for other tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from iec_eval.errors import ConfigError
from iec_eval.report.wording import quantity
from iec_eval.runs import RunFolder, VariantFolder
from iec_eval.status import ROWS, read_rows


@dataclass(frozen=True)
class Exported:
    """Images written, and the bytes of them as PNG files and as the chunk files they come from."""

    images: int
    png_bytes: int
    chunk_bytes: int


def export(out: Path, folder: Path, variant: str | None) -> tuple[str, bool]:
    """Write a run's images as PNG files, one folder per variant.

    Those that the run's table is of: the first ``images.count`` of the rows that its study has now.
    What is there besides is named; ``variant`` takes any row's folder, and all its images.

    Returns what to say, how many and how large, and whether all that the study has were there.
    """
    rows = _rows_now(out)
    wanted = None if variant is not None else rows
    folders = _variant_folders(out, variant)
    others = [f.path.name for f in folders if wanted is not None and f.path.name not in wanted]
    folders = [found for found in folders if found.path.name not in others]
    counts = {found.path.name: (wanted or {}).get(found.path.name) for found in folders}
    RunFolder(folder).open()
    _refuse_others(folder, counts)
    written, lines = list[Exported](), list[str]()
    for found, (name, count) in zip(folders, counts.items(), strict=True):
        written.append(_export_variant(found, folder / name, count))
        lines.append(f"{folder / name}: {_images_as_text(found, written[-1].images, count)}")
    missing = {name: count for name, count in (wanted or {}).items() if name not in counts}
    lines += [f"{name}: 0 of {count} images; nothing is there" for name, count in missing.items()]
    if others:
        lines.append(f"not rows of this study now, and left out: {', '.join(others)}")
    whole = not missing and all(_has(one, (rows or {}).get(one.path.name, 1)) for one in folders)
    return "\n".join([*lines, *_sizes_as_text(written)]), whole


def _has(found: VariantFolder, count: int) -> bool:
    """Whether the images 0 .. ``count - 1`` are there."""
    there = {index for part in found.finished() for index in part.indices if index < count}
    return len(there) == count


def _refuse_others(folder: Path, counts: Mapping[str, int | None]) -> None:
    """Raise ConfigError if the folder has pictures of another export, or is a run's."""
    if (folder / ROWS).is_file() or next(folder.glob("*/chunks"), None):
        raise ConfigError(f"{folder}: is a run folder; wanted an empty folder, or a new one")
    for path in sorted(folder.glob("*/*.png")):
        row, count = path.parent.name, counts.get(path.parent.name)
        ours = row in counts and path.stem.isdecimal()
        if not ours or (count is not None and int(path.stem) >= count):
            raise ConfigError(f"{path}: is of another export; wanted an empty folder, or a new one")


def _rows_now(out: Path) -> dict[str, int] | None:
    """The folders of the study's rows and how many images each has; None if that is not known."""
    if not (out / ROWS).is_file():
        return None
    listing = read_rows(out)
    return {row["folder"]: int(listing["images"]) for row in listing["rows"]}


def _images_as_text(found: VariantFolder, images: int, count: int | None) -> str:
    """How many were written, and why not all that the row has."""
    deleted = sum(len(part) for part in found.ever_finished()) - sum(map(len, found.finished()))
    why = "; others were deleted after use (execution.keep_images)" if deleted else ""
    if count is None or images == count:
        return f"{images} images{why if count is None else ''}"
    return f"{images} of {count} images{why or '; the others are not there'}"


def _export_variant(found: VariantFolder, folder: Path, count: int | None) -> Exported:
    """Write the images of the indices below ``count``, or all."""
    folder.mkdir(parents=True, exist_ok=True)
    written, read = set[Path](), 0  # chunks may overlap
    for part in found.finished():
        if count is not None and part.start >= count:
            continue
        chunk = found.read_chunk(part)
        read += (found.chunks / f"{part.stem}.safetensors").stat().st_size
        for index, image in zip(part.indices, chunk.images, strict=True):
            if count is not None and index >= count:
                break
            array = image.permute(1, 2, 0).numpy()
            picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
            picture.save(folder / f"{index:06d}.png")
            written.add(folder / f"{index:06d}.png")
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
