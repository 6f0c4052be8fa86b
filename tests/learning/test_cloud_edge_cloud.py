"""CEMA's cloud: its steps against a loop written out by hand, and its protocol without a network."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from headway.learning.cloud_edge.adaptation import Adapter
from headway.learning.cloud_edge.affine import (
    architecture_hash,
    named_affine_parameters,
    travelling,
    weights_checksum,
)
from headway.learning.cloud_edge.client import EdgeClient
from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.messages import BadMessage, Request, check_codec, decode, encode, pack, unpack
from headway.learning.cloud_edge.renorm import BatchRenorm
from headway.learning.cloud_edge.selection import EntropyThreshold
from headway.learning.cloud_edge.settings import Settings, prepare
from headway.learning.cloud_edge.simulation import simulate

HI = 0.82  # of ln 4: splits the entropies of the tests' networks


def client_of(cloud, nets, **options):
    options = {"thresholds": EntropyThreshold(4, hi=HI, warmup=64), "deployment": "a", "background": False, **options}
    return EdgeClient(nets.edge(), cloud, **options)


# the steps


def loss_by_hand(s, T, e):
    q, p = s.softmax(1), T.detach().softmax(1)
    H, HT = -(q * q.log()).sum(1), -(p * p.log()).sum(1)
    u, v = (e - H.detach()).exp(), (e - HT).exp()
    picked = q[torch.arange(len(q)), T.argmax(1)].log()
    return (3 * u * H + 3 * v * (p * (p / q).log()).sum(1) - v * picked).mean()


class ByHand(nn.Module):
    """Batch renormalisation written out for the loop below."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()
        self.training = False

    def forward(self, x):
        run = (self.var + 1e-5).sqrt()
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            sd = (var + 1e-5).sqrt()
            r, d = (sd / run).detach(), ((mean - self.mean) / run).detach()
            y = (x - mean[:, None, None]) / sd[:, None, None] * r[:, None, None] + d[:, None, None]
            self.mean = self.mean + 0.1 * (mean.detach() - self.mean)
            self.var = self.var + 0.1 * (var.detach() - self.var)
        else:
            y = (x - self.mean[:, None, None]) / run[:, None, None]
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def test_fourteen_batches_without_replay_are_the_loop_written_out(nets):
    source_edge, source_cloud = nets.edge().double(), nets.foundation().double()
    batches = [x.double() for x in nets.stream(14)]
    cloud = CloudServer(source_edge, source_cloud, batch_size=8, replay=0)
    device = copy.deepcopy(source_edge)
    found = simulate(device, cloud, batches, thresholds=EntropyThreshold(4, hi=HI, warmup=40), codec="fp32",
                     deployment="a", keep_logits=True)  # fmt: skip

    edge, teacher = copy.deepcopy(source_edge), copy.deepcopy(source_cloud)
    for net in (edge, teacher):
        net[1] = ByHand(net[1])
    learned = [[net[1].weight, net[1].bias, net[4].weight, net[4].bias] for net in (edge, teacher)]
    momenta = [[torch.zeros_like(p) for p in group] for group in learned]
    e0, low, waiting, seen, warm, steps = HI * math.log(4), 0.02 * math.log(4), [], [], None, 0

    def descend(which, loss, rate):
        for p, m, g in zip(learned[which], momenta[which], torch.autograd.grad(loss, learned[which]), strict=True):
            m.mul_(0.9).add_(g)
            p.data -= rate * m

    for x, logits in zip(batches, found.logits, strict=True):
        with torch.no_grad():
            edge[1].training = False
            z = edge(x)
            torch.testing.assert_close(logits, z, rtol=0, atol=1e-7)
            H = -(z.softmax(1) * z.log_softmax(1)).sum(1)
        seen += H.tolist()
        mean = sum(seen) / len(seen)
        warm = mean if warm is None and len(seen) >= 40 else warm
        e = e0 if warm is None else e0 * mean / warm
        waiting += list(x[(low < H) & (H < e)])  # noqa: SIM300
        while len(waiting) >= 8:
            batch, waiting = torch.stack(waiting[:8]), waiting[8:]
            teacher[1].training = True
            p = teacher(batch).softmax(1)
            entropies = -(p * p.log()).sum(1)
            descend(1, ((e0 - entropies.detach()).exp() * entropies).mean(), 2.5e-4)
            teacher[1].training, edge[1].training = False, True
            descend(0, loss_by_hand(edge(batch), teacher(batch).detach(), e0), 2.5e-3)
            steps += 1
    assert steps == cloud.deployment("a").published.version > 8
    torch.testing.assert_close(
        [device[1].running_mean, device[1].running_var], [edge[1].mean, edge[1].var], rtol=0, atol=1e-7
    )
    mine = [device[1].weight, device[1].bias, device[4].weight, device[4].bias]
    torch.testing.assert_close(mine, [p.detach() for p in learned[0]], rtol=0, atol=1e-7)


