"""Hardware: every number has a source, what is unknown is absent, and profiles are read with suspicion."""

import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, fields, replace
from math import inf, nan

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whalepod.spec.errors import UserError
from whalepod.spec.hardware import (
    GIVEN,
    MAX_GPUS,
    PRECISIONS,
    Gpu,
    Link,
    gpu_names,
    load_gpu,
    override_gpu,
    parse_gpus,
)

NAMES = [
    *("A100-40G", "A100", "H100", "H100-PCIe", "H800", "H20", "H200"),
    *("B200", "GB200", "B300", "GB300", "L40S", "RTX4090", "RTX5090", "RTX-PRO-6000"),
    *("MI300X", "MI325X", "MI355X", "Ascend-910B", "Ascend-910C", "cpu"),
]
PROFILE = {
    "title": "An accelerator of mine",
    "vendor": "me",
    "architecture": "hopper",
    "tflops": {"bf16": 100, "fp8": 200.5},
    "reachable": {"bf16": 0.7},
    "memory_gib": 64,
    "memory_tb_s": 2.5,
    "scale_up": {"name": "ring", "gb_s": 100, "size": 4, "peer_gb_s": 50},
    "gpus_per_node": 4,
    "price": {"usd_per_hour": 0, "date": "2026-11", "source": "mine"},
}


