"""The recipe that made the packaged model: a small denoiser and a classifier from any images."""