def test_only_what_adapts_differs_from_the_source_and_the_edge_has_no_gradient(nets):
    source, device = nets.edge(), nets.edge()
    cloud = CloudServer(source, nets.foundation(), batch_size=8, replay_start=64)
    before = copy.deepcopy(source.state_dict())
    client = client_of(cloud, nets)
    for x in nets.stream(12):
        logits = client(x.requires_grad_())
        assert logits.grad_fn is None and not logits.requires_grad
        client.synchronise()
        # the cloud's copy in evaluation is what the device computes
        client.edge.settle()
        y = nets.stream(1, seed=5)[0]
        torch.testing.assert_close(client(y), cloud.deployment("a").adapter.edge(y), rtol=0, atol=1e-6)
        client.synchronise()
        client.edge.settle()
    device = client.edge.model
    moved = {name for name, t in device.state_dict().items() if not torch.equal(t, before[name])}
    allowed = set(travelling(source))
    assert moved <= allowed and len(moved) == len(allowed) == 6
    assert all(p.grad is None and not p.requires_grad for p in device.parameters())
    assert all(torch.equal(t, before[name]) for name, t in source.state_dict().items())
    mine = cloud.deployment("a").adapter.edge
    fixed = {name: p for name, p in mine.named_parameters() if name not in named_affine_parameters(mine)}
    assert all(torch.equal(p, before[name]) for name, p in fixed.items())


def adapter_of(nets, **settings):
    settings = Settings(**{"batch_size": 8, "replay_start": 30, **settings})
    return Adapter(*prepare(nets.edge(), nets.foundation(), settings), 0.5, settings)


def test_the_buffer_is_first_in_first_out_and_drawn_from_once_it_is_full_enough(nets):
    adapter, sizes = adapter_of(nets, replay=40), []
    adapter._distil, distil = lambda samples: (sizes.append(len(samples[""])), distil(samples))[1], adapter._distil
    for i, x in enumerate(nets.stream(4)):
        list(adapter.receive({"": x + i}))
    # 3 B_c = 24 more samples as soon as 30 are there; both steps of a message see the whole message in the buffer
    assert sizes == [8, 8, 32, 32, 32, 32, 32, 32]
    assert len(adapter.buffer) == 40
    newest = torch.cat([x + i for i, x in enumerate(nets.stream(4))])[-40:]
    assert torch.equal(torch.stack([sample[""] for sample in adapter.buffer]), newest)
    # a buffer smaller than what is drawn never fails
    small = adapter_of(nets, batch_size=100, replay_start=1)
    assert len(list(small.receive({"": torch.cat(nets.stream(8))}))) == 1 and not small.failures


