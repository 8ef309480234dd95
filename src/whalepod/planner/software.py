"""Software: what a training stack makes of the hardware; named generations.

A layout on a GPU runs as fast as its software lets it: one layout of Megatron gained over 25 % between
two releases. Every constant here is a share of a peak, a latency or a count; one set for a stack and a
family of GPUs, none for a single measurement. `whalepod accuracy` shows what they are worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from whalepod.planner.activations import MEGATRON, OWN, OWN_CPU, Framework
from whalepod.planner.measured import fitted_shares
from whalepod.planner.memory import NO_OVERHEAD, OVERHEAD, Overhead
from whalepod.planner.state import DEEPSEEK_STATE, MEGATRON_STATE, OWN_STATE, StateTypes
from whalepod.spec.errors import UserError, nearest
from whalepod.spec.hardware import Cluster, Gpu
from whalepod.spec.run import OptimizerConfig

Dispatcher = Literal["all-to-all", "two_hop", "deepep", "hybridep"]


@dataclass(frozen=True)
class Shares:
    """What kernels of one GPU architecture reach.

    gemm, grouped: of the dense peak, by precision, at sizes that fill the GPU. Training is steadier than a
    benchmark of one product and hotter (power), so these lie below the best measured product.
    attention: of the BF16 peak, forward and backward, in causal FLOPs. memory: of the HBM bandwidth for
    fused elementwise work; permute: for gathering and scattering rows.
    half_k: the inner length at which a product reaches half of its share. half_rows: rows of one expert
    at which a grouped product does. half_attention: tokens and width of keys that halve attention's, forward
    and backward. optimizer: of the memory bandwidth, in AdamW (None: as `memory`).
    """

    gemm: Mapping[str, float]
    grouped: Mapping[str, float]
    attention: tuple[float, float]
    memory: float = 0.65
    permute: float = 0.50
    half_k: float = 350.0
    half_rows: float = 160.0
    half_attention: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0))
    optimizer: float | None = None

    def scaled(self, factor: float) -> Shares:
        """All shares of arithmetic by so much higher."""
        gemm, grouped = ({p: share * factor for p, share in x.items()} for x in (self.gemm, self.grouped))
        there, back = self.attention
        return replace(self, gemm=gemm, grouped=grouped, attention=(there * factor, back * factor))


@dataclass(frozen=True)
class Software:
    """A training stack.

    host_us: host time of one kernel launch, framework around it included, in microseconds.
    launches: kernels that a layer's forward pass launches by part; `expert` counts for every local expert
    (a grouped product as many small ones), the backward pass launches twice as many.
    graphed: parts whose launches CUDA graphs take off the host.
    host_sharpness: how well the host hides behind the device, the exponent of the smooth maximum of their
    times. It runs ahead until a layer asks the device something, as dropless experts do in every layer, so
    what it lacks shows in part even where the device is slower. 1: they are one, and their times add up.
    exchange: share of the link that a dispatcher reaches, (inside the fast domain, across the network).
    rack_dispatcher: the one on machines whose fast domain is larger than a node (None: the same).
    overlap: the exchange hides behind computation of another micro-batch (None: where it crosses the network,
    as recipes turn it on); behind_shared: tokens leave for their experts while the shared one computes;
    overlap_cost: by so much the computation slows meanwhile (the multiprocessors that
    communicate); hides: the share of a pass's computation that can hide it: one micro-batch's attention waits
    for another's exchange in a fixed order, and only DeepSeek's kernels share the GPU freely.
    quantize, permute, elementwise, logits: traffic of these steps in multiples of what fused kernels need,
    elementwise in BF16 (with norms in FP32) and in FP32.
    state, framework, overhead: how it keeps training state and activations, and what it takes besides.
    schedules, zero: the pipeline schedules and ZeRO stages that it has.
    """

    name: str
    shares: Mapping[str, Shares]
    host_us: float
    launches: Mapping[str, float]
    exchange: Mapping[str, tuple[float, float]]
    dispatcher: Dispatcher = "two_hop"
    rack_dispatcher: Dispatcher | None = None
    overlap: bool | None = None
    behind_shared: bool = False
    overlap_cost: float = 0.15
    hides: float = 0.6
    graphed: tuple[str, ...] = ()
    host_sharpness: float = 2.0
    quantize: float = 1.0
    permute: float = 1.0
    elementwise: tuple[float, float] = (1.0, 1.0)
    logits: float = 1.0
    state: StateTypes = DEEPSEEK_STATE
    framework: Framework = MEGATRON
    overhead: Overhead = OVERHEAD
    schedules: tuple[str, ...] = ("1f1b", "interleaved")
    zero: tuple[int, ...] = (1, 3)

    def with_(self, **changes: Any) -> Software:
        """A copy with fields replaced; `launches` is merged."""
        if "launches" in changes:
            changes["launches"] = MappingProxyType({**self.launches, **changes["launches"]})
        return replace(self, **changes)

    def on(self, cluster: Cluster) -> Software:
        """This stack as it runs there."""
        if cluster.gpu.architecture == "cpu":
            # No CUDA context, no NCCL; and the device is its own host.
            measured = cluster.gpu.measured
            host = {
                "host_us": CPU_OPERATION_US
                if measured is None
                else measured.operation_us or CPU_OPERATION_US,
                "launches": CPU_LAUNCHES,
                "host_sharpness": 1.0,
            }
            plain = {"elementwise": CPU_ELEMENTWISE, "logits": CPU_LOGITS}
            return replace(self, framework=OWN_CPU, overhead=NO_OVERHEAD, **host, **plain)
        if self.rack_dispatcher is None or cluster.domain <= 8:
            return self
        return replace(self, dispatcher=self.rack_dispatcher)

    def of(self, gpu: Gpu) -> Shares:
        """Shares on this GPU as far as they were measured; else those published."""
        shares = self._published(gpu)
        if gpu.measured is None:
            return shares
        found = fitted_shares(gpu.measured)
        for name in ("gemm", "grouped"):
            found[name] = {**getattr(shares, name), **found.get(name, {})}
        return replace(shares, **found)

    def _published(self, gpu: Gpu) -> Shares:
        """Shares on this GPU, else on its architecture. On others, which no published run tells of, Hopper's
        in proportion to the best measured product (0.80 of the peak there)."""
        if gpu.name in self.shares:
            return self.shares[gpu.name]
        # Cards without NVLink have another chip than the accelerators of their architecture's name.
        if gpu.architecture in self.shares and (gpu.scale_up is not None or gpu.architecture == "cpu"):
            return self.shares[gpu.architecture]
        return self.shares["hopper"].scaled(gpu.reachable.get("bf16", 0.7) / 0.803)


CPU_ELEMENTWISE, CPU_LOGITS = (8.2, 4.6), 3.0
"""Bytes that a training step of v3-mini moves beside products, over what fused kernels would, and those that
the head's loss moves of its logits: on CPUs every operation stands alone. From `bench/elementwise.py`."""
CPU_LAUNCHES: Mapping[str, float] = {
    "attention": 55.0,
    "router": 14.0,
    "shared": 14.0,
    "dispatch": 20.0,
    "experts": 5.0,
    "expert": 0.0,
}
"""A third of the operations of a forward and backward pass, by part; what each expert costs by itself is
in the measured grouped products. From `bench/elementwise.py`."""
CPU_OPERATION_US = 6.0
"""Of one on a core that was not calibrated."""

