"""Metrics: what is read off the images."""
