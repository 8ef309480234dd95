"""The family by name: `preset("deepseek-v3")`. The data and their sources are in `data/models.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from whalepod.spec.errors import UserError, nearest
from whalepod.spec.model import ModelSpec, from_config, read_config, shown

_DATA = Path(__file__).parent / "data" / "models.yaml"
_HUB_ORGANISATION = "deepseek-ai"
_TUNINGS = ("-base", "-chat", "-instruct")


@dataclass(frozen=True)
class Preset:
    """One model of the family.

    `status`: `full` (counted, and a torch model exists), `counts` (counted only), `facts` (published figures
    only: `spec` is None, `figures` holds parameters, and `config` what the KV formula needs).
    `licence` begins with the licence's name; details follow in brackets.
    """

    name: str
    family: str
    status: str
    architecture: str
    licence: str
    sources: str
    confidence: str
    spec: ModelSpec | None
    published_total: str | None = None
    published_active: str | None = None
    aliases: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    figures: Mapping[str, Any] = field(default_factory=dict, hash=False)


def preset_names() -> list[str]:
    """Names of all presets, in the order of the family's history; our own small models last."""
    return list(_entries())


def preset(name: str) -> Preset:
    """The preset `name`, in any case, with or without `deepseek-`, or a hub name `deepseek-ai/DeepSeek-V3`.

    Raises UserError with the nearest name when there is none.
    """
    found = _find(name)
    if found is None:
        wanted = name.strip().lower().removeprefix(f"{_HUB_ORGANISATION}/")
        raise UserError(f"unknown model {shown(name)}{nearest(wanted[:100], preset_names())}")
    return _preset(found)


def load_model_spec(name_or_path: str | Path) -> ModelSpec:
    """ModelSpec of a preset's name, of a checkpoint folder, or of a `config.json`; see `load_preset`.

    Raises UserError when there is no such model, or when only its published figures are known.
    """
    found = load_preset(name_or_path)
    if found.spec is None:
        raise UserError(
            f"{found.name} is known by its published figures only, there is no {found.architecture} "
            f"here yet; see: whalepod models {found.name}"
        )
    return found.spec


def load_preset(name_or_path: str | Path) -> Preset:
    """The preset of a name, or one made of a checkpoint folder or a `config.json` on disk.

    What exists on disk wins over a preset; a folder without `config.json` does not count as a model.
    """
    text = str(name_or_path)
    if not text.strip():
        raise UserError("model name is empty (give a preset's name or a folder with config.json)")
    path = Path(text)
    is_model = is_folder = False
    # Text that cannot be a path (a NUL, too long) is not on disk; the messages below then say what it is not.
    with suppress(OSError, ValueError):
        is_model = path.is_file() or path.is_fifo() or (path / "config.json").is_file()
        is_folder = path.is_dir()
    if is_model:
        return _from_disk(path)
    hub = text.lower().startswith(f"{_HUB_ORGANISATION}/")
    separated = "/" in text or "\\" in text
    like_path = isinstance(name_or_path, Path) or separated or text.lower().endswith(".json")
    if _find(text) is None and not hub and (like_path or is_folder):
        if is_folder:
            raise UserError(f"no config.json in folder {shown(text)}")
        raise UserError(f"no model at {shown(text)}: neither a file nor a folder with config.json")
    return preset(text)


def _from_disk(path: Path) -> Preset:
    spec = read_config(path)
    return Preset(
        name=spec.name,
        family="dense" if spec.moe is None else "moe",
        status="counts" if spec.indexer else "full",
        architecture=spec.architecture,
        licence="not known",
        sources=str(path),
        confidence="as read",
        spec=spec,
    )


def _find(name: str) -> str | None:
    """The preset's own name for any accepted spelling, or None."""
    names = _names()
    wanted = name.strip().lower().removeprefix(f"{_HUB_ORGANISATION}/")
    for tuning in ("", *_TUNINGS):
        stem = wanted.removesuffix(tuning)
        for spelling in (stem, f"deepseek-{stem}"):
            if spelling in names:
                return names[spelling]
    return None


@cache
def _names() -> dict[str, str]:
    """Accepted spelling to name, without case, organisation and tuning."""
    names = {name: name for name in _entries()}
    for name, entry in _entries().items():
        names |= dict.fromkeys(entry.get("aliases", ()), name)
    return names


@cache
def _preset(name: str) -> Preset:
    entry = dict(_entries()[name])
    config = entry.pop("config")
    figures = entry.pop("figures", {})
    facts = entry["status"] == "facts"
    return Preset(
        name=name,
        architecture=config["architectures"][0],
        spec=None if facts else from_config(config, name),
        aliases=tuple(entry.pop("aliases", ())),
        config=config,
        figures=figures,
        **entry,
    )


@cache
def _entries() -> dict[str, dict[str, Any]]:
    # Read on first use: importing this module costs nothing, and the C loader reads the file in milliseconds.
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with _DATA.open(encoding="utf-8") as file:
        return yaml.load(file, loader)["models"]
