"""CEMA's device: what it uploads, which updates it takes, and how it answers a cloud that says no; without a network."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time

import pytest
import torch
from torch import nn

from headway.learning.cloud_edge.affine import travelling
from headway.learning.cloud_edge.client import Backoff, EdgeClient
from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.edge import EdgeModel, Refused
from headway.learning.cloud_edge.messages import Response, pack, unpack
from headway.learning.cloud_edge.outbox import Outbox
from headway.learning.cloud_edge.selection import EntropyThreshold, RandomSelection, RedundancyFilter
from headway.learning.cloud_edge.server import asgi_app
from headway.learning.cloud_edge.simulation import simulate

HI = 0.82
EVERYTHING = {"hi": 1.1, "lo": 0.0}


@pytest.fixture
def cloud(nets):
    return CloudServer(nets.edge(), nets.foundation(), batch_size=8)


def client_of(cloud, nets, **options):
    options = {"thresholds": EntropyThreshold(4, **EVERYTHING), "deployment": "a", "background": False, **options}
    return EdgeClient(nets.edge(), cloud, **options)


# inference and choice


def test_a_batch_of_none_gives_nothing_and_sends_nothing_and_one_of_one_is_like_any_other(cloud, nets):
    client, x = client_of(cloud, nets), nets.stream(1)[0]
    assert client(x[:0]).shape == (0, 4)
    client.synchronise()
    assert client.stats()["messages"] == 0
    torch.testing.assert_close(client(x[:1]), nets.edge()(x[:1]))
    client.synchronise()
    assert client.stats()["uploaded"] == 1


def test_samples_whose_logits_are_no_numbers_are_counted_and_not_uploaded(cloud, nets):
    client, x = client_of(cloud, nets), nets.stream(1)[0].clone()
    x[2] = math.nan
    client(x)
    client.synchronise()
    stats = client.stats()
    assert (stats["samples"], stats["not_finite"], stats["uploaded"]) == (16, 1, 15)


def test_the_chosen_samples_are_those_between_the_thresholds_and_not_alike(nets):
    x, chosen = torch.cat(nets.stream(4)), []
    for redundancy in (None, RedundancyFilter(0.97)):
        edge = EdgeModel(nets.edge(), thresholds=EntropyThreshold(4, hi=HI), redundancy=redundancy)
        edge.infer(x[:8])
        chosen.append(edge.infer(x)[1][""])
    assert 0 < len(chosen[1]) < len(chosen[0]) < len(x)
    edge = EdgeModel(nets.edge(), select=RandomSelection(1.0))
    assert len(edge.infer(x)[1][""]) == len(x) and edge.thresholds.seen == len(x)


def test_a_transform_stands_between_what_is_uploaded_and_what_networks_take(nets):
    raw = (nets.stream(1)[0] * 40 + 128).clamp(0, 255).to(torch.uint8)

    def scaled(x):
        return (x.float() - 128) / 40

    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8, transform=lambda x: (x - 128) / 40,
                        foundation_transform=lambda x: (x - 128) / 40)  # fmt: skip
    client = client_of(cloud, nets, transform=scaled, codec="fp32")
    torch.testing.assert_close(client(raw), nets.edge()(scaled(raw)))
    client.synchronise()
    assert client.stats()["version"] == 2 and cloud.deployment("a").adapter.failures == 0


class Texts(nn.Module):
    """A classifier of token ids that is called by keyword, as those of transformers are."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].to(self.head.weight.dtype)
        return {"logits": self.head(self.norm((self.embed(input_ids) * mask).sum(1) / mask.sum(1)))}


