"""The command line of `tools/bench`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import figures
from tools.benchmark.barriers import compare_barriers
from tools.benchmark.calls import compare_calls
from tools.benchmark.compress import compare_compression
from tools.benchmark.images import compare_images
from tools.benchmark.nbd import compare_servers
from tools.benchmark.speed import compare_speed
from tools.benchmark.threads import count_shared


@contextmanager
def directory_for(chosen: str | None) -> Iterator[Path]:
    """Yield the directory for the images; a temporary one is removed afterwards."""
    if chosen is not None:
        yield Path(chosen)
        return
    with tempfile.TemporaryDirectory(prefix="jqcow-bench-") as folder:
        yield Path(folder)


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; return the exit status."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--directory", help="where the images lie")
    common.add_argument("--output", choices=("human", "json"), default="human")
    common.add_argument("--record", default="", metavar="FILE", help="write the figures as JSON")
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    barriers = parts.add_parser("barriers", parents=[common], help="count sync-like system calls")
    barriers.add_argument("--flushes", type=int, default=10_000)
    threads = parts.add_parser("threads", parents=[common], help="count them when threads flush together")
    threads.add_argument("--flushes", type=int, default=10_000, help="of all threads together")
    threads.add_argument("--threads", type=int, default=8)
    speed = parts.add_parser("speed", parents=[common], help="time the same work by both")
    speed.add_argument("--rounds", type=int, default=7)
    speed.add_argument("--share", type=float, default=1.0, help="of the operations")
    compress = parts.add_parser("compress", parents=[common], help="time convert -c by both")
    compress.add_argument("--rounds", type=int, default=5)
    compress.add_argument("--size", type=int, default=128, metavar="MIB", help="of the disk")
    images = parts.add_parser("images", parents=[common], help="processor time of verbs on a whole image")
    images.add_argument("--rounds", type=int, default=7)
    images.add_argument("--size", type=int, default=1024, metavar="GIB", help="of the disk, all mapped")
    nbd = parts.add_parser("nbd", parents=[common], help="the same work through NBD, beside qemu-nbd")
    nbd.add_argument("--rounds", type=int, default=7)
    nbd.add_argument("--requests", type=int, default=20_000, help="of each kind without flushes")
    nbd.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the disk that is copied")
    calls = parts.add_parser("calls", parents=[common], help="CPU time per call, beside another checkout")
    calls.add_argument("other", type=Path, metavar="CHECKOUT")
    calls.add_argument("--rounds", type=int, default=5)
    calls.add_argument("--calls", type=int, default=20_000, help="of the cheap kinds")
    options = parser.parse_args(arguments)
    with directory_for(options.directory) as folder:
        if options.part == "barriers":
            counts = compare_barriers(folder, options.flushes)
            text, data = counts.format_table(), dataclasses.asdict(counts)
            status = 0 if counts.kept else 1
        elif options.part == "threads":
            share = count_shared(folder, options.threads, options.flushes)
            text, data, status = share.format_table(), dataclasses.asdict(share), 0 if share.kept else 1
        elif options.part == "calls":
            costs = compare_calls(folder, options.rounds, options.calls, options.other.resolve())
            text, data, status = costs.format_table(), dataclasses.asdict(costs), 0
        elif options.part == "nbd":
            served = compare_servers(folder, options.rounds, options.requests, options.size << 20)
            text, data, status = served.format_table(), dataclasses.asdict(served), 0
        elif options.part == "images":
            verbs = compare_images(folder, options.rounds, options.size << 30)
            text, data, status = verbs.format_table(), dataclasses.asdict(verbs), 0
        elif options.part == "compress":
            works = compare_compression(folder, options.rounds, options.size << 20)
            text, data, status = works.format_table(), dataclasses.asdict(works), 0
        else:
            speeds = compare_speed(folder, options.rounds, options.share)
            text, data, status = speeds.format_table(), dataclasses.asdict(speeds), 0
    figures.record(options.record, {}, text=text, program="tools/bench")
    print(json.dumps(data, indent=2) if options.output == "json" else text)
    return status


if __name__ == "__main__":
    sys.exit(main())
