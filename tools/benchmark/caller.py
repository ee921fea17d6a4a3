"""The process whose CPU time is measured: calls on one image, of whichever jqcow it imports.

Prints, as JSON, the CPU time of one call of each kind in microseconds.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterable

import jqcow

CLUSTER_BYTES = 65536
PAGE_BYTES = 4096
MAPPED_CLUSTERS = 512
DISK_CLUSTERS = 16384


def microseconds_each(call: Callable[[int], object], offsets: Iterable[int]) -> float:
    """Call with each offset; return the CPU time of one call."""
    offsets = list(offsets)
    started = time.process_time()
    for offset in offsets:
        call(offset)
    return (time.process_time() - started) / len(offsets) * 1e6


def measure(image: jqcow.Image, calls: int) -> dict[str, float]:
    """Return what the calls cost; ``calls`` of the cheap ones, less of the others."""
    page, cluster = b"\xa5" * PAGE_BYTES, b"\x5a" * CLUSTER_BYTES
    places = random.Random(1)
    pages = MAPPED_CLUSTERS * CLUSTER_BYTES // PAGE_BYTES
    for offset in range(0, MAPPED_CLUSTERS * CLUSTER_BYTES, CLUSTER_BYTES):
        image.pwrite(cluster, offset)
    image.flush()
    few = calls // 20
    free = iter(range(MAPPED_CLUSTERS, DISK_CLUSTERS))

    def fresh(count: int) -> list[int]:
        return [next(free) * CLUSTER_BYTES for _ in range(count)]

    def anywhere() -> list[int]:
        return [places.randrange(pages) * PAGE_BYTES for _ in range(calls)]

    def allocate_and_flush(offset: int) -> None:
        image.pwrite(page, offset)
        image.flush()

    image.pread(MAPPED_CLUSTERS * CLUSTER_BYTES, 0)
    found = {
        "read of 4 KiB": microseconds_each(lambda offset: image.pread(PAGE_BYTES, offset), anywhere()),
        "write of 4 KiB in place": microseconds_each(lambda offset: image.pwrite(page, offset), anywhere()),
        "allocating write of 4 KiB, flush": microseconds_each(allocate_and_flush, fresh(few)),
    }
    large = fresh(few)
    found["allocating write of 64 KiB"] = microseconds_each(lambda at: image.pwrite(cluster, at), large)
    image.flush()
    found["discard of a cluster"] = microseconds_each(lambda at: image.discard(CLUSTER_BYTES, at), large)
    image.flush()
    return found


def main() -> None:
    """Measure on the new image PATH."""
    path, calls = sys.argv[1], int(sys.argv[2])
    with jqcow.create(path, DISK_CLUSTERS * CLUSTER_BYTES, overwrite=True) as image:
        print(json.dumps({"jqcow": jqcow.__file__, "microseconds": measure(image, calls)}))


if __name__ == "__main__":
    main()
