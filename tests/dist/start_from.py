"""What a rank of tests/train/test_fine_tuning.py does: first values under layouts, read part by part."""

from __future__ import annotations

from typing import Any

import torch

from whalepod.models.transformer import Transformer
from whalepod.parallel.checkpoint import saved_buffers
from whalepod.parallel.mesh import make_mesh, open_world
from whalepod.parallel.parallelize import parallelize
from whalepod.parallel.weights import build_model
from whalepod.parallel.weights_initial import StoredWeights
from whalepod.spec.layout import Layout
from whalepod.spec.presets import load_model_spec

CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_nextn_predict_layers": 0,
}
LAYOUTS: list[dict[str, Any]] = [
    {"dp_shard": 2},
    {"tp": 2},
    {"dp_shard": 2, "ep": 2},
    {"tp": 2, "ep": 2},
    {"pp": 2},
]


def same_start(folder: str) -> list[str]:
    """Names of weights or buffers that are not the folder's, under any of the layouts."""
    device, spec, wrong, groups = torch.device("cpu"), load_model_spec(folder), [], {}
    whole = build_model(folder, torch.float32)
    with open_world(device):
        for axes in LAYOUTS:
            mesh = make_mesh(Layout(**axes, micro_batch=1, global_batch=2, precision="bf16"), device, groups)
            with torch.device("meta"):
                model = Transformer(spec)
            found = parallelize(model, mesh, 32, StoredWeights(folder, spec))
            for name, piece in found.state.weights().items():
                if not torch.equal(piece.tensor, whole.get_parameter(name)[piece.box.slices]):
                    wrong.append(f"{axes}: {name}")
            for part in found.parts:
                for name, buffer in saved_buffers(part).items():
                    if not torch.equal(buffer, whole.get_buffer(name)):
                        wrong.append(f"{axes}: {name}")
    return wrong
