"""CEMA with a real server in a process of its own: killed, restarted, slow, talking nonsense; the device goes on serving."""

from __future__ import annotations

import itertools
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from headway.learning.cloud_edge.affine import travelling
from headway.learning.cloud_edge.client import EdgeClient
from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.selection import EntropyThreshold
from headway.learning.cloud_edge.server import HTTPFrontEnd
from headway.learning.cloud_edge.simulation import simulate

ALL = {"hi": 1.1, "lo": 0.0}
QUICK = {"poll": 0.02, "wait": 0.2, "timeout": 2.0, "backoff": (0.02, 0.1), "deployment": "a"}


def client_of(nets, url, **options):
    return EdgeClient(nets.edge(), url, thresholds=EntropyThreshold(4, **ALL), **{**QUICK, **options})


def until(true, seconds=20.0):
    """Waits for something that other threads and processes bring about."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)


def versions_only_grow(seen):
    return all(earlier <= later for earlier, later in itertools.pairwise(seen))


def test_in_process_and_over_http_in_another_process_give_bitwise_the_same(nets, child, tmp_path):
    there = child(nets.serve, tmp_path / "cloud", replay_start=64)
    here = CloudServer(nets.edge(), nets.foundation(), batch_size=8, replay_start=64)
    parameters, results = [], []
    for cloud in (here, there.url):
        net = nets.edge()
        threshold = EntropyThreshold(4, hi=0.82, warmup=64)
        results.append(simulate(net, cloud, nets.stream(16), thresholds=threshold, deployment="b", keep_logits=True))
        parameters.append(net.state_dict())
    assert all(torch.equal(parameters[1][name], t) for name, t in parameters[0].items())
    assert all(torch.equal(a, b) for a, b in zip(results[0].logits, results[1].logits, strict=True))
    counted = [{**r.stats, "epoch": 0} for r in results]
    assert counted[0] == counted[1] and 0 < results[0].uploaded < 1 and counted[0]["version"] > 10


def test_killed_and_restarted_the_server_catches_up_and_the_device_never_stops(nets, child, tmp_path):
    first = child(nets.serve, tmp_path / "cloud")
    with client_of(nets, first.url, queue=64) as client:
        batches, moments = nets.stream(60), []

        def serve(count):
            for _ in range(count):
                x = batches.pop()
                logits = client(x)
                assert logits.shape == (16, 4) and torch.isfinite(logits).all()
                moments.append((client.stats()["epoch"], client.stats()["version"]))

        serve(4)
        until(lambda: client.stats()["version"] == 8)
        first.kill()
        serve(10)
        until(lambda: not client.uplink.connected and client.stats()["failures"] > 1)
        held = client.stats()
        serve(10)  # the queue is full by now, and the last good parameters are used
        assert client.stats()["dropped"] > 0 and client.stats()["version"] == held["version"]
        second = child(nets.serve, tmp_path / "cloud", port=first.port)
        until(lambda: client.stats()["epoch"] > held["epoch"])
        until(lambda: client.stats()["uploaded"] > held["uploaded"])
        serve(4)
        client.synchronise(20)
        serve(1)
        assert client.uplink.connected and versions_only_grow(moments)
        assert second.port == first.port


def test_restarted_without_its_state_the_server_begins_again_under_a_new_epoch(nets, child, tmp_path):
    first = child(nets.serve, tmp_path / "cloud", state_dir=None)
    with client_of(nets, first.url) as client:
        client(nets.stream(1)[0])
        until(lambda: client.stats()["version"] == 2)
        epoch = client.stats()["epoch"]
        first.kill()
        time.sleep(max(0.0, epoch + 1.01 - time.time()))  # without a folder the epoch is the second of the start
        child(nets.serve, tmp_path / "cloud", port=first.port, state_dir=None)
        until(lambda: client.stats()["epoch"] > epoch)
        client(nets.stream(1)[0])
        client.synchronise(20)
        client.edge.settle()
        assert client.stats()["version"] == 2 and client.stats()["refused_updates"] == 0


def test_a_frozen_server_holds_up_nobody(nets, child, tmp_path):
    there = child(nets.serve, tmp_path / "cloud")
    with client_of(nets, there.url, timeout=0.2) as client:
        client(nets.stream(1)[0])
        until(lambda: client.stats()["version"] == 2)
        there.signal(signal.SIGSTOP)
        try:
            for x in nets.stream(20):
                client(x)
            until(lambda: "TimeoutError" in client.stats()["last_error"])
            client(nets.stream(1)[0])
        finally:
            there.signal(signal.SIGCONT)
        client.synchronise(20)
        assert client.uplink.connected and client.stats()["version"] > 2


@pytest.mark.parametrize("how", ["silent", "noise", "garbage", "pickle", "created", "drip"])
def test_whatever_a_server_answers_the_device_serves_its_last_good_parameters(nets, child, tmp_path, how):
    there = child(nets.misbehave, tmp_path / how, how)
    with client_of(nets, there.url, timeout=0.2) as client:
        source = {name: t.clone() for name, t in travelling(client.edge.model).items()}
        for x in nets.stream(10):
            assert torch.equal(client(x), nets.edge()(x))
        until(lambda: client.stats()["failures"] > 1)
        assert torch.equal(client(nets.stream(1)[0]), nets.edge()(nets.stream(1)[0]))
        stats = client.stats()
        assert not stats["connected"] and stats["version"] == 0 and stats["uploaded"] == 0 and stats["last_error"]
        assert all(torch.equal(t, source[name]) for name, t in travelling(client.edge.model).items())
        assert all(thread.is_alive() for thread in client._threads)


def test_a_good_server_that_turns_bad_and_good_again(nets, child, tmp_path):
    first = child(nets.serve, tmp_path / "cloud")
    with client_of(nets, first.url, timeout=0.5) as client:
        client(nets.stream(1)[0])
        until(lambda: client.stats()["version"] == 2)
        first.kill()
        bad = child(nets.misbehave, tmp_path / "bad", "garbage", port=first.port)
        failures = client.stats()["failures"]
        client(nets.stream(1)[0])
        until(lambda: client.stats()["failures"] > failures + 3)
        assert client.stats()["version"] == 2
        bad.kill()
        child(nets.serve, tmp_path / "cloud", port=first.port)
        client(nets.stream(1)[0])
        until(lambda: client.stats()["version"] >= 4)


def test_no_server_at_all_costs_nothing_but_the_queue(nets):
    with client_of(nets, "http://127.0.0.1:9", queue=32) as client:
        for x in nets.stream(10):
            client(x)
        until(lambda: client.stats()["failures"] > 0)
        assert client.stats()["dropped"] >= 10 * 16 - 32 - 16
        start = time.monotonic()
    assert not any(thread.is_alive() for thread in client._threads)
    assert time.monotonic() - start < 5  # closing does not wait for anybody either


def test_several_devices_on_one_server_have_parameters_of_their_own(nets):
    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8)
    with HTTPFrontEnd(cloud) as front:
        clients = [client_of(nets, front.url, deployment=name) for name in "abc"]
        threads = []
        for i, client in enumerate(clients):
            batches = nets.stream(4, seed=i)
            threads.append(threading.Thread(target=lambda c=client, b=batches: [c(x) for x in b]))
            threads[-1].start()
        for thread in threads:
            thread.join()
        for name, client in zip("abc", clients, strict=True):
            client.synchronise()
            client.edge.settle()
            assert client.stats()["version"] == 8
            now = cloud.deployment(name).published.tensors
            assert all(torch.equal(t, now[key]) for key, t in travelling(client.edge.model).items())
            client.close()
        assert not torch.equal(*(cloud.deployment(name).published.tensors["1.weight"] for name in "ab"))


def test_a_wrong_token_keeps_out_and_the_device_serves(nets):
    with HTTPFrontEnd(CloudServer(nets.edge(), nets.foundation(), batch_size=8, token="secret")) as front:
        with client_of(nets, front.url, token="wrong") as client:
            client(nets.stream(1)[0])
            until(lambda: "401" in client.stats()["last_error"])
            assert client.stats()["version"] == 0
        with client_of(nets, front.url, token="secret") as client:
            client(nets.stream(1)[0])
            client.synchronise()
            assert client.stats()["version"] == 2
    with pytest.warns(UserWarning, match="in the clear"):
        client_of(nets, "http://192.0.2.1:1", token="secret", background=False).close()
    with pytest.raises(ValueError, match="must be http://host:port"):
        client_of(nets, "ftp://here")


def certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 and its key in one file."""
    file = folder / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
               "-subj", "/CN=cloud", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]  # fmt: skip
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl that makes a certificate")
    file.write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return file


