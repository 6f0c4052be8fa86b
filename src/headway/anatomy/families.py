"""How the layers of known model families are built: one :class:`Pattern` a layer class, names relative to the layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from headway.anatomy.description import Kind, Sublayer

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Pattern:
    """One kind of layer.

    Attributes:
        family: the family's name.
        placement: where its norms sit ("pre", "post", "peri"); "norm_first" reads the layer's own switch, "own" its
            ``placement`` attribute, "parallel" two branches off one stream.
        sublayers: its branches in order, all names relative to the layer.
        embeddings, embedding_norm, final_norm, heads, parameters: names of what stands around the stack, searched for in the
            model as the last parts of a qualified name; the first that exists counts for the norms.
    """

    family: str
    placement: str
    sublayers: tuple[Sublayer, ...]
    embeddings: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    embedding_norm: tuple[str, ...] = ()
    final_norm: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("lm_head", "classifier", "score")


def _attention(function, norm, readers, writer, dropouts=(), output_norm=None, kind: Kind = "attention") -> Sublayer:
    return Sublayer(kind, function, norm, tuple(readers), writer, output_norm, tuple(dropouts))


def _mlp(function, norm, readers, writer, dropouts=(), output_norm=None) -> Sublayer:
    return Sublayer("mlp", function, norm, tuple(readers), writer, output_norm, tuple(dropouts))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")

_LLAMA = Pattern(
    "llama",
    "pre",
    (
        _attention("self_attn", "input_layernorm", _QKV, "self_attn.o_proj"),
        _mlp("mlp", "post_attention_layernorm", _GATED, "mlp.down_proj"),
    ),
    embeddings=("embed_tokens",),
    final_norm=("norm",),
)
_GEMMA2 = replace(
    _LLAMA,
    family="gemma2",
    placement="peri",
    sublayers=(
        _attention("self_attn", "input_layernorm", _QKV, "self_attn.o_proj", (), "post_attention_layernorm"),
        _mlp("mlp", "pre_feedforward_layernorm", _GATED, "mlp.down_proj", (), "post_feedforward_layernorm"),
    ),
)
_GPT2 = Pattern(
    "gpt2",
    "pre",
    (
        _attention("attn", "ln_1", ("attn.c_attn",), "attn.c_proj", ("attn.resid_dropout",)),
        _mlp("mlp", "ln_2", ("mlp.c_fc",), "mlp.c_proj", ("mlp.dropout",)),
    ),
    embeddings=("wte", "wpe"),
    final_norm=("ln_f",),
)
_NEOX = Pattern(
    "gpt_neox",
    "parallel",
    (
        _attention(
            "attention",
            "input_layernorm",
            ("attention.query_key_value",),
            "attention.dense",
            ("post_attention_dropout",),
        ),
        _mlp("mlp", "post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", ("post_mlp_dropout",)),
    ),
    embeddings=("embed_in",),
    final_norm=("final_layer_norm",),
    heads=("embed_out", "lm_head", "classifier", "score"),
)
_BERT = Pattern(
    "bert",
    "post",
    (
        _attention(
            None,
            "attention.output.LayerNorm",
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.output.dense",
            ("attention.output.dropout",),
        ),
        _mlp(None, "output.LayerNorm", ("intermediate.dense",), "output.dense", ("output.dropout",)),
    ),
    embeddings=("word_embeddings", "position_embeddings", "token_type_embeddings"),
    embedding_norm=("embeddings.LayerNorm",),
    heads=("pooler.dense", "cls.predictions.transform.dense", "classifier", "qa_outputs"),
)
_VIT = Pattern(
    "vit",
    "pre",
    (
        _attention(
            "attention",
            "layernorm_before",
            ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attention.o_proj",
            ("dropout",),
        ),
        _mlp("mlp", "layernorm_after", ("mlp.fc1",), "mlp.fc2", ("dropout",)),
    ),
    embeddings=("patch_embeddings.projection",),
    parameters=("cls_token", "position_embeddings"),
    final_norm=("layernorm",),
    heads=("classifier", "pooler.dense"),
)
_TORCH_ENCODER = Pattern(
    "torch.nn",
    "norm_first",
    (
        _attention("self_attn", "norm1", ("self_attn",), "self_attn.out_proj", ("dropout1",)),
        _mlp(None, "norm2", ("linear1",), "linear2", ("dropout2",)),
    ),
    final_norm=("norm",),
    heads=(),
)
_TORCH_DECODER = replace(
    _TORCH_ENCODER,
    sublayers=(
        _TORCH_ENCODER.sublayers[0],
        _attention(
            "multihead_attn",
            "norm2",
            ("multihead_attn",),
            "multihead_attn.out_proj",
            ("dropout2",),
            kind="cross_attention",
        ),
        _mlp(None, "norm3", ("linear1",), "linear2", ("dropout3",)),
    ),
)
_OURS = Pattern(
    "headway",
    "own",
    (
        _attention(
            "attention", "attention_norm", ("attention.qkv",), "attention.out", ("drop",), "attention_output_norm"
        ),
        _mlp("mlp", "mlp_norm", ("mlp.up",), "mlp.down", ("drop",), "mlp_output_norm"),
    ),
    embeddings=("embedding", "position"),
    final_norm=("norm",),
    heads=("head",),
)

# the class of a layer decides: families differ in what their forward does, not only in names
PATTERNS: dict[str, Pattern] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": replace(_LLAMA, family="mistral"),
    "Qwen2DecoderLayer": replace(_LLAMA, family="qwen2"),
    "Qwen3DecoderLayer": replace(_LLAMA, family="qwen3"),
    "Gemma2DecoderLayer": _GEMMA2,
    "GPT2Block": _GPT2,
    "GPTNeoXLayer": _NEOX,
    "BertLayer": _BERT,
    "RobertaLayer": replace(_BERT, family="roberta"),
    "ViTLayer": _VIT,
    "TransformerEncoderLayer": _TORCH_ENCODER,
    "TransformerDecoderLayer": _TORCH_DECODER,
    "TransformerBlock": _OURS,
}


def pattern_of(module: nn.Module) -> Pattern | None:
    """The pattern of a layer, by its class or the nearest class it derives from; None for what is no known layer."""
    for kind in type(module).__mro__:
        if kind.__name__ in PATTERNS:
            return PATTERNS[kind.__name__]
    return None


def placement_of(module: nn.Module, pattern: Pattern) -> str:
    """Where the norms of this very layer sit."""
    own = getattr(module, "placement", None)
    if isinstance(own, str):
        return own
    if pattern.placement == "norm_first":
        return "pre" if getattr(module, "norm_first", False) else "post"
    if pattern.placement == "parallel":
        return "parallel" if getattr(module, "use_parallel_residual", True) else "pre"
    return pattern.placement
