"""The writer that strace watches: allocating writes, each with a flush and a mark behind it."""

from __future__ import annotations

import os
import sys

import jqcow
from tools.benchmark.barriers import CLUSTER_BYTES, FLUSH_MARK, WRITE_BYTES


def main() -> None:
    """Write to the new image PATH with COUNT flushes; print the numbers of those that did more.

    They ended an epoch, or brought home what waited in the journal.
    """
    path, flushes = sys.argv[1], int(sys.argv[2])
    data = b"\xa5" * WRITE_BYTES
    nowhere = os.open(os.devnull, os.O_RDONLY)
    with jqcow.create(path, flushes * CLUSTER_BYTES, overwrite=True, cluster_size=CLUSTER_BYTES) as image:
        os.lseek(nowhere, FLUSH_MARK, os.SEEK_SET)
        epoch = waiting = 0
        for index in range(flushes):
            image.pwrite(data, index * CLUSTER_BYTES)
            image.flush()
            os.lseek(nowhere, FLUSH_MARK, os.SEEK_SET)
            log = image._engine.log
            before = epoch, waiting
            epoch, waiting = log.require_journal().epoch, log.pending.count
            if index and (epoch != before[0] or waiting < before[1]):
                print(index)


if __name__ == "__main__":
    main()
