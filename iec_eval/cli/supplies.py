"""The commands for what studies are made of: plugins, parts, models, reference statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from iec_eval.cli.options import NATURAL, POSITIVE, json_option


@click.command()
@json_option
def plugins(as_json: bool) -> None:
    """List what is installed: distributions, their hooks and names, and broken ones."""
    from iec_eval import workflow

    click.echo(workflow.plugins(as_json=as_json))


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models, samplers, methods, callbacks and metrics, with their options."""
    from iec_eval import workflow

    click.echo(workflow.parts(as_json=as_json))


@click.command()
@click.argument("images")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--features", default="inception", show_default=True, help="Feature network.")
@click.option("--weights", help="Weights file of the feature network.")
@click.option(
    "--crop",
    type=click.Choice(["center", "none"]),
    default="center",
    show_default=True,
    help="The middle square, or all of the image.",
)
@click.option("--pad", type=NATURAL, default=0, show_default=True, help="Black border in pixels.")
@click.option("--size", type=POSITIVE, help="Final side length in pixels.")
@click.option(
    "--resize",
    type=click.Choice(["area", "bilinear", "bicubic", "lanczos", "adm", "none"]),
    default="area",
    show_default=True,
    help="How to get to --size: average of areas, a filter of PIL's, guided-diffusion's box and "
    "bicubic, or not at all.",
)
@click.option("--channels", type=click.Choice(["1", "3"]), help="Final number of channels.")
@click.option("--count", type=POSITIVE, help="Only the first COUNT images.")
@click.option(
    "--keep-features",
    type=POSITIVE,
    metavar="N",
    help="Store the features of N images too, for kid and precision-recall.",
)
@click.option(
    "--statistics",
    type=click.Choice(["pytorch-fid", "guided-diffusion", "edm"]),
    help="IMAGES is an .npz file of this project's statistics, of COUNT images if that is given.",
)
def reference(images: str, out: Path, **options: Any) -> None:
    """Make reference statistics OUT from IMAGES.

    IMAGES is a folder, a .zip or .npz file or torchvision:NAME:ROOT:SPLIT; with --statistics an
    .npz file of published statistics. Both need the weights of the feature network.
    """
    from iec_eval import references

    click.echo(references.make(images, out, **options))


@click.command()
@click.argument("images")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--samples",
    type=NATURAL,
    default=5000,
    show_default=True,
    help="Samples to measure the FID of; 0 measures nothing.",
)
@click.option("--test", "test_images", help="Held-out images, for accuracy and the FID floor.")
@click.option("--tag", required=True, help="Names the scores: fid-TAG.")
@click.option("--steps", type=POSITIVE, default=9000, show_default=True, help="Denoiser steps.")
@click.option("--epochs", type=POSITIVE, default=15, show_default=True, help="Classifier epochs.")
@click.option("--pad", type=NATURAL, default=0, show_default=True, help="Black border in pixels.")
@click.option("--size", type=POSITIVE, help="Final side length in pixels.")
@click.option("--channels", type=click.Choice(["1", "3"]), help="Final number of channels.")
@click.option("--threads", type=POSITIVE, help="CPU threads.")
def train(images: str, out: Path, **options: Any) -> None:
    """Train a small model on IMAGES into the folder OUT; resumes.

    Makes what the packaged model has: network, feature network, reference statistics.
    """
    from iec_eval import workflow

    click.echo(workflow.train(images, out, **options))


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--family",
    required=True,
    metavar="NAME",
    help="ddpm-cifar10, ldm-lsun-churches, ldm-lsun-bedrooms, ldm-imagenet or stable-diffusion-v1.",
)
@click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    help="Averaged or raw weights: which to take where the file has both, which they are where "
    "it does not say.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The YAML that CHECKPOINT was published with, for other sizes than the family's.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Folder with vocab.json and merges.txt, which Stable Diffusion's file lacks.",
)
def convert(checkpoint: Path, out: Path, **options: Any) -> None:
    """Convert an original CHECKPOINT into the folder OUT, in diffusers' layout; resumes.

    CHECKPOINT is a .ckpt, .pth or .safetensors file of latent diffusion, Stable Diffusion v1 or
    the DDIM code. Nothing in it is run, and little memory is needed. OUT/conversion.json says
    what was made from what. Progress goes to stderr.
    """
    from iec_eval.conversion.convert import convert as convert_checkpoint

    click.echo(convert_checkpoint(checkpoint, out, **options))
