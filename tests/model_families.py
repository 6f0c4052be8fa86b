"""Small models of the families that headway knows, for tests."""

import pytest
import torch
from torch import nn

from headway.residual.transformer import TransformerDecoder

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
IDS = torch.arange(18).remainder(50).view(2, 9)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "headway":
        return TransformerDecoder(50, 32, 4, 4, max_length=16).eval()
    if name.startswith("torch"):
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=name == "torch pre")
        final = nn.LayerNorm(32) if name == "torch pre" else None
        return nn.TransformerEncoder(layer, 4, norm=final, enable_nested_tensor=False).eval()
    transformers = pytest.importorskip("transformers")
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=32, n_embd=32, n_layer=4, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        return transformers.GPT2LMHeadModel(config).eval()
    kinds = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "gpt_neox": "GPTNeoX", "gemma2": "Gemma2"}
    if name in kinds:
        more = {"use_parallel_residual": False} if name == "gpt_neox" else {"num_key_value_heads": 2}
        if name == "gemma2":
            more["head_dim"] = 8
        config = getattr(transformers, kinds[name] + "Config")(**SMALL, intermediate_size=64, **more)
        return getattr(transformers, kinds[name] + "ForCausalLM")(config).eval()
    if name == "bert":
        config = transformers.BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=32)
        return transformers.BertForMaskedLM(config).eval()
    assert name == "vit"
    small = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**small, intermediate_size=64, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config).eval()


def run(name: str, model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return model(torch.randn(2, 3, 8, 8, generator=generator)).logits
    if name.startswith("torch"):
        return model(torch.randn(2, 9, 32, generator=generator))
    out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


MOVABLE = ["headway", "torch pre", "torch post", "gpt2", "llama", "mistral", "qwen2", "gpt_neox", "bert", "vit"]
