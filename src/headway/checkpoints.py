"""Changed Hugging Face models on disk: the techniques are written into ``config.json`` and applied again when loading."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from headway.surgery import Edit, SetAttribute, Technique, apply


def record(model: nn.Module, technique: Technique) -> list[Edit]:
    """The edit that notes ``technique`` in a Hugging Face model's configuration; no edit for any other model."""
    config = getattr(model, "config", None)
    if not (hasattr(config, "to_dict") and hasattr(config, "save_pretrained")):
        return []
    kind = type(technique)
    entry = {"technique": f"{kind.__module__}:{kind.__qualname__}", "settings": _settings(technique)}
    return [SetAttribute(config, "headway", [*getattr(config, "headway", []), entry], name="config.headway")]


def _settings(technique: Technique) -> dict[str, Any]:
    return {f.name: getattr(technique, f.name) for f in fields(technique) if f.init}  # type: ignore[arg-type]


def load_pretrained(folder: str | Path, model_class: type | None = None) -> nn.Module:
    """Loads a folder written by ``model.save_pretrained`` of a model that headway has changed.

    Builds the model from its configuration, applies the recorded techniques, then loads the weights, in evaluation mode.

    Args:
        folder: a local folder with ``config.json`` and safetensors weights.
        model_class: a transformers class; the one named in the configuration by default.

    Raises:
        FileNotFoundError: the folder lacks a configuration or weights.
        ValueError: the weights do not fit the changed model.
    """
    import transformers
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give the folder that save_pretrained wrote")
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    entries = getattr(config, "headway", [])
    config.headway = []
    name = (config.architectures or ["AutoModel"])[0]
    kind: Any = getattr(transformers, name) if model_class is None else model_class
    model = kind(config)
    for entry in entries:
        apply(model, _technique(entry))
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    state: dict[str, Any] = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}; headway loads safetensors weights")
        state.update(load_file(folder / file))
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    lost = [name for name in missing if id(dict(model.named_parameters(remove_duplicate=False)).get(name)) not in tied]
    if lost or unexpected:
        raise ValueError(
            f"the weights in {folder} do not fit: missing {', '.join(lost) or 'none'}, unexpected {', '.join(unexpected) or 'none'}"
        )
    return model.eval()


def _technique(entry: dict[str, Any]) -> Technique:
    import importlib

    module, _, name = entry["technique"].partition(":")
    if not module.startswith("headway."):
        raise ValueError(f"the configuration names {entry['technique']!r}, which is not one of headway's techniques")
    kind = getattr(importlib.import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, Technique)):
        raise ValueError(f"the configuration names {entry['technique']!r}, which is not a technique")
    return kind(**entry["settings"])