GRAPHED: Mapping[str, tuple[str, ...]] = {
    "no": (),
    # What routing does not shape: experts see another number of tokens every time.
    "partial": ("attention", "router", "shared", "dispatch"),
    "full": ("attention", "router", "shared", "dispatch", "experts", "expert"),
}

# Fitted together, all rows of `whalepod accuracy` at once and pulled towards what kernels alone measured:
# TE products on B200 reach 0.45 to 0.55 of the BF16 peak, grouped ones a median of 0.30 with small experts,
# attention 0.6 to 0.8 counted in full (SimuMax, configs/system/b200_bf16_ceperm.json); MXFP8 grouped 2,672 of
# 5,000 TFLOP/s (Megatron-LM, deepseek-v3-gb200-optimization); DeepGEMM on H800 up to 0.73 of the FP8 peak,
# grouped 0.65 with thousands of rows (InferSim bench_data/gemm/h800). With eight rows held out of the fit,
# theirs were off by 1.8 % in the median (14.8 % at most).
_BLACKWELL = Shares(
    gemm={"bf16": 0.53, "fp8": 0.43},
    grouped={"bf16": 0.54, "fp8": 0.42},
    attention=(0.46, 0.39),
)
# Its peaks are given as the GB200's; its three published runs are 1.1 to 1.3 times as fast, and it may take
# 1,400 W instead of 1,200.
_GB300 = _BLACKWELL.scaled(1.22)
_HOPPER = Shares(
    gemm={"bf16": 0.70, "fp8": 0.51},
    grouped={"bf16": 0.60, "fp8": 0.46},
    attention=(0.55, 0.45),
)
# A thread of a CPU: torch's products reach most of what the calibration measured with one.
_CPU = Shares(
    gemm={"bf16": 0.8, "fp32": 0.8},
    grouped={"bf16": 0.55, "fp32": 0.55},
    attention=(0.3, 0.3),
    half_k=64.0,
    half_rows=16.0,
)
_SHARES = {"blackwell": _BLACKWELL, "hopper": _HOPPER, "GB300": _GB300, "cpu": _CPU}
_LAUNCHES = {
    "attention": 68.0,
    "router": 17.0,  # 72 unfused, 31 fused, 17 with DeepEP's own preprocessing: counted in the document above
    "shared": 25.0,
    "dispatch": 20.0,
    "experts": 20.0,
    "expert": 7.2,
}
# DeepEP on one H800 node: 153 to 158 of 200 GB/s, across nodes 43 to 58 GB/s, logical (its docs/legacy.md);
# on GB200, for which it was not made, 400 and 190 of 900; HybridEP was. NCCL's all-to-all of B200s: 63 %.
_EXCHANGE = {
    "all-to-all": (0.42, 0.80),
    "two_hop": (0.55, 0.80),
    "deepep": (0.60, 0.88),
    "hybridep": (0.85, 0.88),
}

