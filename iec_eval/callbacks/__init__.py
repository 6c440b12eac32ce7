"""Denoising callbacks: refine a prediction before the sampler uses it."""
