"""Accelerators by name, `load_gpu("h100")`, and clusters of them, `parse_gpus("64xH100")`.

The numbers and the source of each are in `data/hardware.yaml`; what no source gives is None here. A profile
that `whalepod calibrate` wrote for this user goes before the entry of its name.
A bandwidth is in one direction and per accelerator; a GB is 10^9 bytes, a GiB 2^30, a TFLOP 10^12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from whalepod.spec.errors import UserError, nearest
from whalepod.spec.measured import Measured, profile_folder
from whalepod.spec.model import shown
from whalepod.spec.yaml_text import parse_yaml

Architecture = Literal["ampere", "hopper", "ada", "blackwell", "cdna3", "cdna4", "ascend", "cpu"]
PRECISIONS = ("bf16", "fp8", "fp4", "fp32")
Precision = Annotated[str, Field(pattern=rf"\A({'|'.join(PRECISIONS)})\z")]
Line = Annotated[str, Field(max_length=400, pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]+\z")]
Positive = Annotated[float, Field(strict=True, ge=1e-6, le=1e9)]
Share = Annotated[float, Field(strict=True, ge=1e-6, le=1)]
Cost = Annotated[float, Field(strict=True, ge=0, le=1e9)]

MAX_GPUS = 2**20
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_GPUS)]
GIVEN = "given by user"

_DATA = Path(__file__).parent / "data" / "hardware.yaml"
_MAX_PROFILE_BYTES = 2**20
_NO_MORE = ConfigDict(extra="forbid")
_RULES = {  # of pydantic's, in words that fit a YAML file
    "string_pattern_mismatch": "should be one line of text",
    "dataclass_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "tuple_type": "should be a list",
    "named_tuple_type": "should be a list",
}


@dataclass(frozen=True)
class Link:
    """The fast link within a domain of `size` accelerators. `gb_s` is each one's total to all others;
    `peer_gb_s` what it has to a single other one, where that is less (None: the same)."""

    __pydantic_config__ = _NO_MORE

    name: Line
    gb_s: Positive
    size: Count
    peer_gb_s: Positive | None = None


@dataclass(frozen=True)
class Price:
    __pydantic_config__ = _NO_MORE

    usd_per_hour: Cost
    date: Annotated[Line, BeforeValidator(str)]  # YAML reads a whole date as one
    source: Line


@dataclass(frozen=True)
class Gpu:
    """One kind of accelerator.

    tflops: dense peaks by precision, without structured sparsity. reachable: the share of that peak which
    the best matrix product measured in PyTorch attains. memory_gib: what the driver reports where a source
    says it, else the nominal size. usable_scale_up_gb_s: the published part of `scale_up.gb_s` that can be
    had. nic_gb_s: each accelerator's share of its node's network. peer_to_peer: False where the cards of a
    node can talk only through the host's memory. measured: what a calibration found, which the planner then
    goes by. sources: where each number is from, by dotted field.
    """

    __pydantic_config__ = _NO_MORE

    name: Line
    title: Line
    architecture: Architecture
    vendor: Line
    tflops: Mapping[Precision, Positive] = field(hash=False)
    memory_gib: Positive
    memory_tb_s: Positive
    gpus_per_node: Count
    reachable: Mapping[Precision, Share] = field(default_factory=dict, hash=False)
    scale_up: Link | None = None
    usable_scale_up_gb_s: Positive | None = None
    pcie_gb_s: Positive | None = None
    nic_gb_s: Positive | None = None
    power_w: Positive | None = None
    price: Price | None = None
    peer_to_peer: Annotated[bool, Field(strict=True)] = True
    aliases: tuple[Line, ...] = ()
    measured: Measured | None = None
    sources: Mapping[Line, Line] = field(default_factory=dict, hash=False, repr=False)

    def source(self, path: str) -> str:
        """Where the number at a dotted field is from: its own source, else its group's."""
        return self.sources.get(path) or self.sources.get(path.partition(".")[0], GIVEN)

    def supports(self, precision: str) -> bool:
        return precision in self.tflops

    def peak_flops(self, precision: str) -> float | None:
        """Dense peak in FLOP/s; None where the hardware lacks the precision or its peak is not known."""
        peak = self.tflops.get(precision)
        return None if peak is None else peak * 1e12


