"""Weights in and out: Hugging Face safetensors, BF16 or FP8 in blocks, streamed tensor by tensor.

Reading checks a folder whole before it allocates anything, then fills the model one tensor at a time. Of a
sharded parameter (DTensor) each rank reads its own part and nothing else, so the peak is the rank's share of
the model and one tensor. Writing gathers one parameter at a time and holds one shard.

    weights_names   which tensor is which parameter, and of what shape
    weights_files   folders of safetensors: checked headers, shards, replacing a folder at once
    weights_source  a folder held against what a model of its config must have
    weights_load    a folder into a model
    weights_save    a model into a folder, and one folder into another
"""

from whalepod.parallel.weights_load import build_model, load_weights
from whalepod.parallel.weights_names import expected_tensors
from whalepod.parallel.weights_save import Format, convert_hf, save_weights

__all__ = ["Format", "build_model", "convert_hf", "expected_tensors", "load_weights", "save_weights"]