def test_an_idle_message_is_followed_by_a_replayed_step_where_asked(nets):
    for idle in (False, True):
        adapter = adapter_of(nets, idle_replay=idle)
        steps = [len(list(adapter.receive({"": x[:4]}))) for x in nets.stream(10)]
        # 4 samples a message: every second one fills a batch; from the eighth on 30 samples are there
        assert steps == ([0, 1] * 4 + [1, 1] if idle else [0, 1] * 5)


def test_the_weights_of_the_losses_are_those_of_the_initial_threshold(nets):
    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8)
    client = client_of(cloud, nets)
    for x in nets.stream(8):
        client(x)
        client.synchronise()
    assert client.edge.thresholds.e_max != client.edge.thresholds.e_max0
    adapter = cloud.deployment("a").adapter
    assert adapter.e_max0 == adapter.loss.e_max == pytest.approx(HI * math.log(4))


@pytest.mark.parametrize("bn", ["renorm", "batch", "frozen"])
def test_batch_norms_train_as_asked(nets, bn):
    adapter = adapter_of(nets, bn=bn)
    before = adapter.edge[1].running_mean.clone()
    assert isinstance(adapter.edge[1], BatchRenorm) == (bn == "renorm")
    list(adapter.receive({"": nets.stream(1)[0]}))
    assert adapter.steps == 2
    assert torch.equal(before, adapter.edge[1].running_mean) == (bn == "frozen")
    assert not adapter.edge.training and not adapter.foundation.training
    with pytest.raises(ValueError, match='bn is "renorm"'):
        Settings(bn="nonsense")


def test_reset_statistics_are_those_of_the_first_uploaded_batch_and_the_edge_starts_with_its_own(nets):
    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8, reset_stats=True)
    client = client_of(cloud, nets)
    client.edge.thresholds = EntropyThreshold(4, hi=1.1, lo=0.0)
    x = nets.stream(1)[0]
    torch.testing.assert_close(client(x), nets.edge()(x))
    deployment = cloud.deployment
    client.synchronise()
    first = nets.edge()[0](x[:8].half().float())
    second = nets.edge()[0](x[8:].half().float())
    wanted = first.mean((0, 2, 3)).lerp(second.mean((0, 2, 3)), 0.1)
    torch.testing.assert_close(deployment("a").adapter.edge[1].running_mean, wanted.detach())


def test_a_step_that_goes_wrong_changes_nothing(nets, monkeypatch):
    adapter = adapter_of(nets)
    list(adapter.receive({"": nets.stream(1)[0]}))
    before = adapter.tensors()
    monkeypatch.setattr(adapter, "_logits", lambda model, samples: torch.full((8, 4), math.nan))
    assert list(adapter.receive({"": nets.stream(2)[1][:8]})) == []
    assert adapter.failures == 1 and "loss of the foundation model is nan" in adapter.last_error
    after = adapter.tensors()
    assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())


def test_a_teacher_that_is_not_finite_teaches_nothing(nets):
    broken = nets.foundation()
    broken[-1].bias.data[0] = math.inf
    settings = Settings(batch_size=8, cloud_lr=0.0)
    adapter = Adapter(*prepare(nets.edge(), broken, settings), 0.5, settings)
    assert list(adapter.receive({"": nets.stream(1)[0]})) == []
    assert "teacher's logits are not finite" in adapter.last_error and adapter.failures == 2
    assert all(torch.equal(t, nets.edge().state_dict()[name]) for name, t in travelling(adapter.edge).items())


def test_forward_passes_may_autocast_and_losses_stay_float32(nets):
    adapter = adapter_of(nets, autocast=torch.bfloat16)
    list(adapter.receive({"": nets.stream(1)[0]}))
    assert adapter.steps == 2 and all(t.dtype is torch.float32 for t in travelling(adapter.edge).values())