def test_text_classifiers_are_called_by_keyword_and_texts_differ_in_length():
    torch.manual_seed(0)
    edge, teacher = Texts(), Texts()
    cloud = CloudServer(edge, teacher, batch_size=8)
    client = EdgeClient(edge, cloud, thresholds=EntropyThreshold(3, **EVERYTHING), background=False)
    for length in (5, 7, 3):
        ids = torch.randint(9, (6, length))
        assert client({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape == (6, 3)
        client.synchronise()
    assert client.stats()["version"] == 2 and client.stats()["failures"] == 0


def test_a_hugging_face_image_classifier_is_adapted_by_its_layer_norms():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=8, patch_size=4, num_channels=1, num_labels=3)  # fmt: skip
    edge, teacher = (transformers.ViTForImageClassification(config) for _ in range(2))
    cloud = CloudServer(edge, teacher, batch_size=8)
    client = EdgeClient(edge, cloud, thresholds=EntropyThreshold(3, **EVERYTHING), background=False)
    assert client({"pixel_values": torch.randn(8, 1, 8, 8)}).shape == (8, 3)
    client.synchronise()
    client.edge.settle()
    assert client.stats()["version"] == 1 and all("norm" in name for name in client.edge.source)


def test_a_hugging_face_text_classifier_is_adapted_by_its_layer_norms():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, max_position_embeddings=16, num_labels=3)  # fmt: skip
    edge, teacher = (transformers.BertForSequenceClassification(config) for _ in range(2))
    cloud = CloudServer(edge, teacher, batch_size=8)
    client = EdgeClient(edge, cloud, thresholds=EntropyThreshold(3, **EVERYTHING), background=False)
    for length in (6, 9):
        ids = torch.randint(20, (6, length))
        assert client({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape == (6, 3)
        client.synchronise()
    client.edge.settle()
    assert client.stats()["version"] == 1 and client.stats()["failures"] == 0
    assert all("LayerNorm" in name for name in client.edge.source)


@pytest.mark.parametrize("bad", [3, [torch.zeros(2)], torch.tensor(1.0), {"a": torch.zeros(2), "b": torch.zeros(3)}])
def test_an_input_that_is_no_batch_is_refused(cloud, nets, bad):
    with pytest.raises(ValueError, match="first axis holds the samples"):
        client_of(cloud, nets)(bad)


def test_thresholds_for_another_number_of_classes_are_refused(cloud, nets):
    with pytest.raises(ValueError, match="4 classes apart and the thresholds 9"):
        client_of(cloud, nets, thresholds=EntropyThreshold(9))(nets.stream(1)[0])


def test_a_compiled_forward_is_compiled_once_whatever_updates_come(cloud, nets):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, net = CompileCounter(), nets.edge()
    client = EdgeClient(net, cloud, thresholds=EntropyThreshold(4, **EVERYTHING), background=False,
                        forward=torch.compile(net, backend=counter))  # fmt: skip
    outputs = []
    for _ in range(4):
        outputs.append(client(nets.stream(1)[0]))
        client.synchronise()
    assert client.stats()["updates"] == 4 and counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[3])
    torch.testing.assert_close(client(nets.stream(1)[0]), net(nets.stream(1)[0]))


# the queue


def test_the_queue_drops_the_oldest_and_never_blocks():
    box = Outbox(10)
    for i in range(6):
        box.put({"": torch.full((4, 1), float(i))})
    assert len(box) == 8 and box.dropped == 16
    box.put({"": torch.arange(25.0)[:, None]})
    assert len(box) == 10 and box.take().samples[""].flatten().tolist() == list(range(15, 25))
    assert box.take() is None and box.dropped == 16 + 8 + 15
    with pytest.raises(ValueError, match="at least one sample"):
        Outbox(0)


def test_waits_double_up_to_the_longest_with_jitter():
    backoff = Backoff(0.5, 30.0)
    waits = [backoff.next() for _ in range(9)]
    for wait, whole in zip(waits, [0.5, 1, 2, 4, 8, 16, 30, 30, 30], strict=True):
        assert whole / 2 <= wait <= whole
    backoff.reset()
    assert backoff.next() <= 0.5


# updates


def updates(nets, count=2):
    """Bodies of successive updates from a real cloud, and the deployment."""
    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8)
    client = client_of(cloud, nets)
    client.uplink.register()
    found = []
    for x in nets.stream(count):
        before = cloud.deployment("a").published
        client(x[:8])
        while client.uplink.send():
            pass
        found.append(cloud.deployment("a").published.message((before.epoch, before.version)))
    return found, cloud.deployment("a")


