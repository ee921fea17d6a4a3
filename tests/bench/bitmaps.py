"""What a write costs beside enabled bitmaps: CPU time, with none and with eight of them.

python -m tests.bench.bitmaps
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from random import Random

import jqcow

WRITES = 20_000
DISK_BYTES = 4 << 30
STEP = 4096


def seconds(folder: str, count: int, way: str) -> float:
    """Return the CPU seconds of so many writes of 4 KiB, to random places, beside ``count`` bitmaps."""
    path, random, data = Path(folder, "image.qcow2"), Random(1), b"x" * STEP
    with jqcow.create(path, DISK_BYTES, overwrite=True) as image:
        places = [random.randrange(DISK_BYTES // STEP) * STEP for _ in range(WRITES)]
        if way == "in place":
            places = [place % (256 << 20) for place in places]
            for offset in range(0, 256 << 20, 1 << 20):
                image.pwrite(b"y" * (1 << 20), offset)
        for number in range(count):
            image.bitmaps.add(str(number), 65536)
        before = time.process_time()
        for place in places:
            image.pwrite(data, place)
        image.flush()
        return time.process_time() - before


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="jqcow-bench-") as folder:
        for way in ("in place", "allocating"):
            # Of several the shortest: others use the machine, too.
            pairs = [(seconds(folder, 0, way), seconds(folder, 8, way)) for _ in range(5)]
            without, beside = (min(pair[at] for pair in pairs) for at in (0, 1))
            print(
                f"{way}: {without / WRITES * 1e6:.1f} us without, {beside / WRITES * 1e6:.1f} us beside 8 "
                f"bitmaps, {beside / without:.2f} x"
            )


if __name__ == "__main__":
    main()
