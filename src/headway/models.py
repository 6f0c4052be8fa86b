"""Models named on the command line: ``pkg.module:factory`` or a local Hugging Face folder, and a batch to go with them."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_model(name: str) -> tuple[nn.Module, Any]:
    """The model behind ``name`` and a batch for it (None where a factory gives only a model).

    A factory returns a model, or a model and a batch. A folder must hold ``config.json``; weights are loaded where there are
    safetensors, and started at random otherwise.

    Raises:
        ValueError: the name is neither, or the factory fails or returns something else.
    """
    if Path(name).is_dir():
        return _from_folder(Path(name))
    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise ValueError(
            f"{name!r} is neither a folder nor pkg.module:factory; e.g. headway probe mypackage.models:build"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # whatever the module does while it is imported
        raise ValueError(f"{name!r} could not be imported: {error}") from error
    if not callable(factory):
        raise ValueError(f"{name} is no function but {type(factory).__name__}; name one that returns a torch.nn.Module")
    try:
        made = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise ValueError(f"{name}() raised {type(error).__name__}: {error}") from error
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} must return a torch.nn.Module, or (module, batch); it returned {type(made).__name__}")
    return model, batch


def _from_folder(folder: Path) -> tuple[nn.Module, Any]:
    import transformers

    from headway.checkpoints import load_pretrained

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; a Hugging Face folder or pkg.module:factory was expected")
    if any(folder.glob("*.safetensors")):
        model = load_pretrained(folder)
    else:
        config: Any = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        model = kind(config) if config.architectures else transformers.AutoModel.from_config(config)
    return model, made_up_batch(model)


def made_up_batch(model: nn.Module, samples: int = 8, length: int = 32) -> Any:
    """Random input of the kind a Hugging Face model takes, with labels where it learns a language."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if getattr(model, "main_input_name", "") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(samples, config.num_channels, size, size, generator=generator)}
    longest = getattr(config, "max_position_embeddings", length) or length
    ids = torch.randint(0, config.vocab_size, (samples, min(length, longest)), generator=generator)
    batch = {"input_ids": ids}
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")):
        batch["labels"] = ids
    elif getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch
