"""Serving: a latent cache, sampling and generation."""