@dataclass(frozen=True)
class Cluster:
    """`num_gpus` of one kind, in nodes of `gpus_per_node`, of which the last may have fewer."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.gpus_per_node)

    @property
    def domain(self) -> int:
        """Accelerators that share the fast link: a rack's where it crosses nodes (NVL72), else a node's."""
        link = self.gpu.scale_up
        size = self.gpus_per_node
        if link is not None:
            crosses_nodes = link.size > self.gpu.gpus_per_node
            size = link.size if crosses_nodes else min(link.size, size)
        return min(size, self.num_gpus)

    @property
    def domain_gb_s(self) -> float | None:
        """Bandwidth within the domain: the scale-up link's, else PCIe's; None where neither is known."""
        return self.gpu.scale_up.gb_s if self.gpu.scale_up else self.gpu.pcie_gb_s

    @property
    def aligned(self) -> int:
        """Of a domain what a job of this size fills evenly: 64 of a rack's 72 where it has 256."""
        if self.num_gpus <= self.domain:
            return self.domain
        return max(d for d in range(1, self.domain + 1) if self.num_gpus % d == 0)

    @property
    def nic_gb_s(self) -> float | None:
        return self.gpu.nic_gb_s

    @property
    def most(self) -> int:
        """How many of them can work together: one domain's, where no network between nodes is known."""
        return MAX_GPUS if self.nic_gb_s is not None else self.of(MAX_GPUS).domain

    def of(self, num_gpus: int) -> Cluster:
        """Another number of the same."""
        return replace(self, num_gpus=num_gpus)


@dataclass(frozen=True)
class Operation:
    """How a cluster is run: its failures, and the storage that checkpoints go to; see the data file."""

    __pydantic_config__ = _NO_MORE

    gpu_hours_per_failure: Positive
    restart_s: Positive
    node_storage_gb_s: Positive
    storage_gb_s: Positive
    blocking_share: Share
    sources: Mapping[Line, Line] = field(default_factory=dict, hash=False, repr=False)


@cache
def usual_operation() -> Operation:
    """What published runs say."""
    found = _checked(_database()["operation"], Operation, "operation")
    return replace(found, sources={path: _spelled(s) for path, s in found.sources.items()})


def gpu_names() -> list[str]:
    """Names of all known accelerators, in the order of the data file."""
    return list(_database()["gpus"])


def load_gpu(name: str | Path) -> Gpu:
    """The accelerator `name`, or the one that a YAML file (`.yaml`, `.yml`) of the same fields describes.

    Profiles in `profile_folder()` are asked first. Case, spaces, dashes, underscores and the maker's name do
    not count. Raises UserError with one line.
    """
    text = str(name).strip()
    if isinstance(name, Path) or text.lower().endswith((".yaml", ".yml")):
        return _read_profile(Path(text))
    own = _own_profiles()
    if (file := own.get(_squeezed(text))) is not None:
        return _read_profile(file)
    found = _spellings().get(_squeezed(text))
    if found is None:
        names = [*gpu_names(), *(file.stem for file in own.values())]
        raise UserError(f"unknown GPU {shown(text)}{nearest(text[:100], names)}")
    return _gpu(found)


def spelled_gpu(name: str) -> Gpu | None:
    """The database's accelerator of a device's own name, like "NVIDIA H100 80GB HBM3", if there is one."""
    words = re.split(r"\s+", name.strip())
    tries = (_spellings().get(_squeezed("".join(words[:n]))) for n in range(len(words), 0, -1))
    found = next((f for f in tries if f is not None), None)
    return None if found is None else _gpu(found)


