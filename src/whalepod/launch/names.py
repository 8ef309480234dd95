"""What each engine calls what a plan decides: one table. An engine that lacks a row cannot be told it."""

from __future__ import annotations

TRAINING = {  # fields of whalepod's Layout: Megatron-Bridge's
    "tp": "model.tensor_model_parallel_size",
    "pp": "model.pipeline_model_parallel_size",
    "cp": "model.context_parallel_size",
    "ep": "model.expert_model_parallel_size",
    "expert_tp": "model.expert_tensor_parallel_size",
    "stages_per_rank": "model.virtual_pipeline_model_parallel_size",
    "stage_layers": "model.pipeline_model_parallel_layout",
    "micro_batch": "train.micro_batch_size",
    "global_batch": "train.global_batch_size",
    "dp_replicate": "ddp.num_distributed_optimizer_instances",
}

SERVING: dict[str, dict[str, str]] = {  # of a worker, and of what it was planned for: vLLM's, SGLang's
    "tp": {"vllm": "--tensor-parallel-size", "sglang": "--tp-size"},  # SGLang's counts all GPUs of a stage
    "pp": {"vllm": "--pipeline-parallel-size", "sglang": "--pp-size"},
    "dp": {"vllm": "--data-parallel-size", "sglang": "--attn-dp-size"},
    "ep": {"vllm": "--enable-expert-parallel", "sglang": "--ep-size"},  # vLLM's is a switch: all or none
    "requests": {"vllm": "--max-num-seqs", "sglang": "--max-running-requests"},  # of a rank; of the worker
    "chunk": {"vllm": "--max-num-batched-tokens", "sglang": "--chunked-prefill-size"},  # likewise
    "context": {"vllm": "--max-model-len", "sglang": "--context-length"},
    "cache": {"vllm": "--kv-cache-dtype", "sglang": "--kv-cache-dtype"},
    "quantization": {"vllm": "--quantization", "sglang": "--quantization"},
    "exchange": {"vllm": "--all2all-backend", "sglang": "--moe-a2a-backend"},
    "redundant": {"vllm": "--eplb-config", "sglang": "--ep-num-redundant-experts"},
    "balance": {"vllm": "--enable-eplb", "sglang": "--enable-eplb"},
    "overlap": {"vllm": "--enable-dbo", "sglang": "--enable-two-batch-overlap"},
    "drafts": {"vllm": "--speculative-config", "sglang": "--speculative-num-steps"},
    "mode": {"sglang": "--disaggregation-mode"},
}
