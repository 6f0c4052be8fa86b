"""Changed Hugging Face models on disk, transformers' or diffusers': the techniques are written into ``config.json`` and applied again
when loading."""

from __future__ import annotations

import glob
import json
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headway.surgery import Edit, Replace, SetAttribute, Site, Technique, apply


def record(model: nn.Module, technique: Technique, sites: Sequence[Site] | None = None) -> list[Edit]:
    """The edit that notes ``technique`` in a Hugging Face model's configuration; no edit for any other model.

    ``sites`` are the modules the user allowed to change; where they are not all of the model's, their names are noted too.
    """
    return _noted(
        model,
        type(technique),
        _settings(technique),
        None if sites is None or not _saves(model) else _where(model, sites),
    )


def record_layer(model: nn.Module, technique: Replace, names: Sequence[str]) -> list[Edit]:
    """The edit that notes which modules were replaced by one of headway's layers; none for a layer of the user's own, which
    could not be found again, or for settings that JSON cannot hold."""
    layer = technique.layer
    try:
        json.dumps(dict(technique.given))
    except TypeError:
        return []
    if not names or not layer.__module__.startswith("headway."):
        return []
    settings = {"layer": _path(layer), **technique.given}
    return _noted(model, type(technique), settings, [glob.escape(name) for name in names])


def _saves(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return _frozen(model) is not None or (hasattr(config, "to_dict") and hasattr(config, "save_pretrained"))


def _frozen(model: nn.Module) -> Any:
    """The configuration of a model of diffusers, a frozen dictionary; None for any other model."""
    return getattr(model, "_internal_dict", None) if hasattr(model, "register_to_config") else None


def _noted(model: nn.Module, kind: type, settings: dict[str, Any], where: list[str] | None) -> list[Edit]:
    if not _saves(model):
        return []
    entry: dict[str, Any] = {"technique": _path(kind), "settings": settings}
    if where is not None:
        entry["where"] = where
    if (frozen := _frozen(model)) is not None:
        noted = type(frozen)({**frozen, "headway": [*frozen.get("headway", []), entry]})
        return [_InFrozenConfig(model, "_internal_dict", noted, name="config.headway")]
    config: Any = model.config
    return [SetAttribute(config, "headway", [*getattr(config, "headway", []), entry], name="config.headway")]


class _InFrozenConfig(SetAttribute):
    """The whole configuration anew; the plan shows what is new in it."""

    def describe(self) -> tuple[str, str]:
        before, after = (f"headway = {config.get('headway', 'not set')!r}" for config in (self.before, self.value))  # type: ignore[attr-defined]
        return before, after


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _where(model: nn.Module, sites: Sequence[Site]) -> list[str] | None:
    """Globs that name exactly ``sites``, with one for each whole branch of the model; None where they are all of it."""
    allowed = {id(site.module) for site in sites}
    found: list[str] = []
    whole = ""
    for name, module in model.named_modules():
        if whole and name.startswith(whole + "."):
            continue
        if id(module) not in allowed:
            continue
        found.append(glob.escape(name))
        if all(id(inner) in allowed for inner in module.modules()):
            if module is model:
                return None
            whole = name
            if any(True for _ in module.children()):
                found.append(glob.escape(name) + ".*")
    return found


def _settings(technique: Technique) -> dict[str, Any]:
    return {f.name: getattr(technique, f.name) for f in fields(technique) if f.init}  # type: ignore[arg-type]


def load_pretrained(folder: str | Path, model_class: type | None = None) -> nn.Module:
    """Loads a folder written by ``model.save_pretrained`` of a model that headway has changed.

    Builds the model from its configuration, applies the recorded techniques, then loads the weights, in evaluation mode.

    Args:
        folder: a local folder with ``config.json`` and safetensors weights.
        model_class: a class of transformers or diffusers; the one named in the configuration by default.

    Raises:
        FileNotFoundError: the folder lacks a configuration or weights.
        ValueError: the weights do not fit the changed model.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give the folder that save_pretrained wrote")
    build = _diffusers_model if "_diffusers_version" in json.loads((folder / "config.json").read_text()) else _model
    model, entries, weights = build(folder, model_class)
    with warnings.catch_warnings():
        # what a technique says of the weights it finds was said when it was applied; these are replaced at once
        warnings.simplefilter("ignore", UserWarning)
        for entry in entries:
            apply(model, _technique(entry).for_loading(), where=entry.get("where"))
    index = folder / f"{weights}.safetensors.index.json"
    single = [f"{weights}.safetensors"]
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else single
    state: dict[str, Any] = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}; headway loads safetensors weights")
        state.update(load_file(folder / file))
    names = _names_on_disk(model)
    state = {names.get(key, key): tensor for key, tensor in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    lost = [name for name in missing if id(dict(model.named_parameters(remove_duplicate=False)).get(name)) not in tied]
    if lost or unexpected:
        raise ValueError(
            f"the weights in {folder} do not fit: missing {', '.join(lost) or 'none'}, unexpected {', '.join(unexpected) or 'none'}"
        )
    return model.eval()


def _model(folder: Path, model_class: Any) -> tuple[nn.Module, list[dict[str, Any]], str]:
    """A fresh model of transformers, what was recorded in its configuration, and the stem of its weights' files."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    entries = getattr(config, "headway", [])
    config.headway = []
    name = (config.architectures or ["AutoModel"])[0]
    kind: Any = getattr(transformers, name) if model_class is None else model_class
    return kind(config), entries, "model"


def _diffusers_model(folder: Path, model_class: Any) -> tuple[nn.Module, list[dict[str, Any]], str]:
    """The same for a model of diffusers."""
    config = json.loads((folder / "config.json").read_text())
    entries = config.pop("headway", [])
    if model_class is None:
        import diffusers  # type: ignore[import-not-found]

        model_class = getattr(diffusers, config["_class_name"])
    return model_class.from_config(config), entries, "diffusion_pytorch_model"


def _names_on_disk(model: nn.Module) -> dict[str, str]:
    """Name in a saved file -> name in the model, for what transformers saves under the names of an earlier version (ViT, GPT-NeoX)."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions of transformers that rename nothing
        return {}
    keys = list(model.state_dict())
    numbered: dict[str, Any] = {key: torch.tensor(i) for i, key in enumerate(keys)}
    try:
        saved = revert_weight_conversion(model, numbered)  # type: ignore[arg-type]
    except Exception:  # a family whose tensors are merged or split as well cannot be told by names
        return {}
    return {name: keys[int(number)] for name, number in saved.items() if number.dim() == 0}


def _technique(entry: dict[str, Any]) -> Technique:
    kind, settings = _found(entry["technique"]), dict(entry["settings"])
    if not issubclass(kind, Technique):
        raise ValueError(f"the configuration names {entry['technique']!r}, which is not a technique")
    if kind is Replace:
        layer = _found(settings.pop("layer"))
        if not issubclass(layer, nn.Module):
            raise ValueError(f"the configuration names {entry['settings']['layer']!r}, which is not a layer")
        return Replace(layer, **settings)
    return kind(**settings)


def _found(path: str) -> type:
    import importlib

    module, _, name = path.partition(":")
    if not module.startswith("headway."):
        raise ValueError(f"the configuration names {path!r}, which is not one of headway's techniques")
    kind = getattr(importlib.import_module(module), name)
    if not isinstance(kind, type):
        raise ValueError(f"the configuration names {path!r}, which is not a class")
    return kind