def test_updates_are_taken_in_their_order_and_only_whole(nets):
    (first, second), deployment = updates(nets)
    edge = EdgeModel(nets.edge(), thresholds=EntropyThreshold(4))
    edge.begin((deployment.epoch, 0))
    with pytest.raises(Refused, match="builds on version 1"):
        edge.offer(second)
    for cut in (b"", first[:-3], first[:30], b"garbage" * 30):
        with pytest.raises(Refused, match="damaged"):
            edge.offer(cut)
    wrong = bytearray(first)
    wrong[-2] ^= 1
    with pytest.raises(Refused, match=r"checksum|finite|norm"):
        edge.offer(bytes(wrong))
    assert edge.stats.refused_updates == 6 and not edge._fresh and edge.moment == (deployment.epoch, 0)
    before = {name: t.clone() for name, t in travelling(edge.model).items()}
    edge.offer(first)
    edge.offer(first)  # the same again is no harm
    assert edge.stats.updates == 1
    assert all(torch.equal(t, before[name]) for name, t in travelling(edge.model).items())  # only between batches
    edge.offer(second)
    edge.infer(nets.stream(1)[0])
    now = deployment.published.tensors
    assert all(torch.equal(t, now[name]) for name, t in travelling(edge.model).items())
    with pytest.raises(Refused, match="not newer"):
        edge.offer(first)
    assert edge.stats.updates == 2 and edge.stats.version == 2


def test_an_update_that_begins_earlier_than_what_is_here_is_taken_too(nets):
    """Two questions were under way at once, and the later one was answered first."""
    (first, _), deployment = updates(nets)
    edge = EdgeModel(nets.edge(), thresholds=EntropyThreshold(4))
    edge.begin((deployment.epoch, 0))
    edge.offer(first)
    edge.offer(deployment.published.message((deployment.epoch, 0)))
    edge.settle()
    now = deployment.published.tensors
    assert all(torch.equal(t, now[name]) for name, t in travelling(edge.model).items())


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda t: t.pop("1.weight"), "does not hold what adapts"),
        (lambda t: t.update(extra=torch.ones(1)), "does not hold what adapts"),
        (lambda t: t.update({"1.weight": torch.ones(5)}), r"\(4,\).*\(5,\)"),
        (lambda t: t.update({"1.weight": t["1.weight"].double()}), "float64"),
        (lambda t: t["4.bias"].fill_(math.nan), "not finite"),
        (lambda t: t["1.running_var"].neg_(), "negative variance"),
        (lambda t: t["1.weight"].mul_(3), "of their norm"),
        (lambda t: t["1.weight"].add_(1e-6), "checksum"),
    ],
)
def test_an_update_that_does_not_fit_is_refused_with_its_reason(nets, spoil, told):
    _, deployment = updates(nets, 1)
    tensors, words = unpack(deployment.published.message(None))
    edge = EdgeModel(nets.edge(), thresholds=EntropyThreshold(4))
    spoil(tensors)
    with pytest.raises(Refused, match=told):
        edge.offer(pack(tensors, words))
    assert edge.stats.refused_updates == 1 and told.partition("\\")[0] in edge.stats.last_refusal
    edge.offer(deployment.published.message(None))
    assert edge.stats.version == 1


