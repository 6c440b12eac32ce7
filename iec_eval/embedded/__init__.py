"""Packaged models, each a folder with its data card (README.md)."""

from pathlib import Path

FASHION_MNIST = Path(__file__).parent / "fashion_mnist"
FASHION_MNIST_UNCONDITIONAL = 10  # the class that means "no label"
