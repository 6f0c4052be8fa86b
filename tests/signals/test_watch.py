"""Watching a training run: which steps, what is kept, what is left behind."""

import pytest
import torch
from torch import nn

import headway as hw


def train(model, steps, optimizer=None):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss = model(torch.randn(8, 6, generator=generator)).square().mean()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_so_many_steps_are_recorded_with_their_gradients():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hw.watch(model, every=4, optimizer=optimizer) as log:
        train(model, 10, optimizer)
    assert [step for step, _ in log.records] == [0, 4, 8] and log.step == 10
    assert all(row.grad_norm > 0 for _, flow in log.records for row in flow.rows)
    assert log.last["0"].weight_grad_norm > 0 and log.last["0"].effective_lr > 0
    assert [s for s, _ in log.history("2", "grad_rms")] == [0, 4, 8]
    assert "step" in str(log) and len(log.to_dict()["records"]) == 3
    assert hooks(model) == 0


def test_training_with_the_watch_is_bitwise_training_without():
    weights = []
    for watched in (True, False):
        model = net()
        optimizer = torch.optim.Adam(model.parameters())
        log = hw.watch(model, every=2)
        if watched:
            log.attach()
        train(model, 7, optimizer)
        log.close()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_between_watched_steps_the_layers_carry_no_hooks():
    model = net()
    with hw.watch(model, every=3):
        train(model, 2)
        assert hooks(model) == 2 and not model[0]._forward_hooks
    assert hooks(model) == 0


def test_gradients_are_divided_by_the_scale_of_their_own_step():
    class Scaler:
        scale = 1024.0

        def get_scale(self):
            return self.scale

    scaler, flows = Scaler(), []
    for scaled in (True, False):
        model = net()
        with hw.watch(model, every=1, grad_scale=scaler if scaled else None) as log:
            (model(torch.ones(8, 6)).square().mean() * (scaler.scale if scaled else 1)).backward()
            scaler.scale = 2.0
        flows.append(log.last)
    for a, b in zip(flows[0].rows, flows[1].rows, strict=True):
        assert a.grad_norm == pytest.approx(b.grad_norm) and a.weight_grad_norm == pytest.approx(
            b.weight_grad_norm, nan_ok=True
        )


def test_only_the_last_flows_are_kept_and_evaluation_is_not_counted():
    model = net()
    with hw.watch(model, every=1, keep=2) as log:
        train(model, 3)
        model.eval()
        train(model, 2)
        with torch.no_grad():
            model(torch.randn(8, 6))
        model.train()
        train(model, 2)
    assert [step for step, _ in log.records] == [3, 4]


def test_an_exception_in_the_model_leaves_no_hooks_and_training_can_go_on():
    model = net()
    with pytest.raises(RuntimeError), hw.watch(model, every=1):
        model(torch.randn(8, 5))
    assert hooks(model) == 0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(8, 6)).sum().backward()
    assert kept
    train(model, 2)


def test_the_monitor_refuses_wrong_settings_and_compiled_models():
    with pytest.raises(ValueError, match="at least 1"):
        hw.watch(net(), every=0)
    with pytest.raises(ValueError, match="matches no module"):
        hw.watch(net(), layers="h.*")
    with pytest.raises(TypeError, match="compiled"):
        hw.watch(torch.compile(net()))


def test_a_hugging_face_trainer_carries_the_monitor(tmp_path):
    transformers = pytest.importorskip("transformers")
    from headway.signals.callbacks import trainer_callback

    config = transformers.GPT2Config(
        vocab_size=50, n_layer=1, n_embd=16, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    data = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(16)]
    callback = trainer_callback(every=2)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=4,
        logging_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = transformers.GPT2LMHeadModel(config)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert [step for step, _ in callback.monitor.records] == [0, 2, 4]
    assert any("signal/explosion" in entry for entry in trainer.state.log_history)
    assert hooks(model) == 0


def test_a_lightning_trainer_carries_the_monitor(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from headway.signals.callbacks import lightning_callback

    class Regression(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            return self(batch[0]).square().mean()

        def forward(self, x):
            return self.net(x)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 6)), batch_size=8)
    callback, module = lightning_callback(every=2), Regression()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=str(tmp_path), **quiet
    )
    trainer.fit(module, loader)
    assert [step for step, _ in callback.monitor.records] == [0, 2, 4] and hooks(module) == 0
    assert all(row.grad_norm > 0 for row in callback.monitor.last.rows)
