"""The probe on models people have: transformers, graphs, recurrent nets, and modules with unusual outputs."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import headway as hw


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    ids = torch.randint(3, 90, (4, 8))
    if name == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=99, **small))
        return model, {"input_ids": ids, "labels": ids}, 2
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=99, n_layer=3, n_embd=32, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
        )
        return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}, 3
    if name == "llama":
        config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **small)
        return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}, 2
    if name == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=8, num_channels=1, num_labels=3, **small)
        return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 1, 16, 16)}, 2
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids}, 4


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "t5"])
def test_hugging_face_models_are_probed_from_a_batch_as_it_comes(name):
    torch.manual_seed(0)
    model, batch, blocks = hugging_face(name)
    flow = hw.probe(model, batch)
    assert len(flow.of("stream")) == blocks, [row.name for row in flow.of("stream")]
    assert flow.of("pre") and flow.of("post")
    assert all(math.isfinite(row.rms) and math.isfinite(row.cos) for row in flow.of("stream"))
    assert all(row.grad_norm > 0 for row in flow.of("stream"))
    assert flow.saved_bytes > 0 and (flow.objective == "the model's own loss") == ("labels" in batch)


def test_a_recurrent_net_with_the_sequence_first_takes_its_samples_from_the_second_axis():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8, num_layers=2)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.lstm(x)[0][-1])

    flow = hw.probe(Tagger(), torch.randn(9, 5, 6))
    assert flow["lstm"].samples == 5 and flow["lstm"].shape == (9, 5, 8) and flow["lstm"].grad_norm > 0
    with torch.no_grad():
        pass
    assert math.isfinite(flow["lstm"].weight_norm)


def test_modules_that_return_tuples_mappings_or_dataclasses_are_read():
    @dataclasses.dataclass
    class Out:
        count: int
        state: torch.Tensor

    class Wraps(nn.Module):
        signal_kind = "post"

        def __init__(self, how):
            super().__init__()
            self.linear, self.how = nn.Linear(4, 4), how

        def forward(self, x):
            return self.how(self.linear(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Wraps(lambda y: (None, y))
            self.b = Wraps(lambda y: {"state": y})
            self.c = Wraps(lambda y: Out(1, y))

        def forward(self, x):
            return self.c(self.b(self.a(x)[1])["state"]).state

    flow = hw.probe(Model(), torch.randn(5, 4))
    assert [row.name for row in flow.of("post")] == ["a", "b", "c"]
    assert all(row.grad_norm > 0 for row in flow.of("post"))


def test_graph_nodes_become_alike_with_depth():
    nn_ = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    edges = torch.randint(0, 60, (2, 400))

    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.convs = nn.ModuleList([nn_.GCNConv(16, 16) for _ in range(depth)])

        def forward(self, x, edge_index):
            for conv in self.convs:
                x = conv(x, edge_index).relu()
            return x

    flow = hw.probe(Deep(12), torch.randn(60, 16), edges, layers="convs.?*", kinds=("pre",))
    convs = [row for row in flow.rows if row.module == "GCNConv"]
    assert len(convs) == 12 and convs[-1].cos > 0.95 > convs[0].cos
    assert any(f.problem == "collapse" for f in flow.findings)


def test_a_torch_transformer_shows_its_layers_as_the_stream():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    flow = hw.probe(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(4, 6, 16), mode="eval")
    assert [row.name for row in flow.of("stream")] == ["layers.0", "layers.1", "layers.2"]


def test_a_residual_image_net_shows_its_blocks_as_the_stream():
    class Block(nn.Module):
        def __init__(self, a, b, stride):
            super().__init__()
            self.one, self.two = nn.Conv2d(a, b, 3, stride, 1), nn.Conv2d(b, b, 3, 1, 1)
            self.down = nn.Conv2d(a, b, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, x):
            return self.down(x) + self.two(self.one(x).relu())

    stages = [nn.Sequential(Block(4, 4, 1), Block(4, 4, 1)), nn.Sequential(Block(4, 8, 2), Block(8, 8, 1))]
    flow = hw.probe(nn.Sequential(*stages), torch.randn(3, 4, 8, 8))
    assert len(flow.of("stream")) == 4