_MEGATRON = Software(
    "megatron-26.02",
    *(_SHARES, 10.5, _LAUNCHES, _EXCHANGE, "deepep", "hybridep"),
    graphed=GRAPHED["partial"],
)

GENERATIONS: Mapping[str, Software] = {
    software.name: software
    for software in (
        _MEGATRON,
        _MEGATRON.with_(name="megatron-25.11", host_us=12.5, graphed=()),
        _MEGATRON.with_(name="megatron-25.09", host_us=15.5, graphed=(), rack_dispatcher=None),
        # Megatron-Core of 2026 with BF16, NCCL's all-to-all and FP32 moments, as SimuMax ran it.
        _MEGATRON.with_(
            name="simumax", dispatcher="all-to-all", graphed=(), state=MEGATRON_STATE, host_us=11.0
        ),
        # PyTorch-native FSDP2 (NeMo Automodel).
        _MEGATRON.with_(name="automodel", host_us=5.5, graphed=(), rack_dispatcher=None),
        # DeepSeek's own: every exchange behind computation, 20 of 132 multiprocessors for it.
        _MEGATRON.with_(
            name="deepseek",
            host_us=8.0,
            graphed=(),
            overlap=True,
            hides=1.0,
            schedules=("1f1b", "zbv", "dualpipev"),
            zero=(1,),
        ),
        # The same in 2024, of DeepSeek-V2: BF16, zero-bubble pipelines, exchanges behind the shared expert.
        _MEGATRON.with_(
            name="deepseek-2024",
            state=MEGATRON_STATE,
            host_us=15.5,
            graphed=(),
            overlap=False,
            behind_shared=True,
            schedules=("1f1b", "zbv"),
            zero=(1,),
        ),
        # This project's runtime. No GPU has run it: the constants are those of PyTorch-native Automodel.
        _MEGATRON.with_(
            name="whalepod",
            host_us=5.5,
            overlap=False,
            behind_shared=True,
            graphed=(),
            rack_dispatcher=None,
            state=OWN_STATE,
            framework=OWN,
            schedules=("1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"),
            zero=(1, 2, 3),
        ),
    )
}


def _ladder() -> tuple[Software, ...]:
    """The thirteen rungs of one layout on 256 GB200: single optimisations, in the order they were made
    (Megatron-LM, docs/discussions/deepseek-v3-gb200-optimization, section 3)."""
    rungs = [
        _MEGATRON.with_(
            name="ladder",
            dispatcher="all-to-all",
            rack_dispatcher=None,
            graphed=(),
            overlap=False,
            launches={"router": 72.0, "dispatch": 40.0, "expert": 12.6},
            host_us=21.0,
            permute=2.5,
            quantize=2.2,
            exchange={**_EXCHANGE, "deepep": (0.28, 0.88)},
        )
    ]
    for changes in (
        # Scales allocated in one piece, a permute kernel for few of many experts.
        {"launches": {"expert": 10.8}, "permute": 1.0},
        {"launches": {"router": 31.0}},  # router fusion
        {"launches": {"router": 17.0, "dispatch": 20.0}, "dispatcher": "deepep"},
        {},  # no recomputation of MLA's up-projections: the row's own column
        {"graphed": ("attention", "router", "dispatch")},
        {"exchange": {**_EXCHANGE, "deepep": (0.35, 0.88)}},  # DeepEP tuned
        {"host_us": 16.8},  # processes bound to their GPUs' CPUs
        {"launches": {"expert": 7.2}, "quantize": 1.6},  # scales swizzled in one kernel, dependent launch
        {"graphed": GRAPHED["partial"]},  # shared experts too
        {"dispatcher": "hybridep"},
        {"host_us": 15.6},
        {"quantize": 1.3},  # quantisation inside normalisation
    ):
        rungs.append(rungs[-1].with_(**changes))
    return tuple(rungs)


LADDER = _ladder()


def usual_software(gpu: Gpu) -> str:
    """The generation to plan with where none is named: DeepSeek's on the GPU that DeepSeek has, this
    project's on CPUs, else the newest that others can have."""
    return "whalepod" if gpu.architecture == "cpu" else {"H800": "deepseek"}.get(gpu.name, "megatron-26.02")


def load_software(name: str) -> Software:
    """The generation `name`; raises UserError with the nearest one."""
    if name not in GENERATIONS:
        raise UserError(f"unknown software {name!r}{nearest(name, GENERATIONS)}")
    return GENERATIONS[name]


def own_software(optimizer: OptimizerConfig | None = None) -> Software:
    """This project's runtime, with the moments that an optimiser keeps; None: AdamW's in FP32."""
    software, config = load_software("whalepod"), optimizer or OptimizerConfig()
    size = 2 if config.moments == "bf16" else 4
    moments = {"moment1": size, "moment2": size, "muon": config.name == "muon"}
    return replace(software, state=replace(software.state, **moments))