def numbers(values: dict, prefix: str = "") -> list[str]:
    """Dotted fields of all numbers."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += numbers(value, f"{prefix}{key}.")
        elif type(value) in (int, float):
            found.append(prefix + key)
    return found


@pytest.fixture
def profile(tmp_path):
    """Writes a profile, as text, bytes or fields over PROFILE, and loads it."""

    def load(content) -> Gpu:
        file = tmp_path / "mine.yaml"
        if isinstance(content, dict):
            content = yaml.safe_dump(PROFILE | content)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_gpu(str(file))

    return load


def test_all_are_there() -> None:
    assert gpu_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name) -> None:
    gpu = load_gpu(name)
    hash(gpu)
    assert gpu.name == name
    values = asdict(gpu)
    sources = values.pop("sources")
    known = set(numbers(values)) | set(values)
    assert sources.keys() <= known
    for path in numbers(values):
        assert (gpu.price and path == "price.usd_per_hour") or gpu.source(path) != GIVEN, path
    if gpu.price:
        assert gpu.price.date >= "2026"
        assert len(gpu.price.source) > 10
    assert all(len(source) > 10 for source in sources.values())


@pytest.mark.parametrize("name", NAMES)
def test_numbers_agree(name) -> None:
    gpu = load_gpu(name)
    assert gpu.tflops["bf16"] > gpu.tflops.get("fp32", 0)
    if "fp8" in gpu.tflops:
        assert gpu.tflops["fp8"] == pytest.approx(2 * gpu.tflops["bf16"], rel=0.02)
    assert gpu.reachable.keys() <= gpu.tflops.keys()
    assert all(0.5 < share <= 1 for share in gpu.reachable.values())
    assert gpu.supports("fp8") == (gpu.architecture not in {"ampere", "ascend", "cpu"})
    assert gpu.supports("fp4") == (gpu.architecture in {"blackwell", "cdna4"})
    if gpu.scale_up:
        assert (gpu.usable_scale_up_gb_s or 0) <= gpu.scale_up.gb_s
        assert gpu.nic_gb_s is None or gpu.nic_gb_s < gpu.scale_up.gb_s
        if gpu.scale_up.peer_gb_s:
            assert gpu.scale_up.peer_gb_s * (gpu.scale_up.size - 1) == pytest.approx(gpu.scale_up.gb_s)


def test_known_figures() -> None:
    h100, h800, b200, b300 = (load_gpu(name) for name in ("H100", "H800", "B200", "B300"))
    assert [h100.peak_flops(p) for p in PRECISIONS] == [989e12, 1979e12, None, 67e12]
    assert h100.peak_flops("int3") is None
    assert h800.scale_up == Link("NVLink 4", 200.0, 8)
    assert h800.usable_scale_up_gb_s == 160
    assert b200.peak_flops("fp4") == 9e15
    assert b300.peak_flops("fp4") == 14e15
    assert round(b300.memory_gib, 1) == 268.6
    assert h100.reachable["bf16"] * h100.tflops["bf16"] == pytest.approx(794.5, rel=1e-3)
    amd = load_gpu("MI355X")
    assert amd.reachable["bf16"] * amd.tflops["bf16"] == pytest.approx(1565, rel=1e-3)


def test_unknown_is_absent() -> None:
    for name in ("H800", "H20", "GB200", "B300", "GB300", "MI300X", "Ascend-910B", "cpu"):
        assert load_gpu(name).price is None
    assert load_gpu("GB300").reachable == {}
    assert load_gpu("Ascend-910C").power_w is None
    assert load_gpu("cpu").nic_gb_s is None
    assert "recalled" in load_gpu("H800").source("power_w")
    assert "derived" in load_gpu("H800").source("reachable.fp8")
    assert load_gpu("H100").source("no.such") == GIVEN


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "H100"),
        ("h100_sxm", "H100"),
        ("H100 SXM5", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h100_pcie", "H100-PCIe"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("h200_sxm", "H200"),
        ("b200_sxm", "B200"),
        ("b300_sxm", "B300"),
        ("gb200_nvl72", "GB200"),
        ("GB300 NVL72", "GB300"),
        ("a100-80g", "A100"),
        ("a100_sxm", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("rtx_pro_6000_server", "RTX-PRO-6000"),
        ("RTX 4090", "RTX4090"),
        ("4090", "RTX4090"),
        ("NVIDIA GeForce RTX 5090", "RTX5090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("910b", "Ascend-910B"),
        (" CPU ", "cpu"),
    ],
)
def test_spellings(written, name) -> None:
    assert load_gpu(written) is load_gpu(name)


def test_no_spelling_is_taken_twice() -> None:
    for name in NAMES:
        assert all(load_gpu(spelling).name == name for spelling in (name, *load_gpu(name).aliases))


@pytest.mark.parametrize(
    ("text", "per_node", "nodes", "domain", "gb_s"),
    [
        ("64xH100", None, 8, 8, 450),
        ("4xH100", None, 1, 4, 450),
        ("12xH100", None, 2, 8, 450),
        ("64 x H100", 4, 16, 4, 450),
        ("64xH100", 16, 4, 8, 450),
        ("2048xh800", None, 256, 8, 200),
        ("256xGB200", None, 64, 72, 900),
        ("64×gb300", None, 16, 64, 900),
        ("72 * gb200_nvl72", 8, 9, 72, 900),
        ("1xRTX4090", None, 1, 1, 31),
        ("16xrtx 4090", None, 2, 8, 31),
        ("16xL40S", 4, 4, 4, 31),
        ("1024xAscend 910C", None, 128, 384, 392),
        ("+8xMI300X", None, 1, 8, 448),
        ("2xcpu", None, 1, 2, None),
    ],
)
def test_clusters(text, per_node, nodes, domain, gb_s) -> None:
    cluster = parse_gpus(text, gpus_per_node=per_node)
    assert (cluster.num_nodes, cluster.domain, cluster.domain_gb_s) == (nodes, domain, gb_s)
    assert cluster.nic_gb_s == cluster.gpu.nic_gb_s


def test_nodes() -> None:
    assert parse_gpus("256xGB200").gpus_per_node == 4
    assert (parse_gpus("4xH100").gpus_per_node, parse_gpus("4xH100").domain) == (8, 4)
    assert (parse_gpus("8xRTX4090").most, parse_gpus("8xH100").most) == (8, MAX_GPUS)
    assert not load_gpu("RTX4090").peer_to_peer
    assert load_gpu("L40S").peer_to_peer
    assert parse_gpus(f"{MAX_GPUS}xH100").num_gpus == MAX_GPUS
    assert replace(parse_gpus("8xL40S"), num_gpus=4).domain == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "like 64xH100"),
        ("H100", "like 64xH100, not 'H100'"),
        ("64", "like 64xH100"),
        ("64 H100", "like 64xH100"),
        ("64x", "like 64xH100"),
        ("8xH100\n8xH200", "like 64xH100"),
        ("1.5xH100", "like 64xH100"),
        ("٣xH100", "like 64xH100"),
        ("0xH100", "from 1 to 1048576, not '0'"),
        ("-8xH100", "from 1 to 1048576, not '-8'"),
        (f"{MAX_GPUS + 1}xH100", "from 1 to 1048576"),
        ("9" * 10_000 + "xH100", "from 1 to 1048576"),
        ("8xH1000", "did you mean 'H100'"),
        ("8xMI30OX", "did you mean 'MI300X'"),
        ("8xzzzz", "allowed: A100"),
        ("8x" + "h" * 10_000, "unknown GPU"),
        ("8xno-such.yaml", "cannot read GPU profile"),
        ("8x\0.yaml", "cannot read GPU profile"),
        ("1xa" + " " * 100_000 + "b", "unknown GPU"),
    ],
)
def test_refusals(text, message) -> None:
    with pytest.raises(UserError, match=message) as refused:
        parse_gpus(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("per_node", [0, -1, MAX_GPUS + 1, 10**4000, 2.5, True])
def test_node_sizes_that_make_no_sense(per_node) -> None:
    with pytest.raises(UserError, match="GPUs per node"):
        parse_gpus("8xH100", gpus_per_node=per_node)


def test_override() -> None:
    h100, h800, amd = (load_gpu(name) for name in ("H100", "H800", "MI300X"))
    assert override_gpu(h100) == h100
    more = override_gpu(h100, memory_gib=141, memory_tb_s=4.8, nic_gb_s=100, usd_per_hour=2)
    assert (more.memory_gib, more.memory_tb_s, more.nic_gb_s) == (141, 4.8, 100)
    assert more.price is not None
    assert (more.price.usd_per_hour, more.price.date) == (2, GIVEN)
    assert more.source("memory_gib") == more.source("nic_gb_s") == GIVEN
    assert more.source("power_w") == h100.source("power_w")
    assert h100.memory_gib < 80
    faster = override_gpu(h800, scale_up_gb_s=400)
    assert faster.scale_up == Link("NVLink 4", 400, 8)
    assert faster.usable_scale_up_gb_s == 320
    assert faster.source("scale_up.gb_s") == GIVEN != faster.source("scale_up.size")
    slower = override_gpu(amd, scale_up_gb_s=224).scale_up
    assert slower is not None
    assert slower.peer_gb_s == 32
    with pytest.raises(UserError, match="no scale-up link"):
        override_gpu(load_gpu("L40S"), scale_up_gb_s=100)


@pytest.mark.parametrize("value", [0, -1, nan, inf, -inf, 1e10, 10**400, True, "80"])
@pytest.mark.parametrize("name", ["memory_gib", "memory_tb_s", "scale_up_gb_s", "nic_gb_s", "usd_per_hour"])
def test_override_refuses(name, value) -> None:
    if name == "usd_per_hour" and value == 0:
        return
    with pytest.raises(UserError, match=name) as refused:
        override_gpu(load_gpu("H100"), **{name: value})
    assert "\n" not in str(refused.value)


def test_profile(profile, tmp_path) -> None:
    gpu = profile({})
    assert gpu.name == "mine"
    assert gpu.tflops == {"bf16": 100.0, "fp8": 200.5}
    assert gpu.scale_up == Link("ring", 100.0, 4, 50.0)
    assert gpu.price is not None
    assert gpu.price.source == "mine"
    assert gpu.source("memory_gib") == GIVEN
    assert gpu.pcie_gb_s is None
    assert load_gpu(tmp_path / "mine.yaml") == gpu
    cluster = parse_gpus(f"8x{tmp_path / 'mine.yaml'}")
    assert (cluster.gpu, cluster.num_nodes, cluster.domain) == (gpu, 2, 4)
    dated = profile(
        {"price": {"usd_per_hour": 2.5, "date": "2026-11-24", "source": "mine"}, "sources": {"tflops": "me"}}
    )
    assert dated.price is not None
    assert dated.source("tflops.fp8") == "me"
    text = yaml.safe_dump(PROFILE).replace("date: 2026-11", "date: 2026-11-24")
    assert profile(text).price.date == "2026-11-24"


def test_data_file_is_a_valid_profile(profile) -> None:
    """Each entry can be copied out as the beginning of a profile."""
    for name in NAMES:
        values = {k: v for k, v in asdict(load_gpu(name)).items() if v is not None}
        values["aliases"] = list(values["aliases"])
        assert profile(yaml.safe_dump(values)) == load_gpu(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must hold a mapping"),
        ("- 1", "must hold a mapping"),
        ("title: [", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot read|not valid"),
        (b"title: \x01", "not valid YAML"),
        ("title: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("title: !!int ''", "not valid YAML"),
        ("title: !!timestamp x", "not valid YAML"),
        ("title: !!bool x", "not valid YAML"),
        ("title: 2026-13-45", "not valid YAML"),
        ("title: " + "9" * 10_000, "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: &a 1\nb: *a", "references and deep nesting"),
        ("[" * 100_000, "not valid YAML"),
        ("[" * 9 + "]" * 9, "references and deep nesting"),
        ("#" * 2**20 + "\n", "larger than a GPU profile"),
        ({"memory_gb": 80}, "unknown key 'memory_gb' .did you mean 'memory_gib'"),
        ({"tflops": {"bf16": 1, "fp9": 1}}, "unknown key 'tflops.fp9' .did you mean 'fp"),
        ({"scale_up": {"name": "x", "gb_s": 1, "size": 8, "gbs": 1}}, "'scale_up.gbs' .did you mean 'gb_s'"),
        ({"price": {"usd": 1, "date": "x", "source": "x"}}, "price.usd"),
        ({1: 2}, "mine.yaml"),
        (yaml.safe_dump(PROFILE) + f"0x{'f' * 9999}: 1", "mine.yaml"),
        ({"tflops": {}}, "tflops.bf16 is missing"),
        ({"tflops": 5}, "tflops should be a mapping, not 5"),
        ({"scale_up": {"name": "x", "gb_s": 1}}, "scale_up.size is missing"),
        ({"scale_up": "NVLink"}, "scale_up should be a mapping"),
        ({"memory_gib": "80"}, "memory_gib"),
        ({"memory_gib": True}, "memory_gib"),
        ({"memory_gib": None}, "memory_gib"),
        ({"memory_gib": nan}, "memory_gib"),
        ({"memory_gib": inf}, "memory_gib"),
        ({"memory_gib": -1}, "memory_gib"),
        ({"memory_gib": 0}, "memory_gib"),
        ({"memory_gib": 10**400}, "memory_gib"),
        ({"reachable": {"bf16": 1.01}}, "reachable.bf16"),
        ({"gpus_per_node": 0}, "gpus_per_node"),
        ({"gpus_per_node": 8.0}, "gpus_per_node"),
        ({"peer_to_peer": "no"}, "peer_to_peer"),
        ({"architecture": "hoper"}, "architecture"),
        ({"title": ""}, "title"),
        ({"title": "two\nlines"}, "title should be one line of text"),
        ({"title": "\x1b[2J"}, "title"),
        ({"title": "x" * 1000}, "title"),
        ({"price": {"usd_per_hour": -1, "date": "x", "source": "x"}}, "price.usd_per_hour"),
        ({"sources": {"tflops": 5}}, "sources.tflops"),
    ],
)
def test_bad_profiles(profile, content, message) -> None:
    with pytest.raises(UserError, match=message) as refused:
        profile(content)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_missing_fields_and_files(profile, tmp_path) -> None:
    for name in ("title", "vendor", "architecture", "tflops", "memory_gib", "memory_tb_s", "gpus_per_node"):
        with pytest.raises(UserError, match=f"{name} is missing"):
            profile(yaml.safe_dump({k: v for k, v in PROFILE.items() if k != name}))
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "none"):
        with pytest.raises(UserError, match="cannot read"):
            load_gpu(path)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([f.name for f in fields(Gpu)]), value=ODD)
def test_odd_values_load_or_are_refused(profile, name, value) -> None:
    with suppress(UserError):
        assert isinstance(profile({name: value}), Gpu)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text("{}[]:&*!-?|>'\"#%@ \n\tab1~<", max_size=60))
def test_odd_files_are_refused(profile, content) -> None:
    with pytest.raises(UserError) as refused:
        profile(content)
    assert "\n" not in str(refused.value)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30) | st.from_regex(r"[0-9]{1,9} ?[x*] ?[a-zA-Z0-9 _-]{0,12}", fullmatch=True))
def test_odd_text_is_a_cluster_or_refused(text) -> None:
    with suppress(UserError):
        cluster = parse_gpus(text)
        assert 1 <= cluster.domain <= cluster.num_gpus <= MAX_GPUS
        assert cluster.gpus_per_node * (cluster.num_nodes - 1) < cluster.num_gpus


def test_no_torch() -> None:
    program = "import sys, whalepod.spec.hardware as h; h.load_gpu('h100'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
