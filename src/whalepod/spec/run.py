"""RunConfig: one YAML file for one job. Unknown keys are errors, with the nearest known name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from whalepod.spec.errors import UserError, nearest
from whalepod.spec.layout import Layout, Recompute
from whalepod.spec.model import ModelSpec, shown
from whalepod.spec.presets import load_model_spec
from whalepod.spec.yaml_text import parse_yaml

DEFAULT_MODEL = "v3-mini"
_MAX_CHARS = 2**20


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_BATCHES = {"micro_batch": 8, "global_batch": 16}  # of a run that names none
_LAYOUT_TYPES = get_type_hints(Layout)
_LAYOUT_FIELDS: dict[str, Any] = {
    f.name: (_LAYOUT_TYPES[f.name], _BATCHES.get(f.name, f.default)) for f in fields(Layout)
}


class LayoutConfig(create_model("_LayoutFields", __base__=_Section, **_LAYOUT_FIELDS)):
    """The fields of `Layout`; see there. micro_batch and recompute may be `auto`: `whalepod train` tries
    which is fastest within the memory."""

    micro_batch: int | Literal["auto"] = _BATCHES["micro_batch"]
    recompute: Recompute | Literal["auto"] = "none"


class DataConfig(_Section):
    """Where text comes from and how it is cut.

    source: `stdlib` (Python's own library), a file, folder or glob, `.jsonl`, or `hf:NAME[:SPLIT]`.
    tokenizer: null trains a byte-level BPE of the model's vocabulary on the text; else a file.
    chat: the source is a .jsonl file of conversations, written down by the tokenizer's own template; only the
    assistant's turns are learnt (`text/chat.py`).
    document_mask: tokens do not see other documents packed into their sequence (DeepSeek-V3 let them).
    fim_rate: share of documents rearranged as prefix, suffix, middle (V3, section 4.1: 0.1).
    """

    source: str = "stdlib"
    tokenizer: str | None = None
    sequence_length: int = Field(default=512, ge=1)
    validation_fraction: float = Field(default=0.02, ge=0.0, lt=1.0)
    max_mib: float | None = Field(default=None, gt=0)
    chat: bool = False
    document_mask: bool = False
    fim_rate: float = Field(default=0.0, ge=0, le=1)


Moments = Literal["fp32", "bf16"]


class FP8Config(_Section):
    """How `layout.precision: fp8` rounds (V3, section 3.3.2).

    scales: powers of two (`ue8m0`, as V3.1 was trained) or any `float32`. gradients: in `tiles` of 1 x 128
    for the gradient of a layer's input, or in `blocks` of 128 x 128, with which the report's model diverged.
    """

    scales: Literal["ue8m0", "float32"] = "ue8m0"
    gradients: Literal["tiles", "blocks"] = "tiles"


class OptimizerConfig(_Section):
    """AdamW as in DeepSeek-V3 (section 4.2), or Muon with AdamW for what is no matrix (V4); weight decay on
    matrices only. moments: how they are stored (V3, section 3.3.2: in BF16); they are computed in FP32.
    momentum: Muon's."""

    name: Literal["adamw", "muon"] = "adamw"

    learning_rate: float = Field(default=1e-3, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    moments: Moments = "fp32"
    momentum: float = Field(default=0.95, ge=0, lt=1)


class ScheduleConfig(_Section):
    """What changes along a run. Ends of phases are shares of the run's tokens; those of DeepSeek-V3 (section
    4.2) are the defaults: 469B, 10T, 14.3T and 14.633T of 14.8T.

    shape: of the learning rate after `warmup_steps`. `v3`: constant, cosine to `final_fraction` of the peak
    between `constant_until` and `decay_until`, constant, `last_fraction` from `last_from` on. `v2`: times
    0.316 at 60 % and again at 90 %. `cosine`: to `final_fraction` over the whole run.
    batch_start: sequences of the first steps (V3: a fifth); the batch grows to layout.global_batch until
    `batch_until`. null: it is constant.
    """

    shape: Literal["v3", "v2", "cosine"] = "v3"
    warmup_steps: int = Field(default=20, ge=0)
    constant_until: float = Field(default=0.676, ge=0, le=1)
    decay_until: float = Field(default=0.966, ge=0, le=1)
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    last_from: float = Field(default=0.9887, ge=0, le=1)
    last_fraction: float = Field(default=0.0332, gt=0, le=1)
    batch_start: int | None = Field(default=None, ge=1)
    batch_until: float = Field(default=0.0317, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> ScheduleConfig:
        if self.decay_until < self.constant_until:
            raise ValueError("decay_until must not be below constant_until")
        return self


class LossConfig(_Section):
    """MTP weight lambda, bias update speed gamma, sequence-wise balance alpha, and the shares of the run's
    tokens at which lambda falls and gamma becomes 0 (V3, section 4.2: 10T and 14.3T of 14.8T)."""

    mtp_weight: float = Field(default=0.3, ge=0)
    mtp_weight_late: float = Field(default=0.1, ge=0)
    mtp_late_from: float = Field(default=0.676, ge=0, le=1)
    bias_update_speed: float = Field(default=1e-3, ge=0)
    bias_until: float = Field(default=0.966, ge=0, le=1)
    sequence_balance: float = Field(default=1e-4, ge=0)


class TrainConfig(_Section):
    """Length of the run and what happens along it. memory_gib: what `auto` may use of each device; null is
    what is free of a GPU's, or this process's share of the machine's. start_from: a Hugging Face folder whose
    weights the run begins with (fine-tuning); its model and its tokenizer are then the defaults.

    checkpoint_every: steps between checkpoints (0: only at the end). keep_checkpoints: how many of the newest
    stay; keep_checkpoint_every: and those of every so many steps (0: none). checkpoint_async: written while
    training goes on, from a copy in the host's memory.
    max_restarts: how often local workers are started again when one dies (torchrun has its own
    --max-restarts). hang_after_s: how long no rank may move before the job ends with a report. max_skipped:
    steps in a row with NaN or infinite gradients that end the run."""

    steps: int = Field(default=200, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    evaluate_every: int = Field(default=50, ge=0)
    evaluate_sequences: int = Field(default=32, ge=1)
    checkpoint_every: int = Field(default=100, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    keep_checkpoint_every: int = Field(default=0, ge=0)
    checkpoint_async: bool = True
    max_restarts: int = Field(default=3, ge=0)
    hang_after_s: float = Field(default=600.0, gt=0)
    max_skipped: int = Field(default=10, ge=1)
    memory_gib: float | None = Field(default=None, gt=0)
    start_from: str | None = None


class LoRAConfig(_Section):
    """Low-rank adapters on frozen weights (`models/lora.py`). r: their rank; 0 trains the weights themselves.
    alpha: an adapter's output counts alpha / r. modules: names of the linear layers that get one, such as
    q_b_proj or the gate_proj of dense layers and shared experts; null is all of attention, and of a model
    without experts the MLPs too."""

    r: int = Field(default=0, ge=0, le=2**16)
    alpha: float = Field(default=32.0, gt=0)
    modules: tuple[str, ...] | None = None


class ServeConfig(_Section):
    """A deployment, for `whalepod launch`: workers in the planner's words, `TP8 DPattn1 moeTP1 EP8` or
    `P 1x(TP1 DPattn8 moeTP1 EP8) + D 2x(...)`, and what they were planned for. concurrency: requests in
    flight, each of `isl` tokens of prompt and `osl` of answer. drafts: tokens that MTP guesses a step."""

    layout: str
    engine: str = "sglang"
    precision: Literal["bf16", "fp8", "fp4"] = "bf16"
    isl: int = Field(default=4096, ge=1)
    osl: int = Field(default=1024, ge=1)
    concurrency: float = Field(default=1.0, ge=1)
    drafts: int = Field(default=0, ge=0, le=8)


class RunConfig(_Section):
    """A whole job: what `run.yaml` holds. `model` is a preset's name, a path, or a mapping with
    `preset` and the fields to change. gpus, gpus_per_node: what it was planned for, as `whalepod plan` takes
    them. A job with `serve` is a deployment: the other sections have no effect on it."""

    model: str | dict[str, Any] = DEFAULT_MODEL
    gpus: str | None = None
    gpus_per_node: int | None = Field(default=None, ge=1)
    serve: ServeConfig | None = None
    layout: LayoutConfig = Field(default_factory=LayoutConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    fp8: FP8Config = Field(default_factory=FP8Config)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    lora: LoRAConfig = Field(default_factory=LoRAConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads_per_worker: int | None = Field(default=None, ge=1)
    out: str = "runs/default"

    @model_validator(mode="before")
    @classmethod
    def _model_of_the_weights(cls, values: Any) -> Any:
        train = values.get("train") if isinstance(values, dict) else None
        start = train.get("start_from") if isinstance(train, dict) else None
        return {"model": start, **values} if isinstance(start, str) else values

    def model_spec(self) -> ModelSpec:
        if isinstance(self.model, str):
            return load_model_spec(self.model)
        changes = dict(self.model)
        base = changes.pop("preset", None)
        if not isinstance(base, str):
            raise UserError("model: a mapping needs `preset`, a preset's name or a path")
        try:
            return load_model_spec(base).with_(**changes)
        except TypeError as error:
            raise UserError(f"model: {error}") from None

    @property
    def is_open(self) -> bool:
        """Whether the layout leaves something to be tried."""
        return "auto" in (self.layout.micro_batch, self.layout.recompute)

    def with_layout(self, **changes: Any) -> RunConfig:
        """The same job with fields of the layout replaced."""
        return self.model_copy(update={"layout": self.layout.model_copy(update=changes)})

    def make_layout(self) -> Layout:
        """Raises UserError while it is open, and for a deployment."""
        if self.serve is not None:
            raise UserError("this job is a deployment (`serve`): it is for `whalepod launch`")
        if self.is_open:
            raise UserError(
                "layout.micro_batch and layout.recompute are `auto` for `whalepod train` only, which tries "
                "them: name them here"
            )
        return Layout(**self.layout.model_dump())


def load_run(path: Path | str | None, overrides: Iterable[str] = ()) -> RunConfig:
    """RunConfig of a YAML file (None: all defaults) with `section.key=value` overrides applied.

    Raises UserError with one line that names the key.
    """
    values: Any = {}
    if path is not None:
        try:
            with Path(path).open(encoding="utf-8") as file:
                text = file.read(_MAX_CHARS + 1)
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
            raise UserError(f"cannot read {shown(str(path))}: {error}") from None
        if len(text) > _MAX_CHARS:
            raise UserError(f"{path} is larger than a run may be ({_MAX_CHARS} characters)")
        values = parse_yaml(text, str(path))
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise UserError(f"{path} must hold a mapping of sections, not {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return make_run(values, where=str(path) if path is not None else "run")


def make_run(values: dict[str, Any], where: str = "run") -> RunConfig:
    """RunConfig of a mapping; the layout and the model are checked too."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    closed = {"micro_batch": 1, "recompute": "none"}
    Layout(
        **config.layout.model_dump()
        | {k: v for k, v in closed.items() if getattr(config.layout, k) == "auto"}
    )
    return config


def dump_run(config: RunConfig) -> str:
    """YAML that `load_run` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"{shown(override)} is not of the form section.key=value")
    *sections, last = key.split(".")
    place = values
    for section in sections:
        inner: Any = place.setdefault(section, DEFAULT_MODEL if section == "model" else {})
        if section == "model" and isinstance(inner, str):
            inner = place[section] = {"preset": inner}
        if not isinstance(inner, dict):
            raise UserError(f"{shown(key)}: {shown(section)} holds a value, not a section")
        place = inner
    place[last] = parse_yaml(text, f"value of {shown(key)}")


_OPEN = {
    "micro_batch": "a whole number or 'auto'",
    "recompute": "'none', 'selective', 'full' or 'auto'",
}


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if path and path[0] == "model":
        return f"model must be a name, a path, or a mapping with `preset`, not {shown(first['input'])}"
    if first["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return f"unknown key {shown('.'.join(path))}{nearest(path[-1][:100], section.model_fields)}"
    if first["type"] == "model_type":
        return f"{'.'.join(path)} must be a section with keys of its own, not {shown(first['input'])}"
    if (
        path[:1] == ["layout"] and len(path) > 2 and path[1] in _OPEN
    ):  # of several types, which pydantic lists
        return f"layout.{path[1]}: input should be {_OPEN[path[1]]}, not {shown(first['input'])}"
    message = first["msg"].removeprefix("Value error, ")
    place = f"{'.'.join(path)}: " if path else ""  # none: a key that is no Unicode
    return f"{place}{message[0].lower() + message[1:]}, not {shown(first['input'])}"
