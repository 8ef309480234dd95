"""Applies a layout to a model, and streams weights into and out of it."""
