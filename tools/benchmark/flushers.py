"""The process that strace watches: threads that write and flush one image, between two marks."""

from __future__ import annotations

import os
import sys
from threading import Thread

import jqcow
from tools.benchmark.barriers import CLUSTER_BYTES, FLUSH_MARK, WRITE_BYTES


def main() -> None:
    """On the new image PATH let THREADS threads each make FLUSHES flushes, each after an allocating write."""
    path, threads, flushes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    data = b"\xa5" * WRITE_BYTES
    nowhere = os.open(os.devnull, os.O_RDONLY)
    size = (threads * flushes + 1) * CLUSTER_BYTES
    with jqcow.create(path, size, overwrite=True, cluster_size=CLUSTER_BYTES) as image:
        image.pwrite(data, threads * flushes * CLUSTER_BYTES)
        image.flush()

        def work(number: int) -> None:
            for index in range(number * flushes, (number + 1) * flushes):
                image.pwrite(data, index * CLUSTER_BYTES)
                image.flush()

        workers = [Thread(target=work, args=(number,)) for number in range(threads)]
        os.lseek(nowhere, FLUSH_MARK, os.SEEK_SET)
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        os.lseek(nowhere, FLUSH_MARK, os.SEEK_SET)


if __name__ == "__main__":
    main()