def test_a_new_epoch_is_newer_than_any_version_of_an_old_one_and_versions_never_go_back_within_one(nets):
    _, deployment = updates(nets, 2)
    late, tensors = deployment.published, dict(deployment.published.tensors)
    edge = EdgeModel(nets.edge(), thresholds=EntropyThreshold(4))
    edge.offer(late.message(None))

    def other(epoch, version):
        from headway.learning.cloud_edge.deployment import update_checksum

        words = {
            "epoch": epoch,
            "version": version,
            "full": True,
            "since": -1,
            "crc": update_checksum(epoch, version, tensors),
        }
        return pack(tensors, words)

    for epoch, version in ((late.epoch, 1), (late.epoch - 1, 99)):
        with pytest.raises(Refused, match="not newer"):
            edge.offer(other(epoch, version))
    edge.offer(other(late.epoch + 1, 1))
    assert edge.moment == (late.epoch + 1, 1)


def test_threads_that_infer_side_by_side_see_whole_updates(nets):
    """Every pass runs with the parameters of one version: scale and shift of a norm always belong together."""
    net = nn.Sequential(nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 2))
    edge = EdgeModel(net, thresholds=EntropyThreshold(2), norm_bound=1e9)
    source, seen, stop = dict(edge.source), set(), threading.Event()
    edge._forward = lambda x: (seen.add((float(net[1].weight[0]), float(net[1].bias[0]))), net(x))[1]

    def infer():
        while not stop.is_set():
            edge.infer(torch.randn(4, 36))

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    from headway.learning.cloud_edge.deployment import update_checksum

    for version in range(1, 60):
        tensors = {
            **source,
            "1.weight": torch.full((36,), float(version)),
            "1.bias": torch.full((36,), -float(version)),
        }
        words = {"epoch": 1, "version": version, "full": True, "since": -1, "crc": update_checksum(1, version, tensors)}
        edge.offer(pack(tensors, words))
        time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(seen) > 5 and all(weight == -bias or (weight, bias) == (1.0, 0.0) for weight, bias in seen)


# the guard


@pytest.mark.parametrize("how", ["one class", "no entropy"])
def test_a_collapsed_network_goes_back_to_its_source_and_takes_the_cloud_along(nets, how):
    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8)
    client = client_of(cloud, nets, guard_window=32, norm_bound=1e9,
                       thresholds=EntropyThreshold(4, hi=1.1, lo=0.02))  # fmt: skip
    batches = nets.stream(12)
    client(batches[0])
    client.synchronise()
    adapter = cloud.deployment("a").adapter
    # the cloud's copy collapses: a huge shift points every feature the same way, a huge scale makes every answer certain
    if how == "one class":
        adapter.edge[4].bias.data += 1.0 * adapter.edge[8].weight[2].sign()
    else:
        adapter.edge[4].weight.data *= 1e4
    client(batches[1])
    client.synchronise()
    versions = [client.stats()["version"]]
    for x in batches[2:5]:
        client(x)
    stats = client.stats()
    assert stats["rollbacks"] == 1 and ("one class" if how == "one class" else "entropy fell") in stats["last_rollback"]
    client(batches[5])
    assert all(torch.equal(t, client.edge.source[name]) for name, t in travelling(client.edge.model).items())
    while client.uplink.send():
        pass
    client.uplink.ask(0.0)
    now = cloud.deployment("a")
    assert now.counters.rollbacks == 1 and client.stats()["version"] == now.published.version > versions[0]
    assert client.stats()["refused_updates"] == 0
    for x in batches[6:]:
        client(x)
        client.synchronise()
    assert client.stats()["rollbacks"] == 1 and client.stats()["version"] > now.published.version - 1
    client.edge.settle()
    y = batches[0]
    torch.testing.assert_close(client(y), now.adapter.edge(y), rtol=0, atol=1e-6)


# a cloud that says no


class Scripted:
    """Stands between client and cloud: gives scripted answers to calls of one path first."""

    def __init__(self, link, path, answers):
        self.link, self.path, self.answers, self.seen = link, path, list(answers), []

    def request(self, request, timeout):
        if request.path.startswith(self.path):
            self.seen.append(request)
            if self.answers:
                answer = self.answers.pop(0)
                if callable(answer):
                    answer = answer(self.link, request, timeout)
                if isinstance(answer, Exception):
                    raise answer
                return answer
        return self.link.request(request, timeout)

    def close(self):
        self.link.close()


