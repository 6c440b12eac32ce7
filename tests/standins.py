"""Small stand-ins of the published models: their layout, few channels, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from iec_eval.conversion.families import FAMILIES
from iec_eval.networks import build_first_stage, build_network

LATENT_MODELS = ("ldm-lsun-churches", "ldm-lsun-bedrooms", "ldm-imagenet", "stable-diffusion-v1")
PUBLISHED = ("ddpm-cifar10", *LATENT_MODELS)
WIDTH = 32  # channels of the first block; GroupNorm has 32 groups
STATES = 64  # width of the states that cross-attention reads
LATENT = 8  # side of a sample, unless there are more levels than it can be halved
PROMPTS = ["a cat", "two dogs on a hill", "a red bus"]
WORDS = ["a", "cat", "two", "dogs", "on", "hill", "red", "bus"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_standin(name: str, folder: Path, *, seed: int = 0) -> Path:
    """A folder in diffusers' layout that the model ``name`` reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component, config in FAMILIES[name].layout().items():
            (folder / component).mkdir(parents=True, exist_ok=True)
            MAKERS[component](folder / component, config)
    return folder


def make_clip(folder: Path) -> Path:
    """A small CLIP model with its tokenizer and image processor, as transformers saves them."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = _tokenizer(folder / "words")
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2}
        text = {**sizes, "vocab_size": len(ids), "eos_token_id": ids["<|endoftext|>"]}
        vision = {**sizes, "image_size": 16, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        model.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def make_scoring(folder: Path, side: int) -> Path:
    """A classifier for colour images of a side, and reference statistics made with it."""
    from iec_eval.metrics.features import ClassifierFeatures, ImageClassifier
    from iec_eval.metrics.statistics import Moments, ReferenceStatistics
    from iec_eval.training.classifier import save_features

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_features(ImageClassifier(3, side, classes=4, width=4), folder, "standin")
        images = torch.randint(0, 256, (80, 3, side, side), dtype=torch.uint8)
    network = ClassifierFeatures(folder)
    moments = Moments(network.dimensions)
    moments.update(network.extract(images).features)
    found = moments.mean, moments.covariance(), moments.count
    ReferenceStatistics(*found, network.identity()).save(folder / "reference.safetensors")
    return folder


def _unet(folder: Path, config: dict[str, Any]) -> None:
    _shrink(config, WIDTH)
    config["sample_size"] = max(LATENT, 2 ** (len(config["block_out_channels"]) - 1))
    if config["_class_name"] != "UNet2DModel" or config["attention_head_dim"]:  # latent ones
        config["layers_per_block"] = 1
    if "cross_attention_dim" in config:
        config["cross_attention_dim"] = STATES
    _save(folder, build_network(config), config)


def _first_stage(folder: Path, config: dict[str, Any]) -> None:
    _shrink(config, WIDTH)
    config["scaling_factor"] = config["scaling_factor"] or 0.25  # some are learned
    if "num_vq_embeddings" in config:
        config["num_vq_embeddings"] = 16
    _save(folder, build_first_stage(config), config)


def _class_embedder(folder: Path, config: dict[str, Any]) -> None:
    config["dim"] = STATES
    table = torch.randn(config["num_embeddings"], STATES)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": table}, folder / WEIGHTS)


def _scheduler(folder: Path, config: dict[str, Any]) -> None:
    (folder / "scheduler_config.json").write_text(json.dumps(config))


def _text_encoder(folder: Path, config: dict[str, Any]) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = _tokenizer(folder.parent / "tokenizer")
    small = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=STATES,
        intermediate_size=STATES,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=config["max_position_embeddings"],
        bos_token_id=tokens["<|startoftext|>"],
        eos_token_id=tokens["<|endoftext|>"],
        pad_token_id=tokens["<|endoftext|>"],
    )
    CLIPTextModel(small).save_pretrained(folder)


def _tokenizer(folder: Path) -> dict[str, int]:
    """CLIP's tokenizer with letters and a few words; its vocabulary."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges, pieces = list[str](), list[str]()
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            merges.append(f"{symbols[0]} {symbols[1]}")
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
            pieces.append(symbols[0])
    names = [*letters, *(f"{letter}</w>" for letter in letters), *pieces]
    names += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    text = "\n".join(["#version: 0.2", *dict.fromkeys(merges)])
    (folder / "merges.txt").write_text(text + "\n")
    return vocabulary


def _shrink(config: dict[str, Any], width: int) -> None:
    """Keep the ratios of the blocks' channels, with ``width`` in the first."""
    channels = config["block_out_channels"]
    config["block_out_channels"] = [width * c // channels[0] for c in channels]


def _save(folder: Path, network: nn.Module, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, folder / WEIGHTS)


MAKERS = {
    "unet": _unet,
    "scheduler": _scheduler,
    "vae": _first_stage,
    "vqvae": _first_stage,
    "class_embedder": _class_embedder,
    "text_encoder": _text_encoder,
}
