"""Layers of encoders of text, images and sound, and of the decoders that read an encoder."""

from __future__ import annotations

from headway.anatomy.decoders import QKV
from headway.anatomy.pattern import Pattern, attention, cross, mlp

BERT = Pattern(
    "bert",
    "post",
    (
        attention(
            None,
            "attention.output.LayerNorm",
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.output.dense",
            ("attention.output.dropout",),
        ),
        cross(
            None,
            "crossattention.output.LayerNorm",
            ("crossattention.self.query",),
            ("crossattention.self.key", "crossattention.self.value"),
            "crossattention.output.dense",
            ("crossattention.output.dropout",),
        ),
        mlp(None, "output.LayerNorm", ("intermediate.dense",), "output.dense", ("output.dropout",)),
    ),
    embeddings=("word_embeddings", "position_embeddings", "token_type_embeddings"),
    embedding_norm=("embeddings.LayerNorm",),
    dropouts=("embeddings.dropout",),
    heads=("pooler.dense", "cls.predictions.transform.dense", "classifier", "qa_outputs"),
)
VIT = Pattern(
    "vit",
    "pre",
    (
        attention(
            "attention",
            "layernorm_before",
            ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attention.o_proj",
            ("dropout",),
        ),
        mlp("mlp", "layernorm_after", ("mlp.fc1",), "mlp.fc2", ("dropout",)),
    ),
    embeddings=("patch_embeddings.projection",),
    parameters=("cls_token", "position_embeddings"),
    final_norm=("layernorm",),
    heads=("classifier", "pooler.dense"),
    dropouts=("embeddings.dropout",),
)
TIMM_VIT = Pattern(
    "timm_vit",
    "pre",
    (
        attention("attn", "norm1", ("attn.qkv",), "attn.proj", ("attn.proj_drop",), gain="ls1"),
        mlp("mlp", "norm2", ("mlp.fc1",), "mlp.fc2", ("mlp.drop2", "mlp.drop"), gain="ls2"),
    ),
    embeddings=("patch_embed.proj",),
    parameters=("cls_token", "dist_token", "reg_token", "pos_embed"),
    embedding_norm=("norm_pre", "patch_embed.norm"),
    final_norm=("norm", "fc_norm"),
    heads=("head",),
    dropouts=("pos_drop",),
    parts=("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2", "drop_path"),
)
CLIP = Pattern(
    "clip",
    "pre",
    (
        attention("self_attn", "layer_norm1", QKV, "self_attn.out_proj"),
        mlp("mlp", "layer_norm2", ("mlp.fc1",), "mlp.fc2"),
    ),
    embeddings=("token_embedding", "patch_embedding", "position_embedding"),
    parameters=("class_embedding",),
    embedding_norm=("pre_layrnorm",),
    final_norm=("../final_layer_norm", "../post_layernorm"),
    heads=("vision_model:visual_projection", "text_model:text_projection", "classifier"),
)
# one class is both layers; a decoder's has the cross-attention between the two branches of an encoder's
T5 = Pattern(
    "t5",
    "pre",
    (
        attention(
            "layer.0.SelfAttention",
            "layer.0.layer_norm",
            ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
            "layer.0.SelfAttention.o",
            ("layer.0.dropout",),
        ),
        cross(
            "layer.1.EncDecAttention",
            "layer.1.layer_norm",
            ("layer.1.EncDecAttention.q",),
            ("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
            "layer.1.EncDecAttention.o",
            ("layer.1.dropout",),
        ),
        *(
            mlp(
                f"layer.{i}.DenseReluDense",
                f"layer.{i}.layer_norm",
                tuple(f"layer.{i}.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1")),
                f"layer.{i}.DenseReluDense.wo",
                (f"layer.{i}.dropout",),
            )
            for i in (1, 2)
        ),
    ),
    embeddings=("embed_tokens",),
    final_norm=("final_layer_norm",),
    heads=("lm_head", "classification_head.dense", "classifier", "qa_outputs"),
    dropouts=("dropout",),
)
WHISPER = Pattern(
    "whisper",
    "pre",
    (
        attention("self_attn", "self_attn_layer_norm", QKV, "self_attn.out_proj", dropout_rates=("dropout",)),
        cross(
            "encoder_attn",
            "encoder_attn_layer_norm",
            ("encoder_attn.q_proj",),
            ("encoder_attn.k_proj", "encoder_attn.v_proj"),
            "encoder_attn.out_proj",
            dropout_rates=("dropout",),
        ),
        mlp(None, "final_layer_norm", ("fc1",), "fc2", dropout_rates=("dropout",)),
    ),
    embeddings=("embed_tokens", "embed_positions"),
    bent=("conv2",),
    final_norm=("layer_norm",),
    heads=("proj_out", "projector"),
    dropout_rates=("dropout",),
)
