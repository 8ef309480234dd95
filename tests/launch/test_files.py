"""Every file of every engine against what the engine publishes: shells, options, schemas, field names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from launch_jobs import SERVING, TRAINING, job, pairs, published

from whalepod.launch.launch import Launched
from whalepod.spec.run import load_run

Written = dict[tuple[str, str], Launched]
EVERY = pytest.mark.parametrize(("name", "engine"), pairs(), ids=lambda x: x.replace(" ", "-"))
# sbatch(1) of Slurm 24.05, the options of a directive that these files may use.
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "array", "output", "open-mode",
    "requeue", "partition", "account", "time", "cpus-per-task", "mem", "constraint", "qos",
}  # fmt: skip


def embedded(done: Launched) -> dict[str, str]:
    """All texts by name: those of the folder, and those within a ConfigMap."""
    texts = {file.name: file.read_text() for file in done.files}
    for text in list(texts.values()):
        if "kind: ConfigMap" in text:
            texts |= next(iter(yaml.safe_load_all(text)))["data"]
    return texts


@EVERY
def test_says_its_plan_and_what_to_expect(written: Written, name: str, engine: str) -> None:
    done = written[name, engine]
    config = job(name)
    for file in done.files:
        head = file.read_text()[:1500]
        assert config.model_spec().name in head, file
        assert done.expected.words in head
        assert done.expected.layout in head
    assert (done.expected.tokens_per_s is None) == (name == "cores")  # of a network that nobody knows
    assert done.expected.memory_gib > 0
    assert json.loads(json.dumps(done.as_dict(), allow_nan=False))["files"] == [str(f) for f in done.files]


@EVERY
def test_scripts_are_scripts(written: Written, tmp_path: Path, name: str, engine: str) -> None:
    scripts = {
        file: text
        for file, text in embedded(written[name, engine]).items()
        if file.endswith((".sh", ".sbatch"))
    }
    assert scripts
    check = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    for file, text in scripts.items():
        (tmp_path / file).write_text(text)
    paths = [str(tmp_path / file) for file in scripts]
    for path in paths:
        subprocess.run(["bash", "-n", path], check=True)
    # SC2016 would have `$` in a name expanded, which must not be.
    found = subprocess.run([check, "--exclude=SC2016", *paths], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", TRAINING)
def test_trains_the_very_plan(written: Written, tmp_path: Path, name: str) -> None:
    config = job(name)
    for engine in ("torchrun", "slurm", "jobset", "pytorchjob", "trainjob", "ray", "skypilot"):
        texts = embedded(written[name, engine])
        (tmp_path / "run.yaml").write_text(texts["run.yaml"])
        assert load_run(tmp_path / "run.yaml") == config
        assert texts["node.sh"] == (written[name, "torchrun"].folder / "node.sh").read_text()


def directives(text: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len(lines) == text.count("\n#SBATCH")
    assert text.index("#SBATCH") < text.index("set -euo")  # directives end at the first command
    return dict(lines)


@pytest.mark.parametrize("name", [*TRAINING, *SERVING])
def test_slurm_asks_for_the_cluster(written: Written, name: str) -> None:
    done = written[name, "slurm"]
    asked = 0
    for file in done.files:
        if file.suffix == ".sbatch":
            found = directives(file.read_text())
            assert not found.keys() - SBATCH
            workers = int(found["array"].split("-")[1]) + 1 if "array" in found else 1
            asked += int(found["nodes"]) * int(found.get("gpus-per-node", 1)) * workers
    assert asked == int(job(name).gpus.split("x")[0])


KINDS = {"jobset": "JobSet", "pytorchjob": "PyTorchJob", "trainjob": "TrainJob", "lws": "LeaderWorkerSet"}


@pytest.mark.parametrize(
    ("name", "engine"), [pair for pair in pairs() if pair[1] in KINDS], ids=lambda x: x.replace(" ", "-")
)
def test_kubernetes_knows_every_field(written: Written, name: str, engine: str) -> None:
    known = published("crds")[engine]
    documents = list(yaml.safe_load_all((written[name, engine].folder / f"{engine}.yaml").read_text()))
    jobs = [d for d in documents if d["kind"] == known["kind"]]
    assert documents[0]["kind"] == "ConfigMap"
    assert len(jobs) == (2 if name == "divided" else 1)
    gpus = 0
    for each in jobs:
        assert each["apiVersion"] == known["apiVersion"]
        jsonschema.Draft202012Validator(known["schema"]).validate(each)
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", each["metadata"]["name"])
        gpus += pods_gpus(each)
    if name != "cores":
        assert gpus == int(job(name).gpus.split("x")[0])


def pods_gpus(document: dict[str, Any]) -> int:
    """GPUs of all pods of a job."""
    spec = document["spec"]

    def of(pod: dict[str, Any]) -> int:
        return sum(sum(c.get("resources", {}).get("limits", {}).values()) for c in pod["spec"]["containers"])

    if document["kind"] == "TrainJob":
        trainer = spec["trainer"]
        return trainer["numNodes"] * sum(trainer.get("resourcesPerNode", {}).get("limits", {}).values())
    if document["kind"] == "PyTorchJob":
        return sum(r["replicas"] * of(r["template"]) for r in spec["pytorchReplicaSpecs"].values())
    if document["kind"] == "JobSet":
        template = spec["replicatedJobs"][0]["template"]["spec"]
        return template["completions"] * of(template["template"])
    group = spec["leaderWorkerTemplate"]
    leader = of(group.get("leaderTemplate", group["workerTemplate"]))
    return spec["replicas"] * (leader + (group["size"] - 1) * of(group["workerTemplate"]))


def test_the_schemas_refuse_what_is_unknown(written: Written) -> None:
    known = published("crds")["jobset"]
    document = list(yaml.safe_load_all((written["one node", "jobset"].folder / "jobset.yaml").read_text()))[1]
    container = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    for key, value in (("comand", ["bash"]), ("image", 3)):
        before = dict(container)
        container[key] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(known["schema"]).validate(document)
        container.clear()
        container.update(before)


@pytest.mark.parametrize("name", TRAINING)
def test_skypilot_takes_the_task(written: Written, name: str) -> None:
    task = yaml.safe_load((written[name, "skypilot"].folder / "sky.yaml").read_text())
    jsonschema.Draft202012Validator(published("sky")["schema"]).validate(task)


@pytest.mark.parametrize("name", TRAINING)
def test_ray_program_compiles(written: Written, name: str) -> None:
    text = (written[name, "ray"].folder / "on_ray.py").read_text()
    compile(text, "on_ray.py", "exec")
    assert f"NODES, RESOURCES = {len_nodes(name)}," in text


def len_nodes(name: str) -> int:
    return {"one node": 1, "half a node": 1, "many nodes": 32, "racks": 16, "cores": 2}[name]


# -- options and field names


def commands(done: Launched) -> list[tuple[str, list[str]]]:
    """(program, its options) of every script that serves, as the shell would start it on a second node."""
    found = []
    for name, text in embedded(done).items():
        if not name.endswith(".sh"):
            continue
        printed = text.replace("exec vllm serve", "echo vllm")
        printed = printed.replace('exec "${PYTHON:-python3}" -m', "echo")
        out = subprocess.run(
            ["bash", "-c", printed, name],
            capture_output=True,
            text=True,
            check=True,
            env={
                **{"PATH": "/usr/bin:/bin", "NODE_RANK": "1", "MASTER_ADDR": "node0", "API_KEY": "k"},
                **{"IB_DEVICE": "mlx5_0", "SERVE_URLS": "http://a http://b", "PREFILL_URLS": "http://a"},
                "DECODE_URLS": "http://b",
            },
        ).stdout.splitlines()[-1]
        # echo has eaten the quotes, of JSON too, which holds no blank but after a colon or a comma.
        words = re.sub(r"(?<=[:,]) ", "", out).split()
        program = words[0].removesuffix(".launch_server").removesuffix(".launch_router")
        found.append((program, words[1:]))
    return found


@pytest.mark.parametrize(
    ("name", "engine"),
    [pair for pair in pairs() if pair[0] in SERVING and pair[1] != "slurm"],
    ids=lambda x: x.replace(" ", "-"),
)
def test_engines_know_every_option(written: Written, name: str, engine: str) -> None:
    known = published("flags")
    started = commands(written[name, engine])
    assert started
    for program, words in started:
        options = known[program]
        at = [i for i, word in enumerate(words) if word.startswith("--")]
        for start, end in zip(at, [*at[1:], len(words)], strict=True):
            option, values = words[start], words[start + 1 : end]
            assert option in options, (program, option)
            kind, *choices = options[option]
            assert bool(values) == (kind != "flag"), (option, values)
            if kind == "int":
                assert all(value.isdecimal() for value in values), (option, values)
            if choices:
                assert set(values) <= set(choices[0]), (option, values)


@pytest.mark.parametrize("name", [name for name, engine in pairs() if engine == "megatron"])
def test_bridge_has_every_field(written: Written, name: str) -> None:
    known = published("bridge")
    text = (written[name, "megatron"].folder / "node.sh").read_text()
    lines = re.search(r"OVERRIDES=\(\n(.*?)\n\)", text, re.DOTALL)
    assert lines is not None
    values = dict(word.split("=", 1) for word in shlex.split(lines[1]))
    for key in values:
        section, _, field = key.partition(".")
        assert (field in known[section]) if field else (section in known["container"]), key
    recipe = re.search(r"--recipe (\w+)", text)
    assert recipe is not None
    assert recipe[1] in known["recipes"]
    assert values.get("mixed_precision", "bf16_mixed") in known["precisions"]
    layout = job(name).make_layout()
    sizes = [int(values[f"model.{key}_model_parallel_size"]) for key in ("tensor", "pipeline", "expert")]
    assert sizes == [layout.tp, layout.pp, layout.ep]
    stages = values["model.pipeline_model_parallel_layout"].split("|")
    if layout.pp > 1:
        spec = job(name).model_spec()
        assert len(stages) == layout.num_stages
        assert stages[0][0] == "E"
        assert stages[-1].endswith("m" * spec.num_nextn_predict_layers + "L")
        assert sum(stage.count("t") for stage in stages) == spec.num_hidden_layers
