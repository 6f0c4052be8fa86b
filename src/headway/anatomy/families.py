"""Which layer class is built after which pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from headway.anatomy.decoders import GEMMA2, GPT2, GPTJ, LLAMA, NEOX, OLMO2, OPT, PHI, PHI3
from headway.anatomy.encoders import BERT, CLIP, T5, TIMM_VIT, VIT, WHISPER
from headway.anatomy.pattern import Pattern, attention, cross, mlp

_TORCH_ENCODER = Pattern(
    "torch.nn",
    "norm_first",
    (
        attention("self_attn", "norm1", ("self_attn",), "self_attn.out_proj", ("dropout1",)),
        mlp(None, "norm2", ("linear1",), "linear2", ("dropout2",)),
    ),
    final_norm=("norm",),
    heads=(),
)
_TORCH_DECODER = replace(
    _TORCH_ENCODER,
    sublayers=(
        _TORCH_ENCODER.sublayers[0],
        cross(
            "multihead_attn",
            "norm2",
            ("multihead_attn",),
            ("multihead_attn",),
            "multihead_attn.out_proj",
            ("dropout2",),
        ),
        mlp(None, "norm3", ("linear1",), "linear2", ("dropout3",)),
    ),
)
_OURS = Pattern(
    "headway",
    "own",
    (
        attention(
            "attention", "attention_norm", ("attention.qkv",), "attention.out", ("drop",), "attention_output_norm"
        ),
        mlp("mlp", "mlp_norm", ("mlp.up",), "mlp.down", ("drop",), "mlp_output_norm"),
    ),
    embeddings=("embedding", "position"),
    final_norm=("norm",),
    heads=("head",),
)

# the class of a layer decides: families differ in what their forward does, not only in names
PATTERNS: dict[str, Pattern] = {
    "LlamaDecoderLayer": LLAMA,
    "MistralDecoderLayer": replace(LLAMA, family="mistral"),
    "Qwen2DecoderLayer": replace(LLAMA, family="qwen2"),
    "Qwen3DecoderLayer": replace(LLAMA, family="qwen3"),
    "GemmaDecoderLayer": replace(LLAMA, family="gemma"),
    "Gemma2DecoderLayer": GEMMA2,
    "Gemma3DecoderLayer": replace(GEMMA2, family="gemma3"),
    "Olmo2DecoderLayer": OLMO2,
    "Phi3DecoderLayer": PHI3,
    "PhiDecoderLayer": PHI,
    "OPTDecoderLayer": OPT,
    "GPT2Block": GPT2,
    "GPTJBlock": GPTJ,
    "GPTNeoXLayer": NEOX,
    "BertLayer": BERT,
    "RobertaLayer": replace(BERT, family="roberta"),
    "ViTLayer": VIT,
    "Block": TIMM_VIT,
    "CLIPEncoderLayer": CLIP,
    "T5Block": T5,
    "WhisperEncoderLayer": WHISPER,
    "WhisperDecoderLayer": WHISPER,
    "TransformerEncoderLayer": _TORCH_ENCODER,
    "TransformerDecoderLayer": _TORCH_DECODER,
    "TransformerBlock": _OURS,
}


def pattern_of(module: nn.Module) -> Pattern | None:
    """The pattern of a layer, by its class or the nearest class it derives from; None for what is no known layer."""
    for kind in type(module).__mro__:
        pattern = PATTERNS.get(kind.__name__)
        if pattern is not None:
            return pattern if _fits(module, pattern) else None
    return None


def _fits(module: nn.Module, pattern: Pattern) -> bool:
    """Whether a layer is built as its class name promises: other projects call their layers Block or TransformerBlock too."""
    if pattern.parts is not None and {*module._modules, *module._parameters} - {*pattern.parts}:
        return False
    there = {part.kind for part in pattern.sublayers if has(module, part.writer)}
    return there >= {part.kind for part in pattern.sublayers} - {"cross_attention"}


def has(module: nn.Module, name: str) -> bool:
    """Whether a module of this relative name stands inside ``module``."""
    inner: Any = module
    for part in name.split("."):
        inner = inner._modules.get(part)
        if inner is None:
            return False
    return True


def placement_of(module: nn.Module, pattern: Pattern) -> str:
    """Where the norms of this very layer sit."""
    own = getattr(module, "placement", None)
    if isinstance(own, str):
        return own
    if pattern.placement in ("norm_first", "do_layer_norm_before"):
        return "pre" if getattr(module, pattern.placement, False) else "post"
    if pattern.placement == "parallel":
        return "parallel" if getattr(module, "use_parallel_residual", True) else "pre"
    return pattern.placement
