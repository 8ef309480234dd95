"""Serving speed: whalepod's engine beside `transformers`' generate and llama.cpp, one model in Hugging Face
form, interleaved.

    python bench/serve_peers.py [--rounds 3] [--threads 2] [--batches 1 8 32] [--prompt 512] [--new 128]
                                [--llama PATH] [--peers transformers] [--dtype bf16] [--out FILE]

The model has DeepSeek-V3's architecture with its true latent (rank 512 and 64 rotary) and 693M parameters,
random weights, BF16. A round reads in and continues a batch of prompts with each; prefill ends with the first
token of the last sequence, decode is what comes after. Greedy, no EOS. Beside batch 1 stands the limit of
memory: the weights that a token reads over the speed at which this machine reads. Prints medians and ratios
within rounds, writes results/serve_peers.json.

--llama: a source tree of llama.cpp in which `llama-batched-bench` was built under build/bin. The same weights
are converted to a GGUF file in BF16 by its own script; its bench draws its own random tokens, of the same
numbers. --dtype: of whalepod's weights alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from record import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from whalepod.parallel.inference import whole
from whalepod.parallel.mesh import make_mesh
from whalepod.serve.core import PAGE_SIZE, CoreConfig
from whalepod.serve.fleet import Fleet
from whalepod.serve.generate import load_model
from whalepod.serve.request import Request
from whalepod.spec.counts import active_params, params
from whalepod.spec.layout import Layout
from whalepod.spec.model import read_config

OUT = Path(__file__).resolve().parents[1] / "results" / "serve_peers.json"
CONFIG: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "moe_intermediate_size": 512,
    "num_hidden_layers": 12, "first_k_dense_replace": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
    "n_routed_experts": 32, "num_experts_per_tok": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 512, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "max_position_embeddings": 4096, "num_nextn_predict_layers": 0, "eos_token_id": None,
}  # fmt: skip
Arm = Callable[[list[list[int]], int], tuple[float, float]]
"""Prompts and new tokens of each -> seconds of prefill and of decode."""


def whalepod_arm(folder: Path, dtype: str) -> Arm:
    model = load_model(folder, dtype, "cpu")[0]
    inference = whole(model, make_mesh(Layout(), torch.device("cpu")))

    def run(prompts: list[list[int]], new: int) -> tuple[float, float]:
        pages = len(prompts) * -(-(len(prompts[0]) + new) // PAGE_SIZE)
        fleet = Fleet(inference, CoreConfig(pages, max_running=len(prompts)))
        jobs = [fleet.add(Request(tuple(prompt), new)) for prompt in prompts]
        start = time.perf_counter()
        while any(job.sequence.num_new == 0 for job in jobs):
            fleet.step()
        middle = time.perf_counter()
        while not fleet.is_idle:
            fleet.step()
        return middle - start, time.perf_counter() - middle

    return run


def transformers_arm(folder: Path) -> Arm:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    ).eval()

    def run(prompts: list[list[int]], new: int) -> tuple[float, float]:
        ids = torch.tensor(prompts)
        options: dict[str, Any] = {
            "do_sample": False,
            "attention_mask": torch.ones_like(ids),
            "pad_token_id": 0,
        }

        def seconds(count: int) -> float:
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            return time.perf_counter() - start

        first = seconds(1)
        return first, seconds(new) - first

    return run


CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import convert_hf_to_gguf as script
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # it knows those of published models only
sys.argv[1:] = sys.argv[2:]
script.main()
"""


def write_tokenizer(folder: Path) -> None:
    """256 bytes and one pair, for a converter that wants to see some."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def llama_arm(tree: Path, folder: Path, threads: int) -> Arm:
    model = folder / "model-bf16.gguf"
    convert = [
        sys.executable,
        "-c",
        CONVERT,
        str(tree),
        str(folder),
        "--outtype",
        "bf16",
        "--outfile",
        str(model),
    ]
    subprocess.run(convert, check=True, capture_output=True)

    def run(prompts: list[list[int]], new: int) -> tuple[float, float]:
        batch, length = len(prompts), len(prompts[0])
        options = {
            "-m": model, "-t": threads, "-tb": threads, "-npp": length, "-ntg": new - 1, "-npl": batch,
            "-c": batch * (length + new), "-fa": "auto", "--output-format": "jsonl",
        }  # fmt: skip
        command = [
            tree / "build/bin/llama-batched-bench",
            *(word for pair in options.items() for word in pair),
        ]
        done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
        found = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
        return found["t_pp"], found["t_tg"]

    return run


def read_gb_s() -> float:
    """How fast memory is read: the best of some sums over 1 GiB."""
    data, best = torch.zeros(1 << 27, dtype=torch.int64), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best / 1e9


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--llama", type=Path, help="source tree of llama.cpp with llama-batched-bench built")
    parser.add_argument("--peers", nargs="*", default=["transformers"], choices=["transformers"])
    parser.add_argument("--dtype", default="bf16", help="of whalepod's weights")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    folder = Path(tempfile.mkdtemp())
    try:
        measure(folder, asked)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, asked: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**CONFIG))
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    write_tokenizer(folder)
    spec = read_config(folder)
    arms = {"whalepod": whalepod_arm(folder, asked.dtype)}
    if "transformers" in asked.peers:
        arms["transformers"] = transformers_arm(folder)
    if asked.llama is not None:
        arms["llama.cpp"] = llama_arm(asked.llama, folder, asked.threads)
    read = read_gb_s()
    limit = read * 1e9 / (2 * active_params(spec))
    print(
        f"{params(spec).total / 1e6:.1f} M parameters, {2 * active_params(spec) / 1e6:.0f} MB read a token; ",
        end="",
    )
    print(f"memory reads {read:.1f} GB/s: at most {limit:.1f} tokens/s at batch 1, {asked.threads} threads")
    draw = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = []
    for batch in asked.batches:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for number in range(asked.rounds + 1):  # the first warms up
            prompts = torch.randint(0, spec.vocab_size, (batch, asked.prompt), generator=draw).tolist()
            for name, arm in arms.items():
                prefill, decode = arm(prompts, asked.new)
                if number:
                    found[name].append((batch * asked.prompt / prefill, batch * (asked.new - 1) / decode))
        for name, pairs in found.items():
            ratios = [(p / q, d / e) for (p, d), (q, e) in zip(found["whalepod"], pairs, strict=True)]
            rows.append(
                {
                    "batch": batch,
                    "engine": name,
                    "prefill_tokens_per_s": statistics.median(p for p, _ in pairs),
                    "decode_tokens_per_s": statistics.median(d for _, d in pairs),
                    "whalepod_over_it_prefill": statistics.median(r for r, _ in ratios),
                    "whalepod_over_it_decode": statistics.median(r for _, r in ratios),
                    "decode_ratios": [r for _, r in ratios],
                }
            )
            last = rows[-1]
            print(
                f"batch {batch:2} {name:12} prefill {last['prefill_tokens_per_s']:7.0f} tokens/s, "
                f"decode {last['decode_tokens_per_s']:6.1f}; whalepod's are "
                f"{last['whalepod_over_it_prefill']:.2f} and {last['whalepod_over_it_decode']:.2f} times it",
                flush=True,
            )
    save(
        asked.out,
        {
            "command": shlex.join(["python", "bench/serve_peers.py", *sys.argv[1:]]),
            "threads": asked.threads,
            "dtype": asked.dtype,
            "read_gb_s": read,
            "limit_tokens_per_s": limit,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