def lost(link, request, timeout):
    """The call arrives, its answer does not."""
    link.request(request, timeout)
    return ConnectionResetError("lost")


def scripted(client, path, *answers):
    client.uplink.link = Scripted(client.uplink.link, path, answers)
    return client.uplink.link


def test_a_lost_answer_and_a_second_try_leave_the_same_state(nets):
    states = []
    for answers in ((), (lost, ConnectionResetError("no"), lost)):
        cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8)
        client = client_of(cloud, nets)
        link = scripted(client, "/v1/samples", *answers)
        for x in nets.stream(5):
            client(x)
            client.synchronise()
        states.append(cloud.deployment("a").adapter.tensors())
        assert client.stats()["uploaded"] == 80 and client.stats()["failures"] == len(answers)
        assert len(link.seen) == 5 + len(answers)
    assert all(torch.equal(states[1][name], t) for name, t in states[0].items())


def test_a_message_too_large_is_halved_until_it_fits(nets):
    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8, max_body=500)
    client = client_of(cloud, nets)
    client(nets.stream(1)[0])
    client.synchronise()
    assert client.stats()["uploaded"] == 16 and client.stats()["messages"] == 4
    client = client_of(cloud, nets)
    scripted(client, "/v1/samples", *[Response(413, b"{}")] * 3)
    client(nets.stream(1)[0][:2])
    client.synchronise()
    assert client.stats()["too_large"] == 2 and client.stats()["uploaded"] == 0


def test_a_busy_cloud_costs_the_oldest_message_and_a_wait(cloud, nets):
    client = client_of(cloud, nets)
    scripted(client, "/v1/samples", Response(429, b"{}", {"retry-after": "0"}))
    client(nets.stream(1)[0])
    client(nets.stream(2)[1][:5])
    client.synchronise()
    assert client.stats()["put_off"] == 16 and client.stats()["uploaded"] == 5


def test_refused_samples_are_counted_and_not_sent_again(cloud, nets):
    client = client_of(cloud, nets)
    link = scripted(client, "/v1/samples", Response(422, b'{"error": "not finite"}'))
    client(nets.stream(1)[0])
    client.synchronise()
    assert client.stats()["refused_samples"] == 16 and len(link.seen) == 1


def test_samples_that_cannot_be_encoded_do_not_hold_up_the_others(cloud, nets, monkeypatch):
    from headway.learning.cloud_edge import uplink

    client, encode = client_of(cloud, nets), uplink.encode

    def picky(samples, codec):
        if len(samples[""]) == 3:
            raise ValueError("jpeg takes images")
        return encode(samples, codec)

    monkeypatch.setattr(uplink, "encode", picky)
    client(nets.stream(1)[0][:3])
    client(nets.stream(1)[0])
    client.synchronise()
    assert client.stats()["refused_samples"] == 3 and client.stats()["uploaded"] == 16


def test_a_forgotten_device_registers_again_and_sends_what_it_could_not(cloud, nets):
    client = client_of(cloud, nets)
    client(nets.stream(1)[0])
    client.synchronise()
    client.uplink.link.cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8)
    client.uplink.link.cloud._shop.epoch = cloud.epoch + 1  # started within the same second
    client(nets.stream(2)[1])
    client.synchronise()
    assert client.stats()["uploaded"] == 32 and client.stats()["epoch"] == cloud.epoch + 1