def test_over_tls_only_those_who_know_the_certificate_speak(nets, tmp_path):
    file = certificate(tmp_path)
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(file)
    with HTTPFrontEnd(CloudServer(nets.edge(), nets.foundation(), batch_size=8), tls=ours) as front:
        assert front.url.startswith("https://")
        known = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        with client_of(nets, front.url, tls=known, token="unasked") as client:
            client(nets.stream(1)[0])
            client.synchronise()
            assert client.stats()["version"] == 2
        with client_of(nets, front.url) as client:
            client(nets.stream(1)[0])
            until(lambda: "CERTIFICATE_VERIFY_FAILED" in client.stats()["last_error"])
            assert client.stats()["uploaded"] == 0


def test_a_body_too_long_for_the_server_is_answered_and_the_message_halved(nets):
    cloud = CloudServer(nets.edge(), nets.foundation(), batch_size=8, max_body=700)
    with HTTPFrontEnd(cloud) as front, client_of(nets, front.url) as client:
        client(nets.stream(1)[0])
        client.synchronise()
        assert client.stats()["uploaded"] == 16 and client.stats()["messages"] == 2


def test_the_command_serves_saves_when_told_to_stop_and_goes_on(nets, tmp_path):
    command = [sys.executable, "-m", "headway.learning.cloud_edge.server", "--edge", "cloud_edge_children:edge", "--foundation",
               "cloud_edge_children:foundation", "--port", "0", "--state-dir", str(tmp_path), "--batch-size", "8",
               "--checkpoint-every", "1000"]  # fmt: skip
    environment = {**os.environ, "HEADWAY_TOKEN": "secret", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        command,
        cwd=Path(__file__).parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        url = server.stdout.readline().split()[-1]
        with client_of(nets, url, token="secret") as client:
            client(nets.stream(1)[0])
            client.synchronise(20)
            assert client.stats()["version"] == 2
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    again = CloudServer(nets.edge(), nets.foundation(), batch_size=8, state_dir=tmp_path)
    assert again.deployment("a").published.version == 2 and again.deployment("a").sequences == {"a": 1}


def test_the_example_adapts_over_loopback(nets, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import cloud_edge as example

    networks = [example.trained(name, tmp_path, epochs=2) for name in example.WIDTHS]
    cloud = CloudServer(*networks, state_dir=tmp_path / "state")
    with HTTPFrontEnd(cloud) as front:
        assert 0 < example.edge(front.url, batches=50, pause=0.002, folder=tmp_path) <= 100
    assert "batch 50: " in capsys.readouterr().out
    assert list((tmp_path / "state").glob("*.safetensors"))
