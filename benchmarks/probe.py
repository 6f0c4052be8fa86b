"""What the probe costs: probed / plain pass in time and peak memory at three sizes, and a watched training step."""

from __future__ import annotations

from headway.signals.cost import memory, time_ratio, watch_ratio

SIZES = ((16, 16), (16, 64), (32, 128))


def main() -> None:
    print("residual net of 20 layers, 32 x 32 images: probed pass / plain forward and backward")
    for width, batch in SIZES:
        pair = time_ratio(width, batch)
        plain, probed = memory("plain", width, batch), memory("probed", width, batch)
        print(
            f"width {width:3} batch {batch:3}  time {1 / pair.ratio:.2f} ({1 / pair.high:.2f}-{1 / pair.low:.2f}), plain "
            f"{1e3 * pair.theirs:.0f} ms   memory {probed / plain:.3f}, plain {plain / 2**20:.0f} MiB"
        )
    plain, watched = watch_ratio()
    print(f"watch(every=50): {watched / plain:.3f} of a plain training step of {1e3 * plain:.2f} ms")


if __name__ == "__main__":
    main()