def test_a_damaged_update_is_asked_for_again_as_a_whole(cloud, nets):
    client = client_of(cloud, nets)
    client(nets.stream(1)[0])

    def damaged(link, request, timeout):
        answer = link.request(request, timeout)
        return Response(answer.status, answer.body[:-1] + bytes([answer.body[-1] ^ 64]), answer.headers)

    link = scripted(client, "/v1/params", damaged)
    client.synchronise()
    assert client.stats()["refused_updates"] == 1 and client.stats()["version"] == 2
    assert "since=" in link.seen[0].path and "since=" not in link.seen[1].path
    # the cloud is told
    client(nets.stream(1)[0])
    client.synchronise()
    health = json.loads(cloud.handle(_request("GET", "/v1/health")).body)
    assert health["deployments"]["a"]["rejected"] == {"a": 1}


def _request(method, path, body=b""):
    from headway.learning.cloud_edge.messages import Request

    return Request(method, path, body)


def test_a_cloud_that_does_not_answer_in_time_is_told_by_synchronise(cloud, nets):
    client = client_of(cloud, nets)
    scripted(client, "/v1/samples", *[ConnectionRefusedError("nobody")] * 1000)
    client(nets.stream(1)[0])
    with pytest.raises(TimeoutError, match=r"0.2 s.*nobody"):
        client.synchronise(0.2)
    client.uplink.link = client.uplink.link.link
    client.synchronise()
    assert client.stats()["uploaded"] == 16


def test_bytes_are_counted_both_ways_and_updates_are_small(cloud, nets):
    found = simulate(nets.edge(), cloud, nets.stream(6), thresholds=EntropyThreshold(4, **EVERYTHING), deployment="a")
    counters, stats = cloud.deployment("a").counters, found.stats
    assert 0 < counters.bytes_in < stats["bytes_up"] < counters.bytes_in + 1000  # and the registration
    assert counters.bytes_out <= stats["bytes_down"]
    assert stats["bytes_up"] > 6 * 16 * 36 * 2
    assert found.uploaded == 1.0 and math.isnan(found.accuracy)


# ASGI


def test_the_asgi_application_speaks_the_same_protocol(nets):
    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8, max_body=20_000)
    app = asgi_app(cloud)

    class OverASGI:
        """Drives the application as a server would, in pieces."""

        def request(self, request, timeout):
            path, _, query = request.path.partition("?")
            scope = {"type": "http", "method": request.method, "path": path, "query_string": query.encode(),
                     "headers": [(k.encode(), v.encode()) for k, v in request.headers.items()]}  # fmt: skip
            parts = [request.body[i : i + 1000] for i in range(0, len(request.body), 1000)] or [b""]
            pieces = [{"type": "http.request", "body": p, "more_body": i + 1 < len(parts)} for i, p in enumerate(parts)]
            sent = []

            async def receive():
                return pieces.pop(0)

            async def send(message):
                sent.append(message)

            asyncio.run(app(scope, receive, send))
            headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
            assert sent[0]["status"] == 304 or int(headers["content-length"]) == len(sent[1]["body"])
            return Response(sent[0]["status"], sent[1]["body"], headers)

        def close(self):
            pass

    nets_out = []
    for over_asgi in (False, True):
        local = CloudServer(nets.edge(), nets.foundation(), batch_size=8)
        client = client_of(local, nets)
        if over_asgi:
            client.uplink.link = OverASGI()
        simulate(client, local, nets.stream(6))
        nets_out.append(client.edge.model.state_dict())
        if over_asgi:
            assert client.stats()["version"] == 12
            assert client.uplink.link.request(_request("POST", "/v1/samples", bytes(30_000)), 1.0).status == 413
    assert all(torch.equal(nets_out[1][name], t) for name, t in nets_out[0].items())

    async def lifespan():
        messages, told = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}], []

        async def receive():
            return messages.pop(0)

        async def send(message):
            told.append(message["type"])

        await app({"type": "lifespan"}, receive, send)
        return told

    assert asyncio.run(lifespan()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert not cloud.working
    with pytest.raises(ValueError, match="speaks http"):
        asyncio.run(app({"type": "websocket"}, None, None))
