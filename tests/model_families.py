"""Small models of the families that headway knows, for tests."""

import pytest
import torch
from torch import nn

from headway.residual.transformer import TransformerDecoder

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
IDS = torch.arange(18).remainder(50).view(2, 9)


class Block(nn.Module):
    """A layer with the names of timm's vision transformer."""

    def __init__(self, dim: int, scale: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj, self.attn.proj_drop = (
            nn.Linear(dim, 3 * dim),
            nn.Linear(dim, dim),
            nn.Dropout(0.0),
        )
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.ls1, self.ls2 = (Gain(dim), Gain(dim)) if scale else (nn.Identity(), nn.Identity())
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).view(batch, length, 3, 4, dim // 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.drop_path1(self.ls1(self.attn.proj_drop(self.attn.proj(y))))
        y = self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))
        return x + self.drop_path2(self.ls2(y))


class Gain(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class TimmViT(nn.Module):
    """A vision transformer with timm's names; its layers may carry LayerScale gains."""

    def __init__(self, dim: int = 32, depth: int = 4, scale: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj, self.patch_embed.norm = nn.Conv2d(3, dim, 4, 4), nn.Identity()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 5, dim))
        self.pos_drop, self.norm_pre = nn.Dropout(0.0), nn.Identity()
        self.blocks = nn.Sequential(*(Block(dim, scale) for _ in range(depth)))
        self.norm, self.fc_norm, self.head = nn.LayerNorm(dim), nn.Identity(), nn.Linear(dim, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.proj(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(self.norm_pre(self.pos_drop(x))))[:, 0])


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "headway":
        return TransformerDecoder(50, 32, 4, 4, max_length=16).eval()
    if name == "timm":
        return TimmViT().eval()
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
    if name in ("gemma", "gemma3", "phi3", "phi", "olmo2"):
        kind = {"gemma": "Gemma", "gemma3": "Gemma3", "phi3": "Phi3", "phi": "Phi", "olmo2": "Olmo2"}[name]
        more = (
            {"head_dim": 8, "num_key_value_heads": 2}
            if name.startswith("gemma")
            else {"pad_token_id": 0}
            if name == "phi3"
            else {}
        )
        config_class = getattr(transformers, "Gemma3TextConfig" if name == "gemma3" else kind + "Config")
        config = config_class(**SMALL, intermediate_size=64, **more)
        return getattr(transformers, kind + "ForCausalLM")(config).eval()
    if name.startswith("opt"):
        more = {"do_layer_norm_before": False, "word_embed_proj_dim": 16} if name == "opt 350m" else {}
        config = transformers.OPTConfig(
            **SMALL, ffn_dim=64, max_position_embeddings=32, **{"word_embed_proj_dim": 32, **more}
        )
        return transformers.OPTForCausalLM(config).eval()
    if name == "gptj":
        config = transformers.GPTJConfig(vocab_size=50, n_positions=32, n_embd=32, n_layer=4, n_head=4, rotary_dim=4)
        return transformers.GPTJForCausalLM(config).eval()
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_decoder_layers=2, num_heads=4
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    if name == "whisper":
        config = transformers.WhisperConfig(
            vocab_size=50,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=4,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=9,
            max_target_positions=32,
            **{f"{token}_token_id": 0 for token in ("pad", "bos", "eos", "decoder_start")},
        )
        return transformers.WhisperForConditionalGeneration(config).eval()
    if name == "clip":
        text = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 32}
        vision = {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = transformers.CLIPConfig(
            text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=12
        )
        return transformers.CLIPModel(config).eval()
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
    if name == "clip":
        return model(input_ids=IDS, pixel_values=torch.randn(2, 3, 8, 8, generator=generator)).logits_per_text
    if name == "t5":
        return model(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits
    if name == "whisper":
        return model(input_features=torch.randn(2, 8, 18, generator=generator), decoder_input_ids=IDS[:, :5]).logits
    if name == "timm":
        return model(torch.randn(2, 3, 8, 8, generator=generator))
    out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


MOVABLE = [
    "headway",
    "torch pre",
    "torch post",
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "gemma",
    "phi3",
    "gpt_neox",
    "opt",
    "bert",
    "vit",
]
DESCRIBED = ["gemma2", "gemma3", "olmo2", "phi", "opt 350m", "gptj", "t5", "whisper", "clip", "timm"]
