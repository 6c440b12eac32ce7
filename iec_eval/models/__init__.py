"""Diffusion models: what predicts, and how its latents become images."""
