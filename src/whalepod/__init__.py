"""whalepod: plans, proves, trains and serves DeepSeek models over many GPUs."""

__version__ = "0.1.0"
