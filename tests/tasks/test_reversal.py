import pytest
import torch

from headway.claims.token_norms import TokenBatchNorm
from headway.norms.power import PowerNorm
from headway.tasks.reversal import PADDING, EncoderDecoder, TextReversal


def test_the_target_is_the_source_backwards_in_another_alphabet():
    task = TextReversal(length=16)
    source, target = next(task.train_batches(0, 64))
    lengths = (source != PADDING).sum(1)
    assert 4 <= int(lengths.min()) < int(lengths.max()) <= 16
    assert torch.equal(lengths, (target != PADDING).sum(1))
    seen: dict[int, int] = {}
    for row, n in enumerate(lengths.tolist()):
        assert (source[row, : 16 - n] == PADDING).all() and (target[row, n:] == PADDING).all()
        for a, b in zip(source[row, 16 - n :].flip(0).tolist(), target[row, :n].tolist(), strict=True):
            assert seen.setdefault(a, b) == b  # one byte, always the same other one
    assert len(set(seen.values())) == len(seen)


def test_most_of_what_the_encoder_sees_is_padding():
    source, _ = next(TextReversal().train_batches(0, 512))
    assert float((source == PADDING).double().mean()) > 0.5


@pytest.mark.parametrize(
    "norm", [torch.nn.LayerNorm, lambda c: PowerNorm(c, warmup_iters=0, group_num=4), TokenBatchNorm]
)
def test_contents_of_padding_and_later_bytes_change_nothing(norm):
    torch.manual_seed(0)
    model = EncoderDecoder(dim=16, depth=1, heads=2, length=8, norm=norm).double().train()
    source, target = torch.randint(0, 256, (4, 8)), torch.randint(0, 256, (4, 8))
    pad = torch.arange(8) < torch.tensor([[0], [3], [5], [6]])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen = model(source, pad, target)
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    other = target.clone()
    other[:, 5:] = 7
    again = model(torch.where(pad, 9, source), pad, other)
    torch.testing.assert_close(again[:, :5], seen[:, :5])
    assert not torch.equal(again[:, 5:], seen[:, 5:])
    torch.testing.assert_close(dict(model.state_dict()), statistics)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="heads that divide dim"):
        TextReversal(dim=30, heads=4)
    with pytest.raises(ValueError, match="length of at least 4"):
        TextReversal(length=3)
