"""What the probe costs: probed / plain pass in time and peak memory at three sizes of two networks, and a watched training step."""

from __future__ import annotations

from headway.signals.cost import memory, time_ratio, watch_ratio

SIZES = {
    "conv": ("residual net of 20 layers, 32 x 32 images", ((16, 16), (16, 64), (32, 128))),
    "transformer": ("decoder of 6 layers, 64 tokens a sample", ((64, 8), (128, 16), (256, 32))),
}


def main() -> None:
    for kind, (words, sizes) in SIZES.items():
        print(f"{words}: probed pass / plain forward and backward")
        for width, batch in sizes:
            pair = time_ratio(width, batch, kind=kind)
            plain, probed = (memory(which, width, batch, kind, processes=3) for which in ("plain", "probed"))
            print(
                f"width {width:3} batch {batch:3}  time {1 / pair.ratio:.2f} ({1 / pair.high:.2f}-{1 / pair.low:.2f}), plain "
                f"{1e3 * pair.theirs:.0f} ms   memory {probed / plain:.3f}, plain {plain / 2**20:.0f} MiB",
                flush=True,
            )
    for width in (16, 64, 128):
        pair = watch_ratio(width=width)
        print(
            f"watch(every=50): {1 / pair.ratio:.3f} ({1 / pair.high:.3f}-{1 / pair.low:.3f}) of plain training steps of "
            f"{20 * pair.theirs:.2f} ms"
        )


if __name__ == "__main__":
    main()
