"""What cloud-edge adaptation costs, measured: bytes of messages, and the device's time and memory."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headway.claims.cema_streams import network, tent
from headway.claims.evidence import Evidence, verdict
from headway.claims.no_prop_costs import trim
from headway.learning.cloud_edge.affine import travelling
from headway.learning.cloud_edge.client import EdgeClient
from headway.learning.cloud_edge.cloud import CloudServer
from headway.learning.cloud_edge.selection import RandomSelection
from headway.learning.cloud_edge.simulation import simulate
from headway.measure import PeakMemory, paired

KEY = "cema"


def messages(quick: bool) -> Evidence:
    rows = []
    x = torch.randn(64, 1, 8, 8)
    for width in (8, 48, 128):
        net = network(width)
        for _ in range(3):
            net.train()(x)
        net.eval()
        cloud = CloudServer(net, net, replay=0)
        result = simulate(copy.deepcopy(net), cloud, [x, x], deployment="a", select=RandomSelection(1.0), codec="fp16")
        counters = cloud.deployment("a").counters
        whole = sum(t.numel() * t.element_size() for t in net.state_dict().values())
        values = sum(t.numel() * t.element_size() for t in travelling(net).values())
        update = counters.bytes_out / result.stats["updates"]
        rows.append({"width": width, "state dict": whole, "update": update, "values": values, "share": update / whole,
                     "sample": counters.bytes_in / result.stats["uploaded"]})  # fmt: skip
    return Evidence(
        KEY,
        "messages to the device are small",
        "only affine parameters are sent",
        "; ".join(
            f"width {r['width']}: {r['update']:,.0f} bytes an update, {100 * r['share']:.2f} % of the network"
            for r in rows
        ),
        "the whole state dict: " + ", ".join(f"{r['state dict']:,} bytes" for r in rows),
        verdict([r["share"] < 0.02 for r in rows]),
        f"asked: below 2 %; the share falls with the width, since convolutions grow with its square. Of an update {rows[0]['values']:,} "
        f"bytes are values at width {rows[0]['width']}, the rest names and checksum. Up, a digit of 64 fp16 values takes "
        f"{rows[0]['sample']:.0f} bytes",
        rows=rows,
    )


def device(quick: bool) -> Evidence:
    rows = []
    for width, size in ((8, 32), (48, 32), (96, 64 if quick else 128)):
        net, x = network(width).eval(), torch.randn(size, 1, 8, 8)
        step = tent(net)
        client = EdgeClient(net, "http://127.0.0.1:9", background=False, select=RandomSelection(0.3))
        calls: dict[str, Callable[[Tensor], Any]] = {"inference": net, "client": client, "Tent": step}
        budget = 0.5 if quick else 4.0
        ours, theirs = (
            paired(lambda c=calls[name], x=x: c(x), lambda n=net, x=x: n(x), budget) for name in ("client", "Tent")
        )
        memory = {}
        for name, call in calls.items():
            trim()
            with PeakMemory() as peak:
                call(x)
            memory[name] = peak.bytes / 1e6
        rows.append({"width": width, "batch": size, "client": 1 / ours.ratio, "Tent": 1 / theirs.ratio,
                     "milliseconds": 1e3 * ours.theirs, "extra microseconds": 1e6 * (ours.ours - ours.theirs),
                     "megabytes": memory})  # fmt: skip
    last = rows[-1]["megabytes"]
    return Evidence(
        KEY,
        "the device never back-propagates",
        "by design",
        "; ".join(
            f"width {r['width']}, batch {r['batch']}: {r['client']:.2f} times plain inference ({r['milliseconds']:.2f} ms)"
            for r in rows
        )
        + f", peak {last['client']:.1f} MB where plain inference has {last['inference']:.1f} MB",
        "Tent on the device: " + ", ".join(f"{r['Tent']:.2f}" for r in rows) + f" times, peak {last['Tent']:.1f} MB",
        verdict([*(r["client"] <= 1.05 for r in rows), *(r["Tent"] >= 2.5 for r in rows)]),
        "asked: at most 1.05 and at least 2.5 times. Choosing the samples costs about "
        f"{statistics.median(r['extra microseconds'] for r in rows):.0f} microseconds a batch whatever the network, which shows on "
        "small ones",
        rows=rows,
    )
