"""The data card of a trained model folder, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def card_as_text(card: dict[str, Any]) -> str:
    """Markdown: what was trained on what, how, and what it measured."""
    lines = ["# Data card", "", *_facts(card)]
    if card["loss_every_100_steps"]:
        lines += ["", "## Loss", "", *_loss_table(card)]
    return "\n".join(lines) + "\n"


def _facts(card: dict[str, Any]) -> list[str]:
    facts = [
        f"- images: `{card['images']}`, prepared with {_settings(card['preparation'])}",
        f"- denoiser: {_settings(card['denoiser'])}",
        f"- classifier: {_settings(card['classifier'])}",
    ]
    if card.get("test"):
        accuracy, count = card["test"]["classifier_accuracy"], card["test"]["count"]
        facts.append(f"- classifier accuracy on {count:,} test images: {accuracy:.2%}")
    if card.get("fid"):
        facts += _fid_facts(card["fid"])
    return facts


def _fid_facts(fid: dict[str, Any]) -> list[str]:
    facts = [
        f"- {fid['metric']} of {fid['samples']:,} samples ({fid['sampler']}): {fid['model']:.4f}"
    ]
    if fid.get("real_test_images") is not None:
        floor = fid["real_test_images"]
        facts.append(
            f"- {fid['metric']} of {fid['samples']:,} real test images, the floor: {floor:.4f}; "
            f"the model is at {fid['model'] / floor:.1f} times the floor"
        )
    return facts


def _loss_table(card: dict[str, Any]) -> list[str]:
    """The loss curve at twelve points: means over 100 steps."""
    losses: Sequence[float] = card["loss_every_100_steps"]
    stride = max(1, len(losses) // 12)
    chosen = sorted({*range(stride - 1, len(losses), stride), len(losses) - 1})
    rows = [f"| {(i + 1) * 100} | {losses[i]:.4f} |" for i in chosen]
    return ["| step | mean squared error of the noise |", "|--:|--:|", *rows]


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