def test_deployments_share_all_but_their_norms(nets):
    settings = Settings(batch_size=8)
    models = prepare(nets.edge(), nets.foundation(), settings)
    a, b = Adapter(*models, 0.5, settings), Adapter(*models, 0.5, settings)
    shared = {id(p) for p in a.foundation.parameters()} & {id(p) for p in b.foundation.parameters()}
    assert len(shared) == len(list(a.foundation.parameters())) - len(named_affine_parameters(a.foundation))


def test_networks_that_cannot_be_adapted_are_refused(nets):
    bare = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(ValueError, match="no normalisation with a scale"):
        CloudServer(bare, nets.foundation())
    with pytest.raises(ValueError, match="no normalisation with a scale"):
        CloudServer(nets.edge(), bare)
    CloudServer(nets.edge(), bare, cloud_lr=0.0)
    with pytest.raises(ValueError, match="4 classes and the foundation model 5"):
        CloudServer(nets.edge(), nets.network(4, 0, 5))
    with pytest.raises(ValueError, match="no normalisation with a scale"):
        EdgeClient(bare, "http://127.0.0.1:1")


# messages


@pytest.mark.parametrize(("codec", "close"), [("fp32", 0.0), ("fp16", 2e-3), ("uint8", 0.02)])
def test_samples_come_back_as_close_as_their_codec_allows(nets, codec, close):
    x = nets.stream(1)[0]
    there, words = unpack(pack(encode({"": x}, codec), {"a": [1]}))
    back = decode(there)[""]
    assert words == {"a": [1]} and back.dtype is torch.float32
    torch.testing.assert_close(back, x, rtol=0, atol=close)
    tokens = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    assert all(torch.equal(t, tokens[key]) for key, t in decode(encode(tokens, codec)).items())
    assert decode(encode({"": x[:0]}, codec))[""].shape == (0, 1, 6, 6)


def test_jpeg_says_what_it_needs():
    try:
        import PIL  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="needs Pillow"):
            check_codec("jpeg")
        return
    ramp = torch.linspace(0, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    torch.testing.assert_close(decode(encode({"": ramp}, "jpeg"))[""], ramp, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="values from 0 to 1"):
        encode({"": ramp * 2}, "jpeg")
    with pytest.raises(ValueError, match="2 axes"):
        encode({"": torch.zeros(2, 3)}, "jpeg")


def test_damaged_messages_are_told_as_such(nets):
    whole = pack(encode({"": nets.stream(1)[0]}, "fp16"), {})
    for bad in (b"", whole[:-1], whole[:40], b"\0" * 64, b"\xff" * 64, b"[]"):
        with pytest.raises(BadMessage):
            unpack(bad)
    with pytest.raises(BadMessage, match="no samples"):
        decode({})
    with pytest.raises(BadMessage, match="different numbers"):
        decode({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="codec must be one of"):
        check_codec("zip")


def test_nothing_of_the_package_unpickles():
    from pathlib import Path

    import headway.learning.cloud_edge as package

    text = "".join(file.read_text() for file in Path(package.__file__).parent.glob("*.py"))
    assert not [word for word in ("import pickle", "torch.load", "torch.save", "eval(", "exec(") if f" {word}" in text]


# the protocol


@pytest.fixture
def cloud(nets):
    return CloudServer(nets.edge(), nets.foundation(), batch_size=8, token="secret", queue=40, max_body=20_000)


def call(cloud, method, path, body=b"", token="secret", **headers):
    headers = {"authorization": f"Bearer {token}", **{key.replace("_", "-"): value for key, value in headers.items()}}
    return cloud.handle(Request(method, path, body, headers))


def registered(cloud, nets, name="a", **changes):
    words = {"model_hash": architecture_hash(nets.edge()), "num_classes": 4, "dtype": "float32", "E_max0": 0.5}
    return call(cloud, "POST", "/v1/deployments", json.dumps({**words, "deployment": name, **changes}).encode())


def upload(cloud, x, number, name="a"):
    return call(cloud, "POST", "/v1/samples", pack(encode({"": x}, "fp32"), {}), idempotency_key=f"{name}:{number}")


def test_a_deployment_is_registered_once_and_told_its_thresholds(cloud, nets):
    first = registered(cloud, nets)
    assert first.status == 201
    assert first.json() == {"deployment": "a", "epoch": first.json()["epoch"], "version": 0, "next_sequence": 1,
                            "thresholds": {"E_max0": 0.5}}  # fmt: skip
    assert upload(cloud, nets.stream(1)[0], 7).status == 202
    assert registered(cloud, nets).json()["next_sequence"] == 8
    assert registered(cloud, nets, name=None).json()["deployment"] not in ("a", None)


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({"model_hash": "x"}, 409, "other tensors"),
        ({"num_classes": 5}, 409, "5 classes"),
        ({"weights": 1}, 409, "weights differ"),
        ({"E_max0": "high"}, 400, "E_max0"),
        ({"name": "../../etc"}, 400, "named by"),
    ],
)
def test_another_network_or_nonsense_is_refused(cloud, nets, change, status, told):
    answer = registered(cloud, nets, **change)
    assert answer.status == status and told in answer.json()["error"]


