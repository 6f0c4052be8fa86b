"""Layers of decoder-only language models."""

from __future__ import annotations

from dataclasses import replace

from headway.anatomy.pattern import Pattern, attention, cross, mlp

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")

LLAMA = Pattern(
    "llama",
    "pre",
    (
        attention("self_attn", "input_layernorm", QKV, "self_attn.o_proj"),
        mlp("mlp", "post_attention_layernorm", _GATED, "mlp.down_proj"),
    ),
    embeddings=("embed_tokens",),
    final_norm=("norm",),
)
GEMMA2 = replace(
    LLAMA,
    family="gemma2",
    placement="peri",
    sublayers=(
        attention("self_attn", "input_layernorm", QKV, "self_attn.o_proj", (), "post_attention_layernorm"),
        mlp("mlp", "pre_feedforward_layernorm", _GATED, "mlp.down_proj", (), "post_feedforward_layernorm"),
    ),
)
GPT2 = Pattern(
    "gpt2",
    "pre",
    (
        attention("attn", "ln_1", ("attn.c_attn",), "attn.c_proj", ("attn.resid_dropout",)),
        cross(
            "crossattention",
            "ln_cross_attn",
            ("crossattention.q_attn",),
            ("crossattention.c_attn",),
            "crossattention.c_proj",
            ("crossattention.resid_dropout",),
        ),
        mlp("mlp", "ln_2", ("mlp.c_fc",), "mlp.c_proj", ("mlp.dropout",)),
    ),
    embeddings=("wte", "wpe"),
    final_norm=("ln_f",),
    dropouts=("drop",),
)
GPTJ = Pattern(
    "gptj",
    "parallel",
    (
        attention(
            "attn",
            "ln_1",
            ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            "attn.out_proj",
            ("attn.resid_dropout",),
        ),
        mlp("mlp", "ln_1", ("mlp.fc_in",), "mlp.fc_out", ("mlp.dropout",)),
    ),
    embeddings=("wte",),
    final_norm=("ln_f",),
    heads=("lm_head", "score", "qa_outputs"),
    dropouts=("drop",),
)
PHI = Pattern(
    "phi",
    "parallel",
    (
        attention("self_attn", "input_layernorm", QKV, "self_attn.dense", ("resid_dropout",)),
        mlp("mlp", "input_layernorm", ("mlp.fc1",), "mlp.fc2", ("resid_dropout",)),
    ),
    embeddings=("embed_tokens",),
    final_norm=("final_layernorm",),
    dropouts=("embed_dropout",),
)
PHI3 = replace(
    LLAMA,
    family="phi3",
    sublayers=(
        attention(
            "self_attn",
            "input_layernorm",
            ("self_attn.qkv_proj",),
            "self_attn.o_proj",
            ("resid_attn_dropout",),
        ),
        mlp("mlp", "post_attention_layernorm", ("mlp.gate_up_proj",), "mlp.down_proj", ("resid_mlp_dropout",)),
    ),
)
OLMO2 = replace(
    LLAMA,
    family="olmo2",
    placement="output",
    sublayers=(
        attention("self_attn", "post_attention_layernorm", QKV, "self_attn.o_proj"),
        mlp("mlp", "post_feedforward_layernorm", _GATED, "mlp.down_proj"),
    ),
)
OPT = Pattern(
    "opt",
    "do_layer_norm_before",
    (
        attention("self_attn", "self_attn_layer_norm", QKV, "self_attn.out_proj", dropout_rates=("dropout",)),
        mlp(None, "final_layer_norm", ("fc1",), "fc2", dropout_rates=("dropout",)),
    ),
    # the 350m size embeds in fewer channels than its stream has and projects in and out
    embeddings=("embed_tokens", "project_in", "embed_positions"),
    final_norm=("final_layer_norm",),
    heads=("project_out", "lm_head", "score", "qa_outputs"),
)
NEOX = Pattern(
    "gpt_neox",
    "parallel",
    (
        attention(
            "attention",
            "input_layernorm",
            ("attention.query_key_value",),
            "attention.dense",
            ("post_attention_dropout",),
        ),
        mlp("mlp", "post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", ("post_mlp_dropout",)),
    ),
    embeddings=("embed_in",),
    final_norm=("final_layer_norm",),
    dropouts=("emb_dropout",),
    heads=("embed_out", "lm_head", "classifier", "score"),
)