def parse_gpus(text: str, gpus_per_node: int | None = None) -> Cluster:
    """Cluster of `64xH100`, `64 x h100` or `8xmy-gpu.yaml`; `gpus_per_node` None is the hardware's usual.

    Raises UserError with one line.
    """
    match = re.fullmatch(r"([+-]?\d+)\s*[x×*](.+)", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise UserError(f"GPUs must be a count and a name, like 64xH100, not {shown(text)}")
    count, name = match.groups()
    # int() refuses thousands of digits, and eight are too many already.
    num_gpus = int(count) if len(count.lstrip("+-0")) < 8 else 0
    if not 1 <= num_gpus <= MAX_GPUS:
        raise UserError(f"number of GPUs must be from 1 to {MAX_GPUS}, not {shown(count)}")
    gpu = load_gpu(name)
    per_node = gpu.gpus_per_node if gpus_per_node is None else gpus_per_node
    _checked(per_node, Count, "GPUs per node")
    return Cluster(gpu, num_gpus, per_node)


def override_gpu(
    gpu: Gpu,
    *,
    memory_gib: float | None = None,
    memory_tb_s: float | None = None,
    scale_up_gb_s: float | None = None,
    nic_gb_s: float | None = None,
    usd_per_hour: float | None = None,
) -> Gpu:
    """A copy of `gpu` with what is not None changed; its sources, and its price's date, then say so.

    What a single peer has of the scale-up link, and what of it can be used, change in proportion.
    """
    plain = {"memory_gib": memory_gib, "memory_tb_s": memory_tb_s, "nic_gb_s": nic_gb_s}
    new: dict[str, Any] = {k: _checked(v, Positive, k) for k, v in plain.items() if v is not None}
    given = [*new]
    if scale_up_gb_s is not None:
        link, usable = gpu.scale_up, gpu.usable_scale_up_gb_s
        if link is None:
            raise UserError(f"{gpu.name} has no scale-up link, so scale_up_gb_s does not apply")
        total = _checked(scale_up_gb_s, Positive, "scale_up_gb_s")
        ratio = total / link.gb_s
        peer = link.peer_gb_s and link.peer_gb_s * ratio
        new["scale_up"] = replace(link, gb_s=total, peer_gb_s=peer)
        new["usable_scale_up_gb_s"] = usable and usable * ratio
        if gpu.measured is not None:  # over the link as it was
            new["measured"] = replace(gpu.measured, collectives=())
        given += ["scale_up.gb_s", "scale_up.peer_gb_s", "usable_scale_up_gb_s"]
    if usd_per_hour is not None:
        new["price"] = Price(_checked(usd_per_hour, Cost, "usd_per_hour"), GIVEN, GIVEN)
    return replace(gpu, **new, sources={**gpu.sources, **dict.fromkeys(given, GIVEN)})


def _own_profiles() -> dict[str, Path]:
    """Files of this user's profiles by squeezed name."""
    try:
        files = sorted(profile_folder().glob("*.yaml"))
    except (OSError, ValueError, RuntimeError):  # not to be read, a NUL, no home: as if there were none
        return {}
    return {_squeezed(file.stem): file for file in files}


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|geforce|amd|instinct|huawei", "", name.lower())


@cache
def _spellings() -> dict[str, str]:
    entries = _database()["gpus"].items()
    return {_squeezed(s): name for name, entry in entries for s in (name, *entry.get("aliases", ()))}


@cache
def _gpu(name: str) -> Gpu:
    gpu = _checked({"name": name, **_database()["gpus"][name]}, Gpu, name)
    price = gpu.price and replace(gpu.price, source=_spelled(gpu.price.source))
    return replace(gpu, price=price, sources={path: _spelled(s) for path, s in gpu.sources.items()})


def _spelled(source: str) -> str:
    """A source by its key, in words."""
    key, *note = source.split(" ", 1)
    return " ".join((_database()["sources"][key], *note))


@cache
def _database() -> dict[str, Any]:
    return parse_yaml(_DATA.read_text(encoding="utf-8"), _DATA.name)


def _read_profile(path: Path) -> Gpu:
    where = shown(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_PROFILE_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise UserError(f"cannot read GPU profile {where}: {shown(str(error))}") from None
    if len(data) > _MAX_PROFILE_BYTES:
        raise UserError(f"{where} is larger than a GPU profile may be ({_MAX_PROFILE_BYTES} bytes)")
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold a mapping of fields, not {shown(values)}")
    gpu = _checked({"name": path.stem, **values}, Gpu, where)
    if "bf16" not in gpu.tflops:
        raise UserError(f"{where}: tflops.bf16 is missing")
    return gpu


def _checked(value: Any, kind: Any, where: str) -> Any:
    """`value` as a `kind`; UserError names the field that is not right."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if path[-1:] == ["[key]"] or first["type"] == "unexpected_keyword_argument":
        *groups, key = [part for part in path if part != "[key]"]
        kinds = {(): Gpu, ("scale_up",): Link, ("price",): Price, ("measured",): Measured}
        known = kinds.get(tuple(groups))
        names = [f.name for f in fields(known)] if known else PRECISIONS
        raise UserError(f"{where}: unknown key {shown('.'.join((*groups, key)))}{nearest(key, names)}")
    if first["type"] == "missing":
        raise UserError(f"{where}: {'.'.join(path)} is missing")
    rule = _RULES.get(first["type"], first["msg"].removeprefix("Input "))
    place = ": ".join(filter(None, (where, ".".join(path))))
    raise UserError(f"{place} {rule}, not {shown(first['input'])}")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