def test_the_weights_of_edge_and_cloud_are_compared(cloud, nets):
    assert registered(cloud, nets, weights=weights_checksum(nets.edge())).status == 201
    assert registered(cloud, nets, name="b", weights=weights_checksum(nets.network(4, 3))).status == 409


def test_a_message_sent_twice_counts_once(cloud, nets):
    registered(cloud, nets)
    x = nets.stream(1)[0]
    assert upload(cloud, x, 1).json() == {"queued": 16, "version": 0}
    cloud.process()
    state = cloud.deployment("a").adapter.tensors()
    assert upload(cloud, x, 1).status == 409
    cloud.process()
    deployment = cloud.deployment("a")
    assert deployment.published.version == 2 and deployment.counters.duplicates == 1
    assert all(torch.equal(t, state[name]) for name, t in deployment.adapter.tensors().items())


def test_what_cannot_be_taken_is_answered_with_its_reason(cloud, nets):
    registered(cloud, nets)
    x = nets.stream(1)[0]
    bad = x.clone()
    bad[3, 0, 0, 0] = math.nan
    assert upload(cloud, bad, 1).status == 422
    assert upload(cloud, x, 1).status == 202  # the number was not used up
    odd = upload(cloud, x[:, :, :3], 2)
    assert odd.status == 422 and "(1, 3, 6)" in odd.json()["error"]
    assert upload(cloud, x, 2).status == 202
    full = upload(cloud, x, 3)
    assert full.status == 429 and full.headers["retry-after"] == "1"
    assert upload(cloud, torch.zeros(900, 1, 6, 6), 4).status == 413
    assert upload(cloud, x, 1, name="nobody").status == 404
    assert call(cloud, "POST", "/v1/samples", b"x", idempotency_key="a").status == 400
    assert call(cloud, "POST", "/v1/samples", b"garbage", idempotency_key="a:9").status == 400
    assert call(cloud, "POST", "/v1/deployments", b"[]").status == 400
    assert call(cloud, "GET", "/v1/samples").status == 405
    assert call(cloud, "GET", "/v2").status == 404
    assert call(cloud, "GET", "/v1/params?deployment=a&since=x").status == 400
    assert upload(cloud, x[:0], 9).status == 202
    health = call(cloud, "GET", "/v1/health").json()["deployments"]["a"]
    assert health["received"] == 32 and health["refused"] == 32


def test_nobody_comes_in_without_the_token(cloud, nets):
    for token in ("", "Secret", "secret "):
        answer = call(cloud, "GET", "/v1/health", token=token)
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert call(cloud, "GET", "/v1/health").status == 200


