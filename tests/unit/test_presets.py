"""Presets: the whole family is there, found by the names people use, and files win over names."""

import json
import subprocess
import sys

import pytest

from whalepod.spec import counts
from whalepod.spec.errors import UserError
from whalepod.spec.model import MLA, from_config, to_config
from whalepod.spec.presets import load_model_spec, load_preset, preset, preset_names

OWN = {"v3-mini", "v3-bench"}


def test_family_is_complete() -> None:
    names = preset_names()
    assert len(names) == len(set(names)) == 31
    assert names[0] == "deepseek-llm-7b"
    assert set(names[-2:]) == OWN
    statuses = {name: preset(name).status for name in names}
    assert {n for n, s in statuses.items() if s == "counts"} == {"deepseek-v3.2", "deepseek-v3.2-exp"}
    facts = {"deepseek-v4-flash", "deepseek-v4-pro", "deepseek-v4.1-flash"}
    assert {n for n, s in statuses.items() if s == "facts"} == facts
    assert set(statuses.values()) == {"full", "counts", "facts"}


@pytest.mark.parametrize("name", preset_names())
def test_every_entry_is_whole(name) -> None:
    p = preset(name)
    assert p.name == name
    assert p.licence
    assert p.sources
    assert p.confidence
    assert p.family in {"dense", "moe", "own"}
    assert (p.spec is None) == (p.status == "facts") == bool(p.figures)
    hash(p)
    if p.spec is None:
        assert len(p.config["compress_ratios"]) == p.config["num_hidden_layers"]
        return
    assert p.architecture == p.spec.architecture
    assert from_config(to_config(p.spec), name) == p.spec
    if p.family != "own":
        assert (p.spec.moe is None) == (p.family == "dense")


def test_traps_of_the_family() -> None:
    """What differs between models that look alike."""
    rope = {name: preset(name).spec.rope for name in ("deepseek-v2", "deepseek-v2.5", "deepseek-v3")}  # type: ignore
    assert rope["deepseek-v2"].mscale == 0.707
    assert rope["deepseek-v2.5"].mscale == rope["deepseek-v3"].mscale == 1.0
    lite, v2, v3, v31 = (load_model_spec(f"deepseek-{n}") for n in ("v2-lite", "v2", "v3", "v3.1"))
    assert [s.moe.routed_scaling_factor for s in (lite, v2, v3)] == [1.0, 16.0, 2.5]  # type: ignore
    assert [s.moe.selection_bias for s in (lite, v2, v3)] == [False, False, True]  # type: ignore
    assert isinstance(lite.attention, MLA)
    assert lite.attention.q_lora_rank is None
    assert v3.quantization is not None
    assert v3.quantization.scale_fmt == "float32"
    assert v31.quantization is not None
    assert v31.quantization.scale_fmt == "ue8m0"
    assert v31.with_(name=v3.name, quantization=v3.quantization) == v3
    assert preset("deepseek-r1").licence == "MIT"
    assert preset("deepseek-v3").licence.startswith("DeepSeek Model License")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("deepseek-v3", "deepseek-v3"),
        ("DeepSeek-V3", "deepseek-v3"),
        ("v3", "deepseek-v3"),
        ("R1", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3-Base", "deepseek-v3"),
        ("DeepSeek-AI/DeepSeek-Coder-V2-Lite-Instruct", "deepseek-coder-v2-lite"),
        ("deepseek-ai/deepseek-coder-7b-instruct-v1.5", "deepseek-coder-7b-v1.5"),
        ("deepseek-ai/DeepSeek-V3.1-Terminus", "deepseek-v3.1"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-r1-distill-qwen-1.5b"),
        (" v3-mini ", "v3-mini"),
    ],
)
def test_spellings(written, name) -> None:
    assert preset(written).name == name
    assert load_model_spec(written) == preset(name).spec


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("deepsek-v3", "did you mean 'deepseek-v3'"),
        ("deepseek-ai/DeepSeek-V33", "did you mean 'deepseek-v3'"),
        ("zzz", "allowed: deepseek-coder-1.3b"),
        ("", "empty"),
        ("no/such/folder", "neither a file nor a folder"),
        ("missing.json", "neither a file nor a folder"),
        ("\0", "unknown model"),
        ("../" * 5000, "neither a file nor a folder"),
        ("a" * 10_000, "unknown model"),
        ("deepseek-v4-pro", "published figures only"),
        ("deepseek-ai/DeepSeek-V4-Flash", "published figures only"),
    ],
)
def test_refusals(written, message) -> None:
    with pytest.raises(UserError, match=message) as refused:
        load_model_spec(written)
    assert "\n" not in str(refused.value)


def test_own_models_are_small() -> None:
    mini, bench = load_model_spec("v3-mini"), load_model_spec("v3-bench")
    assert 20e6 < counts.total_params(mini) < counts.params(mini, mtp=True).total < 40e6
    assert mini.num_nextn_predict_layers == 1
    assert round(counts.total_params(bench) / 1e6, 1) == 105.6
    assert bench.num_nextn_predict_layers == 0
    for spec in (mini, bench):
        assert spec.quantization is None
        assert spec.rope.kind == "default"
        assert spec.num_moe_layers == spec.num_hidden_layers - 1


def test_files_and_folders(tmp_path, monkeypatch) -> None:
    spec = load_model_spec("v3-mini").with_(hidden_size=320, name="run")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_config(spec)))
    assert load_model_spec(folder) == load_model_spec(str(folder)) == spec
    assert load_model_spec(folder / "config.json") == spec
    assert load_preset(folder).status == "full"
    assert preset("v3-mini").spec != spec

    monkeypatch.chdir(tmp_path)
    assert load_model_spec("run") == spec
    # A folder that happens to be called like a preset is a model only when it holds one.
    (tmp_path / "v3-mini").mkdir()
    assert load_model_spec("v3-mini") == preset("v3-mini").spec
    (tmp_path / "v3-mini" / "config.json").write_text(json.dumps(to_config(spec)))
    assert load_model_spec("v3-mini").hidden_size == 320
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model_spec("empty")


def test_broken_file_is_the_users_mistake(tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "deepseek_v4"}')
    with pytest.raises(UserError, match="not supported"):
        load_model_spec(file)


def test_spec_is_light() -> None:
    """Importing loads neither torch nor the YAML file; reading presets still loads no torch."""
    program = (
        "import sys, whalepod.spec, whalepod.spec.presets as p, whalepod.spec.counts\n"
        "assert 'yaml' not in sys.modules\n"
        "p.preset_names()\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
