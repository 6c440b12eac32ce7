"""iec_eval: evaluate efficient diffusion models, with and without iterative error correction."""

__version__ = "0.1.0"
