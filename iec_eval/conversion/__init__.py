"""Original checkpoints of published diffusion models, made into folders in diffusers' layout."""
