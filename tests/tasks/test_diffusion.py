import pytest
import torch

import headway as hw
from headway.tasks.diffusion import DigitsDiffusion, noisy
from headway.tasks.unets import UNet, UViT, time_features


def test_noise_is_mixed_in_so_that_the_variance_stays():
    task = DigitsDiffusion()
    draw = torch.Generator().manual_seed(0)
    clean = torch.randn(4000, 1, 2, 2, generator=draw)
    for t in (0, 300, 999):
        x, times, eps = noisy(clean, torch.full((4000,), t), task._schedule, draw)
        kept = task._schedule[t]
        torch.testing.assert_close(x, kept.sqrt() * clean + (1 - kept).sqrt() * eps)
        assert x.var().item() == pytest.approx(1, rel=0.05) and bool((times == t).all())
    assert task._schedule[0] > 0.999 and task._schedule[-1] < 1e-4


def test_a_perfect_guess_has_no_loss_and_silence_has_that_of_the_noise():
    task = DigitsDiffusion()

    class Silent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            return x * self.weight

    with torch.no_grad():
        assert task.evaluate(Silent())["loss"] == pytest.approx(1, rel=0.02)
        assert task.evaluate(Silent()) == task.evaluate(Silent())


def test_the_networks_keep_the_shape_and_depend_on_the_time():
    torch.manual_seed(0)
    for model in (UViT(8, 2, 2, 8, 2, 2), UNet(2, (4, 6, 8), 2)):
        x = torch.randn(3, 2, 8, 8)
        early, late = model(x, torch.zeros(3)), model(x, torch.full((3,), 900.0))
        assert early.shape == x.shape and not torch.allclose(early, late)
        assert model(x[:0], torch.zeros(0)).shape == (0, 2, 8, 8)
    assert time_features(torch.zeros(2), 5).tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0]] * 2


@pytest.mark.parametrize("network", ["uvit", "unet"])
def test_both_networks_have_six_long_skips(network):
    task = DigitsDiffusion(network, dim=16)
    rows = hw.plan(task.model(0), hw.ScaleLong()).rows
    assert [row.before.split(" from")[0] for row in rows[:-1]] == [f"skip {i} of 6" for i in range(6, 0, -1)]


def test_denoising_is_learned():
    task = DigitsDiffusion("unet")
    torch.manual_seed(0)
    model, stream = UNet(1, (8, 12), 1), task.train_batches(0, 64)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        loss = task.loss(model, next(stream))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(model)["loss"] < 0.6


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"network": "vit"}, {"timesteps": 1}):
        with pytest.raises(ValueError):
            DigitsDiffusion(**wrong)
    with pytest.raises(ValueError, match="patch divides size"):
        UViT(8, 1, 3, 8, 2, 2)
