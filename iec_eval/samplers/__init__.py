"""Samplers: how a prediction becomes the next sample."""
