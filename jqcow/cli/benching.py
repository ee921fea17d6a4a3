"""The command that times requests: bench, spelled as in qemu-img."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

from jqcow.cli import common, names, secrets
from jqcow.cli.common import CommandError, parse_size

_COUNT = 75000
_DEPTH_MAX = 1024
_BYTES_MAX = 1 << 31

Request = Callable[[int], object]
"""Does one request, at an offset in bytes."""
Disk = tuple[int, Request, Callable[[], None]]
"""Its size in bytes, a request, and a flush."""


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    parser = commands.add_parser(
        "bench",
        help="time requests to a disk",
        description="Send requests to a disk, one behind the other, and say how long they take.",
    )
    common.add_format(parser)
    names.add_image_opts(parser)
    names.add_objects(parser)
    secrets.add_passphrase(parser)
    common.add_allow_files(parser)
    common.add_force_share(parser)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("-c", dest="count", default=_COUNT, help="requests (75000)", **number)
    parser.add_argument("-d", dest="depth", default=64, help="at a time (64)", **number)
    parser.add_argument("-s", dest="length", metavar="SIZE", default="4k", help="of a request (4k)")
    parser.add_argument("-S", dest="step", metavar="SIZE", help="from one to the next (that of a request)")
    parser.add_argument("-o", dest="offset", metavar="OFFSET", default="0", help="of the first one (0)")
    parser.add_argument("-w", dest="writes", action="store_true", help="write: the disk's content is lost")
    parser.add_argument("--pattern", default=0, help="the byte that is written (0)", **number)
    parser.add_argument("--flush-interval", default=0, help="with -w: flush after so many", **number)
    parser.add_argument("--no-drain", action="store_true", help="flush while requests are under way")
    common.add_cache(parser, "-t", "-i")
    parser.add_argument("-n", action="store_true", help="taken as qemu-img takes it, and not needed")
    common.add_quiet(parser)
    parser.add_argument("image", metavar="IMAGE")
    parser.set_defaults(command=bench_command)


def bench_command(arguments: argparse.Namespace) -> int:
    """Time requests."""
    length = parse_size(arguments.length, unit=1)
    step = length if arguments.step is None else parse_size(arguments.step, unit=1)
    offset = parse_size(arguments.offset, unit=1)
    _check(arguments, length, step)
    with _opened(arguments, length) as (size, request, flush):
        if length > size:
            raise CommandError(f"a request of {length} bytes does not fit into a disk of {size} bytes")
        if not arguments.quiet:
            _announce(arguments, length, step, offset)
        started = time.monotonic()
        _run(arguments, _offsets(size, offset, length, step), request, flush)
        seconds = time.monotonic() - started
    if not arguments.quiet:
        unit = f", {arguments.count / seconds:.0f} requests/s" if not arguments.profile.is_qemu else ""
        print(f"Run completed in {seconds:.3f} seconds{unit}.")
    return common.EXIT_OK


def _check(arguments: argparse.Namespace, length: int, step: int) -> None:
    if arguments.count < 1 or not 1 <= arguments.depth <= _DEPTH_MAX:
        raise CommandError(f"-c is at least 1, and -d from 1 to {_DEPTH_MAX}")
    if not 0 < length < _BYTES_MAX or step < 0:
        raise CommandError("a request has from 1 byte to 2 GiB")
    if not 0 <= arguments.pattern <= 0xFF:
        raise CommandError("--pattern is a byte, 0 to 255")
    if arguments.flush_interval and not arguments.writes:
        raise CommandError("--flush-interval is only available in write tests")
    if arguments.flush_interval and arguments.flush_interval < arguments.depth:
        raise CommandError("Flush interval can't be smaller than depth")


def _announce(arguments: argparse.Namespace, length: int, step: int, offset: int) -> None:
    kind = "write" if arguments.writes else "read"
    print(
        f"Sending {arguments.count} {kind} requests, {length} bytes each, {arguments.depth} in parallel "
        f"(starting at offset {offset}, step size {step})"
    )
    if arguments.flush_interval:
        print(f"Sending flush every {arguments.flush_interval} requests")


def _opened(arguments: argparse.Namespace, length: int) -> AbstractContextManager[Disk]:
    return (
        _to_write(arguments, bytes([arguments.pattern]) * length)
        if arguments.writes
        else _to_read(arguments, length)
    )


@contextmanager
def _to_read(arguments: argparse.Namespace, length: int) -> Iterator[Disk]:
    from jqcow.disks.chain import open_disk
    from jqcow.disks.policy import Following

    following = Following(
        arguments.allow_files,
        arguments.probe,
        share_writers=arguments.force_share,
        passphrase=secrets.passphrase_of(arguments),
    )
    with common.opening(arguments, arguments.image):
        chain = open_disk(arguments.image, common.disk_format(arguments.format), following=following)
    with closing(chain):
        # Each request has a buffer of its own, as a guest's has.
        yield chain.size, lambda offset: chain.read_into(memoryview(bytearray(length)), offset), lambda: None


@contextmanager
def _to_write(arguments: argparse.Namespace, data: bytes) -> Iterator[Disk]:
    import jqcow

    name = getattr(arguments, "given", arguments.image)
    if arguments.force_share:
        raise CommandError(f"Could not open '{name}': force-share=on can only be used with read-only images")
    if arguments.format == "raw":
        raise CommandError(f"{name}: bench writes to qcow2 images alone")
    with common.opening(arguments, arguments.image, to_write=True):
        image = jqcow.open(
            arguments.image,
            "r+",
            allow_files=arguments.allow_files,
            probe=arguments.probe,
            passphrase=secrets.passphrase_of(arguments),
        )
    with image:
        yield image.size, lambda offset: image.pwrite(data, offset), image.flush


def _offsets(size: int, offset: int, length: int, step: int) -> Iterator[int]:
    """Yield where requests begin; behind the disk's end comes its start."""
    while True:
        offset = offset if offset + length <= size else 0
        yield offset
        offset += step


def _run(
    arguments: argparse.Namespace, offsets: Iterator[int], request: Request, flush: Callable[[], None]
) -> None:
    """Do the requests, so many at a time, in rounds that a flush ends."""
    interval = arguments.flush_interval or arguments.count
    if arguments.depth == 1:
        for done in range(1, arguments.count + 1):
            request(next(offsets))
            if arguments.flush_interval and done % interval == 0:
                flush()
        return
    with ThreadPoolExecutor(min(arguments.depth, arguments.count)) as threads:
        for start in range(0, arguments.count, interval):
            count = min(interval, arguments.count - start)
            for _ in threads.map(request, [next(offsets) for _ in range(count)]):
                pass
            if arguments.flush_interval and count == interval:
                flush()