def test_an_update_holds_what_changed_since_and_everything_where_that_is_unknown(nets):
    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8, token="secret", bn="frozen")
    epoch = registered(cloud, nets).json()["epoch"]
    path = f"/v1/params?deployment=a&since={epoch}."
    assert call(cloud, "GET", f"{path}0").status == 304
    upload(cloud, nets.stream(1)[0], 1)
    cloud.process()
    tensors, words = unpack(call(cloud, "GET", f"{path}0").body)
    assert sorted(tensors) == ["1.bias", "1.weight", "4.bias", "4.weight"]  # frozen statistics do not travel
    assert (words["version"], words["since"], words["full"]) == (2, 0, False)
    for since in (f"since={epoch - 1}.9", f"since={epoch}.9", ""):
        tensors, words = unpack(call(cloud, "GET", f"/v1/params?deployment=a&{since}").body)
        assert words["full"] and len(tensors) == 6
    assert call(cloud, "GET", f"{path}2").status == 304
    assert call(cloud, "GET", "/v1/params?deployment=a&since=2").status == 304


def test_shared_edges_feed_one_copy_and_others_their_own(nets):
    for shared in (False, True):
        cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8, shared=shared, token="secret")
        for name in "ab":
            assert registered(cloud, nets, name).status == 201
            assert upload(cloud, nets.stream(1, 8)[0], 1, name).status == 202
        cloud.process()
        versions = [cloud.deployment(name).published.version for name in "ab"]
        assert versions == ([2, 2] if shared else [1, 1])
        assert (cloud.deployment("a") is cloud.deployment("b")) == shared


def test_a_server_takes_no_more_deployments_than_it_can_hold(nets):
    cloud = CloudServer(nets.edge(), nets.foundation(), max_deployments=1, token="secret")
    assert [registered(cloud, nets, name).status for name in "aba"] == [201, 503, 201]


# kept across restarts


def test_a_restarted_server_goes_on_as_if_it_had_never_stopped(nets, tmp_path):
    def fresh(folder):
        return CloudServer(nets.edge(), nets.foundation(), 8, replay_start=64, state_dir=folder, token="secret")

    whole, batches = fresh(None), nets.stream(12)
    registered(whole, nets)
    for i, x in enumerate(batches):
        upload(whole, x[:12], i + 1)
    whole.process()
    cloud = fresh(tmp_path)
    registered(cloud, nets)
    for i, x in enumerate(batches):
        upload(cloud, x[:12], i + 1)
        cloud.process()
        if i % 4 == 3:
            before = cloud.epoch
            cloud.close()
            cloud = fresh(tmp_path)
            assert cloud.epoch > before and cloud.deployment("a").sequences == {"a": i + 1}
            assert upload(cloud, x[:12], i + 1).status == 409
    mine, theirs = cloud.deployment("a"), whole.deployment("a")
    assert mine.published.version == theirs.published.version == 18
    wanted = theirs.adapter.state()[0]
    found = mine.adapter.state()[0]
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], t) for name, t in wanted.items())
    assert not list(tmp_path.glob(".*"))
    # three messages were sent twice; what was counted before the restarts counts on
    assert (mine.counters.received, mine.counters.duplicates) == (12 * 12, 3)
    assert mine.counters.bytes_in == theirs.counters.bytes_in


def test_a_damaged_state_is_put_aside_and_one_of_another_network_refused(nets, tmp_path):
    with CloudServer(nets.edge(), nets.foundation(), state_dir=tmp_path, token="secret") as cloud:
        registered(cloud, nets)
    with pytest.raises(ValueError, match="state of another edge model"):
        CloudServer(nets.network(6, 0), nets.foundation(), state_dir=tmp_path)
    file = tmp_path / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with CloudServer(nets.edge(), nets.foundation(), state_dir=tmp_path, token="secret") as cloud:
        assert (tmp_path / "a.damaged").exists() and not file.exists()
        assert registered(cloud, nets).json()["version"] == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="give another path"):
        CloudServer(nets.edge(), nets.foundation(), state_dir=tmp_path / "file")
