"""Training jobs: `node.sh`, the same for all, and what starts it on every node of a cluster.

Who starts it says which node it is (NODE_RANK) and where node 0 is (MASTER_ADDR); the rest is torchrun's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from whalepod.launch.job import Job
from whalepod.launch.render import quoted, render
from whalepod.spec.run import dump_run

PORT = 29500
TORCH_IMAGE = "pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime"
_RESOURCES = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu", "huawei": "huawei.com/Ascend910"}
_SKY_NAMES = {"A100-40G": "A100", "A100": "A100-80GB", "RTX-PRO-6000": "RTXPRO6000"}


@dataclass(frozen=True)
class Pods:
    """Pods of a kind in Kubernetes: `nodes` of them, each with `per_node` of a resource (None: no GPUs).
    files: the ConfigMap of their scripts; claim: of the storage that all of them see."""

    name: str
    files: str
    image: str
    nodes: int
    per_node: int
    resource: str | None
    shared: str
    claim: str = "whalepod-shared"


def pods(job: Job, image: str, name: str | None = None, nodes: int = 0, per_node: int = 0) -> Pods:
    """The whole cluster's, or `nodes` of `per_node` GPUs each."""
    gpu = job.cluster.gpu
    return Pods(
        name or job.name,
        f"{job.name}-files",
        job.image or image,
        nodes or job.num_nodes,
        per_node or job.per_node,
        None if gpu.architecture == "cpu" else _RESOURCES.get(gpu.vendor.lower(), "nvidia.com/gpu"),
        job.shared,
    )


def on_nodes(job: Job) -> dict[str, object]:
    """What templates of node scripts ask for."""
    return {
        "name": job.name,
        "nodes": job.num_nodes,
        "per_node": job.per_node,
        "port": PORT,
        "gpus": job.cluster.gpu.architecture != "cpu",
        "cuda": job.cluster.gpu.vendor == "nvidia",
    }


def torchrun(job: Job, comment: str) -> dict[str, str]:
    """node.sh and the run.yaml that it trains."""
    out = PurePath(job.config.out)
    place = quoted(out) if out.is_absolute() else f'"$SHARED_DIR"/{quoted(out)}'
    return {
        "node.sh": render("train.sh", comment=comment, out=place, **on_nodes(job)),
        "run.yaml": f"{comment}\n{dump_run(job.config)}",
    }


def sbatch(job: Job, comment: str, folder: str, script: str, file: str, **more: object) -> str:
    """A batch script that runs `script` on each node; more: over what `on_nodes` says."""
    values = {"image": job.image or "", "count": 1, "whole": job.per_node == job.cluster.gpus_per_node}
    known = {**on_nodes(job), **values, "folder": folder, "script": script, "file": file, **more}
    return render("job.sbatch", comment=comment, **known)


def slurm(job: Job, comment: str, folder: str) -> dict[str, str]:
    return torchrun(job, comment) | {"job.sbatch": sbatch(job, comment, folder, "node.sh", "job.sbatch")}


def kubernetes(kind: str, job: Job, comment: str) -> dict[str, str]:
    """One file: a ConfigMap of node.sh and run.yaml, and the job; kind: jobset, pytorchjob or trainjob."""
    file = f"{kind}.yaml"
    texts = torchrun(job, comment)
    return {file: render(file, comment=comment, job=pods(job, TORCH_IMAGE), texts=texts, file=file)}


def ray(job: Job, comment: str) -> dict[str, str]:
    gpus = job.cluster.gpu.architecture != "cpu"
    resources = f'{{"GPU": {job.per_node}}}' if gpus else f'{{"CPU": {job.per_node}}}'
    options = f'"num_{"gpus" if gpus else "cpus"}": {job.per_node}'
    text = render(
        "on_ray.py.j2",
        comment=comment,
        shared=job.shared,
        resources=resources,
        options=options,
        **on_nodes(job),
    )
    return torchrun(job, comment) | {"on_ray.py": text}


def skypilot(job: Job, comment: str, folder: str) -> dict[str, str]:
    name = job.cluster.gpu.name
    values = {"shared": job.shared, "folder": folder, "file": "sky.yaml", "image": job.image or TORCH_IMAGE}
    known = {**on_nodes(job), **values, "accelerator": _SKY_NAMES.get(name, name)}
    return torchrun(job, comment) | {"sky.yaml": render("skypilot.yaml", comment=comment, **known)}
