"""The files that fuzz.py reads: of each format valid ones, and the functions that take such from outside.

A format is made once a process, in an empty folder. Its reader returns for what it accepts and raises
UserError for what it refuses; what is accepted is used as far as anything that trusts it would.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from fuzz_format import CHAT, TEMPLATE, TOOL, Format, dump, put, small_tokenizer, words
from fuzz_mutate import Parts
from safetensors.torch import save
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from whalepod.calibrate.profile import profile_values
from whalepod.models.lora import add_adapters, is_adapter
from whalepod.models.transformer import Transformer
from whalepod.parallel.checkpoint import read_progress, read_tensors
from whalepod.parallel.checkpoint_files import steps_saved
from whalepod.parallel.trained import read_adapters
from whalepod.parallel.weights_names import expected_tensors
from whalepod.parallel.weights_source import open_source
from whalepod.precision.fp8 import FP8, scale_shape
from whalepod.spec.counts import total_params
from whalepod.spec.hardware import load_gpu, parse_gpus
from whalepod.spec.model import from_config, read_config, to_config
from whalepod.spec.run import LoRAConfig, dump_run, load_run
from whalepod.text.chat import ChatTemplate, conversations, encoded
from whalepod.text.sources import documents, fingerprint
from whalepod.text.tokenizer import load_tokenizer
from whalepod.train.data import PackedTokens

DENSE = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
    "vocab_size": 16,
    "intermediate_size": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "model_type": "deepseek_v3", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
    "vocab_size": 16,
    "intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "max_position_embeddings": 64,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4], "scale_fmt": "ue8m0"},
}  # fmt: skip
RUN = {
    "model": {"preset": "v3-mini", "num_hidden_layers": 2}, "layout": {"dp_shard": 2, "tp": 2,
    "micro_batch": 1},
    "data": {"source": "stdlib", "sequence_length": 64}, "optimizer": {"name": "muon"}, "train": {"steps": 5},
    "schedule": {"shape": "cosine"}, "out": "runs/x",
}  # fmt: skip
GPU = {
    "title": "A card", "architecture": "hopper", "vendor": "X", "tflops": {"bf16": 900.0, "fp8": 1800.0},
    "memory_gib": 80.0, "memory_tb_s": 3.3, "gpus_per_node": 8, "reachable": {"bf16": 0.7}, "nic_gb_s": 50.0,
    "scale_up": {"name": "link", "gb_s": 450.0, "size": 8}, "power_w": 700.0,
    "sources": {"memory_gib": "a page"},
    "price": {"usd_per_hour": 2.0, "date": "2026-11-01", "source": "a page"},
    "measured": {
        "date": "2026-11-01", "machine": "m", "torch": "2.13", "peak_tflops": {"bf16": 1.0},
        "peak_gb_s": 10.0,
        "stream_gb_s": 9.0, "gather_gb_s": 5.0, "optimizer_gb_s": 8.0, "dispatch_us": 4.0,
        "products": [["bf16", 64, 64, 64, 1e9], ["bf16", 128, 64, 64, 2e9]],
        "collectives": [["all_reduce", 2, 1024, 1e-5]],
    },
}  # fmt: skip


def config(folder: Path) -> Format:
    def read(parts: Parts) -> None:
        spec = read_config(put(folder, parts))
        total_params(spec)
        assert from_config(to_config(spec), spec.name) == spec, "not what was written"

    seeds = [
        {"config.json": dump(c)} for c in (DENSE, LATENT, {**DENSE, "model_type": "qwen3", "head_dim": 4})
    ]
    return Format(seeds, {"config.json": "json"}, read)


def _weights(values: dict[str, Any], fp8: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for name, (shape, quantised) in expected_tensors(from_config(values, "x")).items():
        found[name] = torch.zeros(shape, dtype=FP8 if quantised and fp8 else torch.bfloat16)
        if quantised and fp8:
            found[f"{name}_scale_inv"] = torch.ones(scale_shape(shape, (4, 4)))
    return found


def _all_tensors(folder: Path) -> None:
    source = open_source(folder)
    for slot in source.check(source.spec):
        if slot.copy_of is None:
            source.read_part(slot, tuple(slice(0, n) for n in slot.shape), torch.float32)
        else:
            source.check_copy(slot, tuple(slice(0, n) for n in slot.shape))


def safetensors(folder: Path) -> Format:
    put(folder, {"config.json": dump(DENSE)})
    kinds = {"model.safetensors": "safetensors"}
    return Format(
        [{"model.safetensors": save(_weights(DENSE))}], kinds, lambda p: _all_tensors(put(folder, p))
    )


def index(folder: Path) -> Format:
    tensors = list(_weights(DENSE).items())
    files = {"model-1.safetensors": save(dict(tensors[:6])), "model-2.safetensors": save(dict(tensors[6:]))}
    put(folder, {"config.json": dump(DENSE), **files})
    weight_map = {name: f"model-{1 + (i >= 6)}.safetensors" for i, (name, _) in enumerate(tensors)}
    name = "model.safetensors.index.json"
    seed = {name: dump({"metadata": {"total_size": 1}, "weight_map": weight_map})}
    return Format([seed], {name: "json"}, lambda p: _all_tensors(put(folder, p)))


def fp8(folder: Path) -> Format:
    small = {**LATENT, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "num_hidden_layers": 1}
    small |= {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0}
    seed = {"model.safetensors": save(_weights(small, fp8=True)), "config.json": dump(small)}
    kinds = {"model.safetensors": "safetensors", "config.json": "json"}
    return Format([seed], kinds, lambda p: _all_tensors(put(folder, p)))


def tokenizer(folder: Path) -> Format:
    def read(parts: Parts) -> None:
        found = load_tokenizer(put(folder, parts))
        ids = found.encode("Hello <s> day\n123", special=True) + found.encode("good\u0000 é")
        found.decode(ids)
        decoder = found.stream()
        "".join(decoder.push(i) for i in (*ids, 10**6)) + decoder.finish()
        _ = found.vocab_size, found.special_ids, found.fim_ids, found.fingerprint

    small_tokenizer(folder).save(folder)
    names = ("tokenizer.json", "tokenizer_config.json")
    byte_level = {name: (folder / name).read_bytes() for name in names}
    model = json.loads(byte_level[names[0]])
    vocab = {**{f"<0x{i:02X}>": i for i in range(256)}, "<s>": 256, "▁": 257, "a": 258, "▁a": 259}
    model |= {
        "model": {"type": "BPE", "vocab": vocab, "merges": [["▁", "a"]], "byte_fallback": True,
        "unk_token": "<s>"},
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\d|x+"}, "behavior": "Isolated",
        "invert": False},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "post_processor": None, "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0,
        "direction": "Right"},
    }  # fmt: skip
    fallback = {names[0]: dump(model), names[1]: dump({"bos_token": {"content": "<s>"}, "eos_token": "a"})}
    return Format([byte_level, fallback], dict.fromkeys(names, "json"), read)


def template(folder: Path) -> Format:
    def read(parts: Parts) -> None:
        found = ChatTemplate(put(folder, parts))
        found.render(CHAT, prompt=True, tools=[TOOL])
        found.render([{"role": "system", "content": "x"}, *CHAT])

    settings = dump({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "x"})
    seed = {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": settings}
    macros = b"{%- macro f(x) -%}[{{ x|trim }}]{%- endmacro -%}{% set ns = namespace(n=0) %}"
    macros += b"{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ f(m.content ~ ns.n) }}"
    macros += b"{% else %}{{ raise_exception('none') }}{% endfor %}"
    kinds = {"chat_template.jinja": "text", "tokenizer_config.json": "json"}
    return Format([seed, {**seed, "chat_template.jinja": macros}], kinds, read)


def run(folder: Path) -> Format:
    def read(parts: Parts) -> None:
        put(folder, {"run.yaml": parts["run.yaml"]})
        found = load_run(folder / "run.yaml", words(parts["overrides"]).split("\n")[:4])
        found.model_spec()
        (folder / "again.yaml").write_text(dump_run(found))
        assert load_run(folder / "again.yaml") == found, "not what was written"

    text = yaml.safe_dump(RUN, sort_keys=False).encode()
    base = yaml.safe_dump({"model": "v2-lite", "lora": {"r": 4, "modules": ["q_proj"]}}).encode()
    seeds = [{"run.yaml": text, "overrides": b"layout.tp=1"}]
    seeds += [{"run.yaml": base, "overrides": b"train.steps=3\nmodel.hidden_size=256\ndata.max_mib=0.5"}]
    return Format(seeds, {"run.yaml": "yaml", "overrides": "text"}, read)


def hardware(folder: Path) -> Format:
    def read(parts: Parts) -> None:
        gpu = load_gpu(put(folder, parts) / "card.yaml")
        (folder / "again.yaml").write_text(yaml.safe_dump(profile_values(gpu)))
        assert load_gpu(folder / "again.yaml") == gpu, "not what was written"

    return Format([{"card.yaml": yaml.safe_dump(GPU).encode()}], {"card.yaml": "yaml"}, read)


def gpus(_: Path) -> Format:
    texts = (b"64xH100", b"2 x NVIDIA H200", b"8*mi300x", b"2048xh800", b"1xcpu")
    return Format(
        [{"gpus": t} for t in texts], {"gpus": "text"}, lambda p: _use(parse_gpus(words(p["gpus"])))
    )


def _use(cluster: Any) -> None:
    _ = cluster.num_nodes, cluster.domain, cluster.aligned, cluster.most


def _state(folder: Path, tensors: dict[str, torch.Tensor]) -> Parts:
    step = folder / "step_00000003"
    writer = HuggingFaceStorageWriter(str(step), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    (file,) = step.glob("*.safetensors")
    progress = {"step": 3, "tokens": 99, "seconds": 1.5, "skipped": 0}
    return {file.name: file.read_bytes(), "state.json": dump(progress)}


def _agreeing(path: Path) -> None:
    """A manifest of what is there, as whoever forges a checkpoint would write."""
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    listed = {name: {"bytes": len(data), "crc32": zlib.crc32(data)} for name, data in files.items()}
    (path / "manifest.json").write_bytes(dump({"files": listed}))


def checkpoint(folder: Path) -> Format:
    into = {"model/a": torch.zeros(4, 4), "model/b": torch.zeros(6), "optimizer/a.exp_avg": torch.zeros(4, 4)}
    seed = _state(folder, into)
    path = folder / "step_00000003"

    def read(parts: Parts) -> None:
        put(path, parts)
        _agreeing(path)
        assert steps_saved(folder) == [3]
        read_progress(path)
        read_tensors(path, into)

    return Format([seed], {name: "json" if name == "state.json" else "safetensors" for name in seed}, read)


def adapters(folder: Path) -> Format:
    spec = from_config(DENSE, "x")
    with torch.device("meta"):
        model = Transformer(spec)
        add_adapters(model, LoRAConfig(r=2))
    found = {f"model/{n}": torch.zeros(p.shape) for n, p in model.named_parameters() if is_adapter(n)}
    stored = _state(folder / "checkpoints", found)
    run_text = yaml.safe_dump(
        {"lora": {"r": 2, "alpha": 4.0}, "train": {"start_from": "."}, "model": "v3-mini"}
    )

    def read(parts: Parts) -> None:
        put(folder, {"run.yaml": parts["run.yaml"]})
        path = folder / "checkpoints" / "step_00000003"
        put(path, {k: v for k, v in parts.items() if k != "run.yaml"})
        _agreeing(path)
        if (adapters := read_adapters(folder, spec)) is not None:
            _ = adapters.scale

    kinds = {"run.yaml": "yaml"} | {n: "json" if n == "state.json" else "safetensors" for n in stored}
    return Format([{"run.yaml": run_text.encode(), **stored}], kinds, read)


def chats(folder: Path) -> Format:
    put(folder, {"chat_template.jinja": TEMPLATE})
    template, words = ChatTemplate(folder), small_tokenizer(folder)
    lines = [dump({"messages": CHAT}), dump({"messages": [CHAT[0], CHAT[1]] * 2, "tools": [TOOL]})]

    def read(parts: Parts) -> None:
        for conversation, _ in conversations(put(folder, parts) / "c.jsonl"):
            encoded(conversation, template, words)

    return Format([{"c.jsonl": b"\n".join(lines)}, {"c.jsonl": lines[0]}], {"c.jsonl": "jsonl"}, read)


def text(folder: Path) -> Format:
    (folder / "texts").mkdir()

    def read(parts: Parts) -> None:
        put(folder / "texts", parts)
        field = "text"
        fingerprint(str(folder / "texts"), text_field=field)
        for name in (*parts, ""):
            for document in documents(str(folder / "texts" / name), text_field=field, max_bytes=4096):
                document.encode()

    seed = {"a.jsonl": b'{"text": "one"}\n{"text": "two", "n": 2}\n', "b.txt": "words\nand é more".encode()}
    return Format([seed], {"a.jsonl": "jsonl", "b.txt": "text"}, read)


def tokens(folder: Path) -> Format:
    facts = {
        "dtype": "uint16", "count": 40, "documents": 1, "tokenizer_fingerprint": "a",
        "source_fingerprint": "b",
        "sha256": "c", "eos_id": 1,
    }  # fmt: skip

    def read(parts: Parts) -> None:
        packed = PackedTokens(put(folder, parts) / "train.bin", 8, seed=1)
        packed.batch(0, 2)

    seeds = [{"train.json": dump({**facts, "dtype": d}), "train.bin": bytes(40 * n)} for d, n in _WIDTHS]
    return Format(seeds, {"train.json": "json", "train.bin": "binary"}, read)


_WIDTHS = (("uint16", 2), ("uint32", 4), ("int32", 4))


FORMATS: dict[str, Callable[[Path], Format]] = {
    f.__name__: f
    for f in (
        config, safetensors, index, fp8, tokenizer, template, run, hardware, gpus, checkpoint, adapters,
        chats, text, tokens,
    )
}  # fmt: skip
