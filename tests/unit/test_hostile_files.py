"""Files of strangers: whatever is in them, they are taken or refused in one line. A quick look by the fuzzer
of bench/fuzz.py at each format, and what its long campaigns found, one by one."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import whalepod
from whalepod.calibrate.profile import write_profile
from whalepod.parallel.trained import read_adapters
from whalepod.parallel.weights_files import copy_companions, open_checkpoint
from whalepod.precision.fp8 import FP8, dequantize_blocks
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.hardware import load_gpu
from whalepod.spec.model import from_config
from whalepod.spec.run import load_run
from whalepod.text.chat import ChatTemplate, conversations
from whalepod.text.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import fuzz
from fuzz import FORMATS
from fuzz_files import DENSE

INPUTS = 120


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "checkpoint"])
def test_a_quick_look_finds_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CPU_S", 10.0)  # a test says nothing of times
    found = fuzz.campaign(name, INPUTS, seed=0, isolated=False)
    assert not found.failures, [f"{f.signature}: {f.detail}: {f.parts}" for f in found.failures.values()]
    assert found.accepted + found.refused == INPUTS
    assert found.accepted


def test_the_fuzzer_sees_crashes_hangs_and_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> fuzz.Format:
        def read(parts: fuzz.Parts) -> None:
            size = len(parts["x"])
            if size == 3:
                os._exit(9)
            if size % 5 == 0:
                raise KeyError("x")
            while size % 7 == 0:
                pass

        return fuzz.Format([{"x": b"abcd"}], {"x": "binary"}, read)

    monkeypatch.setitem(FORMATS, "broken", broken)
    monkeypatch.setattr(fuzz, "CPU_S", 0.05)
    found = fuzz.campaign("broken", 60, seed=0)
    kinds = {signature.split()[0] for signature in found.failures}
    assert kinds == {"KeyError", "Hang", "crash:"}
    assert found.accepted + found.failed == 60
    assert all(f.parts["x"] == b"" for s, f in found.failures.items() if s.startswith("KeyError"))


def refused(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_run(path, overrides)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


def test_run_yaml_is_no_bomb(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x]\n"
    bomb += "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "references" in refused(tmp_path / "run.yaml", bomb)
    merge = "a: &a {x: 1}\n<<: [*a, *a]\n"
    assert "references" in refused(tmp_path / "run.yaml", merge)
    assert "deep nesting" in refused(tmp_path / "run.yaml", "model: " + "[" * 50 + "]" * 50)
    assert "not valid YAML" in refused(tmp_path / "run.yaml", "out: !!python/object/apply:os.system [id]")
    assert "huge number" in refused(tmp_path / "run.yaml", "out: 0x" + "f" * 9000)
    assert "larger" in refused(tmp_path / "run.yaml", "#" * 2**20 + "\n")
    assert refused(tmp_path / "run.yaml", "", "\udcce=1")  # a key that is no Unicode
    assert "unknown key" in refused(tmp_path / "run.yaml", f"{'a' * 900}: 1")


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ [1] | tojson(indent=999999999) }}",
        "{% for a in range(99999) %}{{ messages * 1000 }}{% endfor %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% include '/etc/passwd' %}",
        "{{ 9" + "9" * 5000 + " }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_ask_for_nothing_without_end(tmp_path: Path, source: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(UserError) as error:
        ChatTemplate(tmp_path).render([{"role": "user", "content": "x" * 100}])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xf4\x90")
    with pytest.raises(UserError, match="cannot read"):
        ChatTemplate(tmp_path)


def test_what_the_tokenizers_library_dies_of_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its panics are no Exception, and its messages may be pages."""

    class PanicException(BaseException):
        pass

    def dies(data: bytes) -> None:
        raise PanicException("of something\n" + "x" * 10_000)

    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    monkeypatch.setattr("tokenizers.Tokenizer", type("Dead", (), {"from_buffer": staticmethod(dies)}))
    with pytest.raises(UserError, match=r"is not a tokenizer.json: of something$"):
        load_tokenizer(tmp_path)


def test_settings_nested_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "../x", "a\nb", "a/b", "\ud800", "\x1b[2J", "c:x"])
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"a": f"{name}.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is no safetensors file name") as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pipe_is_no_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model-1.safetensors")  # to open it would wait for ever
    with pytest.raises(UserError, match="has no weights"):
        open_checkpoint(tmp_path)


def test_links_out_of_a_folder_are_not_copied(tmp_path: Path) -> None:
    secret, target = tmp_path / "secret", tmp_path / "out"
    secret.write_text("mine")
    target.mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match="leads out of its folder"):
        copy_companions(tmp_path / "model", target)
    assert not list(target.iterdir())
    # The hub's cache is made of links, from a snapshot to the blobs beside it.
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1a2b", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0")
    copy_companions(snapshot, target)
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not (target / "tokenizer.json").is_symlink()


def test_a_block_larger_than_its_matrix_takes_no_memory() -> None:
    values = torch.randn(6, 10).to(FP8)
    scale = torch.full((1, 1), 0.5)
    block = (10**9 - 1, 10**9 - 1)
    assert torch.equal(dequantize_blocks(values, scale, torch.float32, block), values.float() * 0.5)


def test_adapters_of_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora: {r: 2}\n")
    with pytest.raises(UserError, match=r"train\.start_from"):
        read_adapters(tmp_path, from_config(DENSE, "x"))
    (tmp_path / "run.yaml").write_text("lora: {r: 9999999999999999999}\n")
    with pytest.raises(UserError, match=r"lora\.r"):
        read_adapters(tmp_path, from_config(DENSE, "x"))


def test_a_profile_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Beside the file, where others may write, nothing has a name that could be known before."""
    (tmp_path / f"card.yaml.{os.getpid()}").symlink_to(tmp_path / "other")
    write_profile(load_gpu("h100"), tmp_path / "card.yaml")
    assert not (tmp_path / "other").exists()


def test_nothing_here_runs_what_it_reads() -> None:
    source = Path(whalepod.__file__).parent
    words = (
        r"(?<!\.)\b(?:eval|exec)\(|pickle\.load|import pickle|torch\.load\(|shell=True|os\.system|os\.popen"
    )
    words += "|yaml.unsafe|yaml.full|trust_remote_code"
    found = [f"{p.name}: {m[0]}" for p in source.rglob("*.py") for m in re.finditer(words, p.read_text())]
    assert not found


def test_a_conversation_without_end_is_refused(tmp_path: Path) -> None:
    message = {"role": "user", "content": "x"}
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [message] * 1001}))
    with pytest.raises(UserError, match="line 1: more than 1000 messages"):
        list(conversations(tmp_path / "c.jsonl"))


def test_hints_name_only_what_fits_into_a_line() -> None:
    assert nearest("q", ["a\nb", "c" * 5000, "d"]) == " (allowed: d)"


@pytest.mark.parametrize(
    ("model", "steps", "words"),
    [
        ({"a": 0, "b": 10**9}, [], "no vocabulary is so large"),
        ({"a": 0}, [{"type": "ByteLevel"}] * 9, "times as long"),
        (
            {"a": 0},
            [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}] * 2,
            "times as long",
        ),
    ],
)
def test_a_tokenizer_that_would_loop_or_swell_is_refused(
    tmp_path: Path, model: dict[str, int], steps: list[dict[str, Any]], words: str
) -> None:
    content = {
        "model": {"type": "BPE", "vocab": model, "merges": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path)


def test_a_template_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ " + "+" * 600 + "1 }}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="nested too deeply"):
        ChatTemplate(tmp_path)
