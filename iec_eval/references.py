"""The verb ``reference``: statistics to compare with, made from images or taken from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.images import ImagePreparation, Subset, open_images
from iec_eval.metrics.features import FeatureNetwork, feature_network
from iec_eval.metrics.published import import_statistics
from iec_eval.metrics.statistics import ReferenceStatistics, reference_from_images
from iec_eval.progress import Progress
from iec_eval.runs import RunFolder


def make(
    images: str,
    out: Path,
    *,
    features: str,
    weights: str | None,
    crop: str,
    pad: int,
    size: int | None,
    resize: str,
    channels: str | None,
    count: int | None,
    keep_features: int | None,
    statistics: str | None,
) -> str:
    """Make reference statistics from images or from published ones; says what was written.

    Raises ConfigError, Incompatible or CorruptFile for input that cannot be used, StorageError if
    ``out`` cannot be written.
    """
    preparation = ImagePreparation(pad, size, int(channels) if channels else None, crop, resize)
    network = feature_network(features, weights)
    _check_out(images, out)
    keep = keep_features or 0
    if statistics is None:
        made = _from_images(images, out, preparation, network, count, keep)
    else:
        if preparation != ImagePreparation():
            raise ConfigError(
                f"statistics {images}: they are of images prepared long ago; leave --crop, --pad, "
                "--size, --resize and --channels out"
            )
        with _told(out, keep) as tell:
            made = import_statistics(
                Path(images), statistics, network, count=count, keep=keep, progress=tell
            )
    made.save(out)
    return _as_text(out, made)


def _check_out(images: str, out: Path) -> None:
    """Fail before the work, not after it."""
    RunFolder(out.parent).open()
    if out.is_dir() or out.resolve() == Path(images).resolve():
        what = "a folder" if out.is_dir() else "the file that is read"
        raise ConfigError(f"OUT {out}: is {what}; give the name of a new file")
    if out.exists():
        try:
            ReferenceStatistics.load(out)
        except CorruptFile:
            raise ConfigError(
                f"OUT {out}: is there, and no reference; delete it, or give the name of a new file"
            ) from None


def _from_images(
    images: str,
    out: Path,
    preparation: ImagePreparation,
    network: FeatureNetwork,
    count: int | None,
    keep: int,
) -> ReferenceStatistics:
    network.load()
    collection = open_images(images)
    if count is not None:
        collection = Subset(collection, count)
    with _told(out, len(collection)) as tell:
        return reference_from_images(
            collection, preparation, network, source=images, keep=keep, progress=tell
        )


@contextmanager
def _told(out: Path, total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over ``total`` images, if any; gives what tells it how many are done."""
    progress, done = Progress("images"), 0
    if total:
        progress.start(total)
        progress.describe(f"reference {out.name}")

    def tell(now: int, _: int) -> None:
        nonlocal done
        progress.advance(now - done)
        done = now

    yield tell
    progress.close()


def _as_text(out: Path, made: ReferenceStatistics) -> str:
    """What is in the file, and what of it is only assumed."""
    of = "an unknown number of" if made.count is None else str(made.count)
    kept = f", those of {made.kept.count} images kept" if made.kept else ""
    lines = [f"{out}: {of} images, {len(made.mu)} features{kept}"]
    if made.source.get("published_weights") is False:
        lines.append(
            "note: the weights file is not the published one, which these statistics are of; their "
            "protocol names the file all the same"
        )
    return "\n".join(lines)
