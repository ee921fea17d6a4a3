"""How far a long command is: a bar, lines, or JSON lines, on stderr; as qemu-img, percent on stdout."""

from __future__ import annotations

import argparse
import json
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

from jqcow.cli.common import human_size

if TYPE_CHECKING:
    from jqcow.device.disk import Extent
    from jqcow.offline.compare import Progress

ProgressKind = Literal["none", "bar", "lines", "json", "percent"]
BAR_WIDTH = 40
SECONDS_BETWEEN = 0.1
LINE_PERCENT = 10


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add ``-p`` and ``--progress``."""
    parser.add_argument("-p", dest="progress", action="store_const", const="auto", help="show progress")
    parser.add_argument(
        "--progress",
        choices=("bar", "lines", "json"),
        help="show progress as a bar, as lines, or as JSON lines, on stderr",
    )


def progress_kind(arguments: argparse.Namespace) -> ProgressKind:
    """Return how progress is to be shown: on a terminal as a bar, elsewhere as lines, if asked for."""
    if arguments.progress is None or (arguments.quiet and arguments.progress == "auto"):
        return "none"
    if arguments.progress == "auto" and arguments.profile.is_qemu:
        return "percent"
    if arguments.progress == "auto":
        return "bar" if sys.stderr.isatty() else "lines"
    kind: ProgressKind = arguments.progress
    return kind


def progress_of(arguments: argparse.Namespace) -> AbstractContextManager[Progress]:
    """Give a function that shows how far a command is, as its arguments ask for it."""
    kind = progress_kind(arguments)
    if kind == "percent":
        return shown_percent(sys.stdout, getattr(arguments, "allocated", None))
    return shown_progress(kind, sys.stderr, arguments.verb)


class Allocated:
    """How much of a disk is data up to an offset: qemu-img's progress counts nothing else."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        """Take the disk's extents, in order."""
        self._ends, self._sums = [0], [0]
        for extent in extents:
            if extent.holds_data:
                self._ends += (extent.offset, extent.end)
                self._sums += (self._sums[-1], self._sums[-1] + extent.length)

    def share(self, done: int) -> float:
        """Return which share of the data lies before an offset; where there is none, nothing."""
        if not self._sums[-1]:
            return 0
        index = bisect_right(self._ends, done) - 1
        # Every other range is data.
        inside = done - self._ends[index] if index % 2 and index + 1 < len(self._ends) else 0
        return (self._sums[index] + inside) / self._sums[-1]


@contextmanager
def shown_percent(stream: TextIO, allocated: Allocated | None = None) -> Iterator[Progress]:
    """Give a function that shows percent as qemu-img does: each one once, 0 and 100 always."""
    shown = 0.0

    def show(percent: float) -> None:
        stream.write(f"    ({percent:.2f}/100%)\r")
        stream.flush()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        share = allocated.share(done) if allocated is not None else done / total if total else 1
        if 100 * share > shown + 1:
            shown = 100 * share
            show(shown)

    show(0)
    try:
        yield progress
        show(100)
    finally:
        stream.write("\n")


@contextmanager
def shown_progress(kind: ProgressKind, stream: TextIO, description: str) -> Iterator[Progress]:
    """Give a function that shows how far the work is, no oftener than people can read."""
    shown = _Shown(kind, stream, description)
    try:
        yield shown
    finally:
        shown.end()


class _Shown:
    """Shows progress on a stream. Percentages only rise until a new pass (verification) begins."""

    def __init__(self, kind: ProgressKind, stream: TextIO, description: str) -> None:
        self._kind = kind
        self._description = description
        self._started = time.monotonic()
        self._stream = stream
        self._last_time = -SECONDS_BETWEEN
        self._last_percent = -1
        self._has_bar = False

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        if self._kind == "none" or percent == self._last_percent:
            return
        if (
            self._kind == "lines"
            and percent % LINE_PERCENT
            and percent // LINE_PERCENT == (self._last_percent // LINE_PERCENT)
        ):
            return
        now = time.monotonic()
        if self._kind != "lines" and done not in (0, total) and now - self._last_time < SECONDS_BETWEEN:
            return
        self._last_time, self._last_percent = now, percent
        self._show(done, total, percent)

    def _show(self, done: int, total: int, percent: int) -> None:
        if self._kind == "json":
            told = {
                "transferred": done,
                "size": total,
                "elapsed": round(time.monotonic() - self._started, 3),
                "description": self._description,
            }
            print(json.dumps(told), file=self._stream, flush=True)
        elif self._kind == "lines":
            print(f"{percent}% of {human_size(total)}", file=self._stream, flush=True)
        else:
            filled = "#" * (BAR_WIDTH * percent // 100)
            self._stream.write(f"\r[{filled:<{BAR_WIDTH}}] {percent:3}% of {human_size(total)}")
            self._stream.flush()
            self._has_bar = True

    def end(self) -> None:
        """Leave the line of the bar."""
        if self._has_bar:
            self._stream.write("\n")
