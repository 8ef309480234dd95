"""Checkpoints in and out: bit for bit, like transformers, sharded; one clear line for each thing wrong."""

from __future__ import annotations

import gc
import json
import os
import struct
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from whalepod.models.transformer import Transformer, init_weights, target_windows
from whalepod.parallel import processes, weights_files
from whalepod.parallel.weights import build_model, convert_hf, expected_tensors, load_weights, save_weights
from whalepod.precision.fp8 import FP8, dequantize_blocks, scale_shape
from whalepod.precision.storage import use_fp8_storage
from whalepod.spec.errors import UserError
from whalepod.spec.model import BlockFP8, ModelSpec, from_config, read_config, to_config

MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 12}
FAMILY: dict[str, Callable[[], Any]] = {
    "v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **SMALL, **LATENT, **MOE, num_key_value_heads=4, q_lora_rank=20, num_nextn_predict_layers=0
        )
    ),
    "v2": lambda: transformers.DeepseekV2ForCausalLM(
        transformers.DeepseekV2Config(
            **SMALL,
            **LATENT,
            **MOE,
            num_key_value_heads=4,
            q_lora_rank=None,
            topk_method="group_limited_greedy",
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL, num_key_value_heads=2)),
}

# Dimensions that 128 does not divide, and matrices of several blocks.
V3_MTP = {
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "hidden_size": 144,
    "intermediate_size": 272,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 136,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "custom_field": "kept",
    "torch_dtype": "bfloat16",
}
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_tensors(a: Path, b: Path) -> bool:
    first, second = tensors_in(a), tensors_in(b)
    assert first.keys() == second.keys()
    return all(bits(first[name]) == bits(second[name]) for name in first)


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], num_shards: int = 1
) -> Path:
    """A checkpoint folder, written without any of the code under test."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(num_shards):
        shard = dict(list(tensors.items())[i::num_shards])
        file = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def v3_tensors(fp8: bool, power_of_two: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """A DeepSeek-V3-like checkpoint with MTP; in FP8 of random bytes that are not NaN."""
    spec = from_config(V3_MTP, "toy")
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Tensor] = {}
    for name, (shape, quantised) in expected_tensors(spec).items():
        if name.endswith(("embed_tokens.weight", "head.weight")) and "layers" in name:
            main = "model.embed_tokens.weight" if "embed" in name else "lm_head.weight"
            result[name] = result[main].clone()
        elif quantised and fp8:
            raw = torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8)
            raw += 128 * torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8)
            result[name] = raw.view(FP8)
            scales = torch.rand(scale_shape(shape), generator=generator) * 1e-3 + 1e-5
            result[name + "_scale_inv"] = 2.0 ** scales.log2().ceil() if power_of_two else scales
        elif name.endswith("e_score_correction_bias"):
            result[name] = torch.randn(shape, generator=generator)
        else:
            result[name] = (torch.randn(shape, generator=generator) * 0.1).bfloat16()
    return result


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = V3_MTP | {"quantization_config": FP8_CONFIG}
    return write_folder(tmp_path_factory.mktemp("fp8") / "model", config, v3_tensors(fp8=True), num_shards=3)


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("bf16") / "model", V3_MTP, v3_tensors(fp8=False))


# ---------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("kind", FAMILY)
def test_transformers_and_back(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = FAMILY[kind]().to(torch.bfloat16).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):  # as in the published checkpoints
            buffer.data = torch.randn(buffer.shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build_model(tmp_path / "theirs", torch.float32)
    tokens = torch.randint(0, 96, (2, 17))
    theirs = type(theirs).from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()

    save_weights(build_model(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=40_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert same_tensors(tmp_path / "theirs", tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)


# ---------------------------------------------------------------------------------------- round trips


def test_bf16_with_mtp_round_trip(bf16_folder: Path, tmp_path: Path) -> None:
    for dtype, format in ((torch.bfloat16, "keep"), ("keep", "keep"), (torch.float32, "bf16")):
        model = build_model(bf16_folder, dtype)
        assert not model.training
        assert model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
        out = tmp_path / f"{dtype}-{format}"
        save_weights(model, out, format)
        assert same_tensors(bf16_folder, out)
        assert read_config(out) == read_config(bf16_folder).with_(name=out.name)
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
        with safe_open(out / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert oct((out / "model.safetensors").stat().st_mode) == oct((out / "config.json").stat().st_mode)
    save_weights(model, tmp_path / "fp32", "fp32")
    stored = tensors_in(tmp_path / "fp32")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    source = tensors_in(bf16_folder)
    assert all(torch.equal(stored[name], source[name].float()) for name in source)


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
def test_fp8_with_mtp_round_trip(scale_fmt: str, tmp_path: Path) -> None:
    source = v3_tensors(fp8=True, power_of_two=scale_fmt == "ue8m0")
    config = V3_MTP | {"quantization_config": FP8_CONFIG | {"scale_fmt": scale_fmt}}
    folder = write_folder(tmp_path / "source", config, source, num_shards=2)
    model = build_model(folder, "keep")
    experts = model.layers[1].mlp.experts
    assert experts.gate_up_stored.dtype == FP8
    assert experts.gate_up.dtype == torch.bfloat16
    for format in ("keep", "fp8"):
        save_weights(model, tmp_path / format, format, max_shard_bytes=200_000)
        assert same_tensors(folder, tmp_path / format)
        assert read_config(tmp_path / format) == read_config(folder).with_(name=format)

    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    expected = dequantize_blocks(source[name], source[name + "_scale_inv"], torch.float32)
    element = source[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:144, :136]
    assert torch.equal(expected, source[name].float() * element)
    for dtype in (torch.float32, torch.bfloat16):
        plain = build_model(folder, dtype)
        assert torch.equal(plain.mtp[0].block.mlp.experts.down[3], expected.to(dtype))
        tokens = torch.arange(12).view(1, 12)
        targets = target_windows(torch.arange(13).view(1, 13), 1)
        with torch.no_grad():
            stored = build_model(folder, "keep").to(dtype)
            assert torch.equal(plain(tokens), stored(tokens))
            assert torch.equal(plain(tokens, targets).mtp[0], stored(tokens, targets).mtp[0])

    save_weights(model, tmp_path / "bf16", "bf16")
    assert read_config(tmp_path / "bf16").quantization is None
    assert bits(tensors_in(tmp_path / "bf16")[name]) == bits(expected.bfloat16())


def test_fp8_storage_is_filled_from_bf16(bf16_folder: Path, tmp_path: Path) -> None:
    model = build_model(bf16_folder)
    save_weights(model, tmp_path / "quantised", "fp8")
    assert read_config(tmp_path / "quantised").quantization == BlockFP8()
    stored = build_model(bf16_folder)
    use_fp8_storage(stored)
    for parameter in stored.parameters():
        parameter.data.view(torch.uint8).zero_()
    load_weights(stored, bf16_folder)
    save_weights(stored, tmp_path / "stored")
    assert same_tensors(tmp_path / "quantised", tmp_path / "stored")


def test_mtp_is_dropped_only_when_asked(bf16_folder: Path, fp8_folder: Path, tmp_path: Path) -> None:
    spec = read_config(bf16_folder).with_(num_nextn_predict_layers=0)
    model = Transformer(spec)
    with pytest.raises(UserError, match="ignore_mtp"):
        load_weights(model, bf16_folder)
    load_weights(model, bf16_folder, ignore_mtp=True)
    dropped = build_model(fp8_folder, "keep", ignore_mtp=True)
    assert len(dropped.mtp) == 0
    save_weights(dropped, tmp_path / "out")
    assert not [n for n in tensors_in(tmp_path / "out") if n.startswith("model.layers.2.")]
    # What transformers writes: the config promises MTP, the weights have none.
    (tmp_path / "out" / "config.json").write_text((fp8_folder / "config.json").read_text())
    assert len(build_model(tmp_path / "out").mtp) == 0
    with pytest.raises(
        UserError, match=r"model\.layers\.2\."
    ):  # a model that has them gets no half of itself
        load_weights(Transformer(read_config(fp8_folder)), tmp_path / "out")


def test_conversion_without_a_model(bf16_folder: Path, fp8_folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "notes.txt"):
        (fp8_folder / name).write_text(name)
    seen: list[tuple[int, int]] = []
    convert_hf(fp8_folder, tmp_path / "keep", "keep", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert same_tensors(fp8_folder, tmp_path / "keep")
    assert (tmp_path / "keep" / "tokenizer.json").exists()
    assert (tmp_path / "keep" / "chat_template.jinja").exists()
    assert not (tmp_path / "keep" / "notes.txt").exists()
    convert_hf(fp8_folder, tmp_path / "bf16", "bf16", max_shard_bytes=100_000)
    save_weights(build_model(fp8_folder), tmp_path / "model")
    assert same_tensors(tmp_path / "bf16", tmp_path / "model")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["custom_field"] == "kept"
    assert "quantization_config" not in config
    convert_hf(bf16_folder, tmp_path / "fp8", "fp8")
    save_weights(build_model(bf16_folder), tmp_path / "model", "fp8")
    assert same_tensors(tmp_path / "fp8", tmp_path / "model")
    assert read_config(tmp_path / "fp8").quantization == BlockFP8()
    # In place: what the folder held besides stays.
    (tmp_path / "keep" / "notes.txt").write_text("mine")
    convert_hf(tmp_path / "keep", tmp_path / "keep", "bf16")
    assert same_tensors(tmp_path / "bf16", tmp_path / "keep")
    assert (tmp_path / "keep" / "notes.txt").read_text() == "mine"
    assert {p.name[0] for p in tmp_path.iterdir()} == set("kbmf")  # no temporary folder is left


@pytest.mark.parametrize("fp8", [False, True])
def test_table_is_the_models(fp8: bool) -> None:
    spec = from_config(V3_MTP | ({"quantization_config": FP8_CONFIG} if fp8 else {}), "toy")
    with torch.device("meta"):
        model = Transformer(spec)
    num_elements = sum(p.numel() for p in model.parameters())
    expected = expected_tensors(spec)
    copies = 2 * prod(expected["lm_head.weight"][0])
    biases = sum(prod(shape) for name, (shape, _) in expected.items() if "correction_bias" in name)
    assert sum(prod(shape) for shape, _ in expected.values()) == num_elements + copies + biases
    use_fp8_storage(model)
    num_stored = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_stored"))
    assert sum(prod(shape) for shape, quantised in expected.values() if quantised) == num_stored


def test_memory_of_reading_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_files, "_REOPEN_BYTES", 2**20)
    rows = {f"t{i}": torch.full((512, 512), float(i)) for i in range(40)}
    save_file(rows, tmp_path / "model.safetensors")
    checkpoint = weights_files.open_checkpoint(tmp_path)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for i in range(40):
        assert checkpoint.read(f"t{i}").mean() == i
        assert checkpoint.read(f"t{i}", (slice(3, 5), slice(1, 512))).shape == (2, 511)
    assert resident() - before < 12 * 2**20  # of 40 MiB


# ---------------------------------------------------------------------------------------- what is wrong

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QUERY = "model.layers.1.self_attn.q_proj.weight"
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def llama_tensors() -> dict[str, Tensor]:
    shapes = expected_tensors(from_config(LLAMA, "toy"))
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, (shape, _) in shapes.items()}


def edit_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(index) or index))


def faults() -> Iterator[tuple[str, int, Callable[[Path], Any], str]]:
    """Name, shards, what happens to a good folder, and what the line must say."""

    def put(**tensors: Tensor | None) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            kept = load_file(folder / FILE) | {k.replace("__", "."): v for k, v in tensors.items()}
            save_file({k: v for k, v in kept.items() if v is not None}, folder / FILE)

        return change

    query = QUERY.replace(".", "__")
    wrong = torch.zeros(8, 4, dtype=torch.bfloat16)
    yield "missing", 1, put(**{query: None}), f"tensor '{QUERY}' is missing from"
    yield "several missing", 1, put(**{query: None, "lm_head__weight": None}), r"is missing.*\(and 1 more\)"
    yield (
        "renamed",
        1,
        put(**{query: None, query + "s": wrong}),
        f"'{QUERY}' is missing.*did you mean '{QUERY}s'",
    )
    yield "extra", 1, put(**{query + "s": wrong}), f"holds tensor '{QUERY}s'.*did you mean '{QUERY}'"
    yield "extras", 1, put(a=wrong, b=wrong.clone()), r"holds tensor 'a'.*\(and 1 more\)"
    yield "misshapen", 1, put(**{query: wrong}), rf"{FILE}: tensor '{QUERY}' has shape \[8, 4\].*\[8, 8\]"
    yield (
        "integers",
        1,
        put(**{query: wrong.int().repeat(1, 2)}),
        f"tensor '{QUERY}' is of type 'I32'.*allowed",
    )
    yield (
        "sudden FP8",
        1,
        put(**{query: torch.zeros(8, 8).to(FP8)}),
        f"'{QUERY}' is F8_E4M3, but config.json has no",
    )

    def cut(size: int) -> Callable[[Path], None]:
        return lambda folder: os.truncate(
            folder / FILE, size if size >= 0 else (folder / FILE).stat().st_size + size
        )

    yield "truncated", 1, cut(-5), f"{FILE} is truncated: tensor '.*' ends at byte"
    yield "cut in the header", 1, cut(100), f"{FILE} is truncated or no safetensors file: its 100 bytes"
    yield "empty", 1, cut(0), f"{FILE} is truncated or no safetensors file"
    yield (
        "trailing bytes",
        1,
        lambda f: (f / FILE).open("ab").write(b"x"),
        f"{FILE} is longer than its tensors",
    )
    yield "huge header", 1, lambda f: (f / FILE).write_bytes(b"\xff" * 64), f"{FILE} is truncated or no"
    yield (
        "no JSON",
        1,
        lambda f: (f / FILE).write_bytes(struct.pack("<Q", 4) + b"{a:1"),
        "corrupt safetensors header",
    )
    yield "deep JSON", 1, lambda f: (f / FILE).write_bytes(struct.pack("<Q", 9**5) + b"[" * 9**5), "corrupt"

    def header(name: str, key: str, value: Any, says: str) -> tuple[str, int, Callable[[Path], Any], str]:
        def change(header: dict[str, Any]) -> None:
            header[QUERY][key] = value

        return name, 1, lambda folder: edit_header(folder / FILE, change), says

    yield header("offsets", "data_offsets", [5, 1], rf"tensor '{QUERY}' has data_offsets \[5, 1\]")
    yield header("offsets beyond", "data_offsets", [2**50, 2**50 + 128], "header: '.*' is out of place")
    yield header("negative shape", "shape", [-8, -8], rf"tensor '{QUERY}' has shape \[-8, -8\]")
    yield header("huge shape", "shape", [2**59, 2**59], f"tensor '{QUERY}' of shape .* cannot have 128 bytes")
    yield header("no type", "dtype", None, f"tensor '{QUERY}' has no dtype")
    yield "list", 1, lambda f: edit_header(f / FILE, list), "not a JSON object"
    yield "entry", 1, lambda f: edit_header(f / FILE, lambda h: {QUERY: 3}), f"'{QUERY}' is not described by"

    second = "model-00002-of-00002.safetensors"
    yield "shard missing", 2, lambda f: (f / second).unlink(), f"shard .*{second} is missing: .* has tensor '"
    yield "index no JSON", 2, lambda f: (f / INDEX).write_text("{"), f"{INDEX} is not valid JSON"
    yield "index list", 2, lambda f: (f / INDEX).write_text("[]"), "must hold a 'weight_map'"

    def mapped(name: str, file: Any) -> Callable[[Path], Any]:
        return lambda folder: edit_index(folder, lambda index: index["weight_map"].update({name: file}))

    for file in ("../model.safetensors", "/etc/x.safetensors", "model.bin", 3, "a\0.safetensors"):
        yield (
            f"index to {file!r}",
            2,
            mapped(QUERY, file),
            f"for tensor '{QUERY}', is no safetensors file name",
        )
    yield "index too long", 2, mapped("ghost", second), f"tensor 'ghost' is missing from .*{second}"
    yield "folder as shard", 2, lambda f: (f / second).unlink() or (f / second).mkdir(), "is missing"
    yield "pickle only", 1, lambda f: (f / FILE).rename(f / "pytorch_model.bin"), "only pickled weights"
    yield "nothing", 1, lambda f: (f / FILE).unlink(), "has no weights"
    yield "no config", 1, lambda f: (f / "config.json").unlink(), "config.json"


@pytest.mark.parametrize(("shards", "change", "says"), [pytest.param(*f[1:], id=f[0]) for f in faults()])
def test_one_clear_line(shards: int, change: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", LLAMA, llama_tensors(), shards)
    build_model(folder)
    change(folder)
    with pytest.raises(UserError, match=says) as error:
        build_model(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        convert_hf(folder, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t, q: t.pop(q + "_scale_inv"), "its scales '.*q_a_proj.weight_scale_inv' are missing"),
        (lambda t, q: t.update({q + "_scale_inv": torch.ones(1, 1)}), r"have shape \[1, 1\].*not \[1, 2\]"),
        (lambda t, q: t.update({q + "_scale_inv": torch.ones(1, 2).bfloat16()}), "in 'BF16', not"),
        (lambda t, q: t.update({q: t[q].bfloat16()}), "is BF16, but quantization_config asks for F8_E4M3"),
        (
            lambda t, q: t.update({"lm_head.weight": torch.zeros(40, 144).to(FP8)}),
            "lm_head.* is F8_E4M3, but only",
        ),
        (lambda t, q: t["model.layers.2.embed_tokens.weight"].neg_(), "2.embed_tokens.weight' must equal"),
        (
            lambda t, q: t["model.layers.2.shared_head.head.weight"].neg_(),
            "'lm_head.weight', which it repeats",
        ),
        (lambda t, q: t.pop("model.layers.2.enorm.weight"), "2.enorm.weight' is missing"),
    ],
)
def test_one_clear_line_about_fp8_and_mtp(
    change: Callable[[dict[str, Tensor], str], Any], says: str, tmp_path: Path
) -> None:
    tensors = v3_tensors(fp8=True)
    change(tensors, "model.layers.1.self_attn.q_a_proj.weight")
    folder = write_folder(tmp_path / "model", V3_MTP | {"quantization_config": FP8_CONFIG}, tensors)
    with pytest.raises(UserError, match=says) as error:
        build_model(folder, "keep")
    assert "\n" not in str(error.value)


def test_a_hostile_config_allocates_nothing(tmp_path: Path) -> None:
    config = V3_MTP | {"n_routed_experts": 999_999_999, "moe_intermediate_size": 999_999_999}
    folder = write_folder(tmp_path / "model", config, llama_tensors())
    with pytest.raises(UserError, match="has shape"):
        build_model(folder)
    tensors = v3_tensors(fp8=False)
    tensors["model.layers.1.mlp.gate.weight"] = tensors.pop("model.layers.1.input_layernorm.weight")
    folder = write_folder(tmp_path / "other", V3_MTP | {"n_routed_experts": 999_999_999}, tensors)
    with pytest.raises(UserError, match="has shape"):
        build_model(folder)


def test_ignorable_and_tied_extras(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    build_model(write_folder(tmp_path / "rotary", LLAMA, tensors))
    tied = LLAMA | {"tie_word_embeddings": True}
    model = build_model(write_folder(tmp_path / "tied", tied, llama_tensors()))
    assert model.lm_head.weight is model.embed_tokens.weight
    tensors = llama_tensors()
    tensors["lm_head.weight"] += 1
    with pytest.raises(UserError, match=r"must equal 'model\.embed_tokens\.weight'"):
        build_model(write_folder(tmp_path / "untied", tied, tensors))


def test_saving_refuses_and_fails_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(write_folder(tmp_path / "model", LLAMA, llama_tensors()))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not a checkpoint"):
        save_weights(model, tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        save_weights(model, tmp_path / "mine" / "thesis.tex")
    with pytest.raises(UserError, match="did you mean 'fp8'"):
        save_weights(model, tmp_path / "x", "fp9")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_shard_bytes"):
        save_weights(model, tmp_path / "x", max_shard_bytes=0)
    with pytest.raises(UserError, match=r"torch\.float16"):
        build_model(tmp_path / "model", torch.float16)
    model.lm_head.weight.data[0, 0] = 1.0
    model.layers[0].mlp.up_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(UserError, match=r"tensor 'model\.layers\.0\.mlp\.up_proj\.weight': .*no FP8 form"):
        save_weights(model, tmp_path / "model", "fp8")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights_files, "save_file", full)
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            save_weights(model, tmp_path / "model")
    # What was there is untouched, and nothing half-done is left beside it.
    assert not build_model(tmp_path / "model").lm_head.weight.any()
    assert {p.name for p in tmp_path.iterdir()} == {"model", "mine"}
    save_weights(model, tmp_path / "model")
    assert build_model(tmp_path / "model").lm_head.weight[0, 0] == 1.0


@pytest.mark.parametrize("moment", ["writing", "between the renames", "before tidying"])
def test_a_killed_writer_leaves_a_whole_checkpoint(moment: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", LLAMA, llama_tensors())
    (folder / "notes.txt").write_text("mine")
    model = build_model(folder)
    model.lm_head.weight.data.fill_(1.0)
    process = mp.get_context("fork").Process(target=killed_at, args=(moment, model, folder))
    process.start()
    process.join()
    assert process.exitcode == 9
    if moment != "between the renames":  # then the old folder has another name, and nothing is lost
        assert build_model(folder).lm_head.weight.any() == (moment == "before tidying")
    save_weights(model, folder)
    assert build_model(folder).lm_head.weight.all()
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def killed_at(moment: str, model: Transformer, folder: Path) -> None:
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        if self.name == ".model.new" and moment == "between the renames":
            os._exit(9)
        result = rename(self, target)
        if self.name == ".model.new" and moment == "before tidying":
            os._exit(9)
        return result

    Path.rename = watched  # type: ignore[method-assign]
    save_weights(model, folder, progress=lambda *_: os._exit(9) if moment == "writing" else None)


# ---------------------------------------------------------------------------------------- sharded


def sharded(spec: ModelSpec) -> Transformer:
    """FSDP2 over all ranks, on the meta device until its shards are made; values are not set."""
    with torch.device("meta"):
        model = Transformer(spec).bfloat16()
    for layer in (*model.layers, *model.mtp):
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    for name, buffer in list(model.named_buffers()):
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, torch.zeros(buffer.shape))
    return model


def rank_main(rank: int, world_size: int, folder: Path, fp8: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    try:
        check_rank(rank, world_size, folder, fp8)
    finally:
        dist.destroy_process_group()
        # A sharded model is a cycle that holds its process group. Left to the interpreter's end, gloo's
        # threads may still be dropping tensors then, which aborts the process.
        gc.collect()


def check_rank(rank: int, world_size: int, folder: Path, fp8: Path) -> None:
    whole = build_model(fp8)
    model = sharded(whole.spec)
    read: dict[str, int] = {}
    plain_read = weights_files.Checkpoint.read

    def counted(self: weights_files.Checkpoint, name: str, region: Any = None) -> Tensor:
        tensor = plain_read(self, name, region)
        read[name] = read.get(name, 0) + tensor.numel()
        return tensor

    weights_files.Checkpoint.read = counted  # type: ignore[method-assign]
    load_weights(model, fp8)
    weights_files.Checkpoint.read = plain_read  # type: ignore[method-assign]
    experts = [name for name in read if ".layers.1.mlp.experts." in name and name.endswith("weight")]
    assert sorted({int(name.split(".")[5]) for name in experts}) == [2 * rank, 2 * rank + 1]
    assert read["lm_head.weight"] == 2 * 20 * 144  # for itself, and beside the copy of MTP
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), whole.get_parameter(name)), name
    save_weights(model, folder / "bf16", max_shard_bytes=300_000)

    # FP8 storage with the experts on their ranks and a projection split within its blocks.
    stored = build_model(fp8, "keep")
    mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
    for path, dim in (
        ("layers.1.mlp.experts", 0),
        ("layers.0.mlp.gate_proj", 0),
        ("layers.0.mlp.down_proj", 1),
    ):
        module = stored.get_submodule(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter)
            raw = empty.view(torch.uint8) if empty.dtype == FP8 else empty  # gloo has no float8
            spread = distribute_tensor(raw, mesh, [Shard(dim)]).view(empty.dtype)
            module._parameters[name] = torch.nn.Parameter(spread, requires_grad=False)
    load_weights(stored, fp8)
    save_weights(stored, folder / "fp8")
    save_weights(model, folder / "quantised", "fp8")

    with pytest.raises(UserError, match="not empty and not a checkpoint"):
        save_weights(model, folder)
    if rank == 1:  # a mistake that only rank 0 meets reaches all; so does one in the middle of the stream
        model.layers[1].mlp.experts.down.detach().to_local().fill_(float("nan"))
    with pytest.raises(UserError, match="no FP8 form"):
        save_weights(model, folder / "nan", "fp8")
    assert not (folder / "nan").exists()


def test_two_ranks_read_their_own_and_write_together(fp8_folder: Path, tmp_path: Path) -> None:
    processes.context()
    mp.start_processes(rank_main, (2, tmp_path, fp8_folder), nprocs=2, start_method=processes.START_METHOD)
    save_weights(build_model(fp8_folder), tmp_path / "whole")
    assert same_tensors(tmp_path / "whole", tmp_path / "bf16")
    assert same_tensors(fp8_folder, tmp_path / "fp8")
    assert read_config(tmp_path / "quantised").quantization == BlockFP8()
    convert_hf(tmp_path / "whole", tmp_path / "converted", "fp8")
    assert same_tensors(tmp_path / "converted", tmp_path / "quantised")


def test_init_and_config_of_a_saved_model(tmp_path: Path) -> None:
    spec = from_config(V3_MTP, "toy")
    model = Transformer(spec)
    init_weights(model, 1)
    save_weights(model, tmp_path / "toy")
    again = build_model(tmp_path / "toy", "keep")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert to_config(again.spec) == to_config(spec)
