"""How far a long command is: a bar, lines, or JSON lines, on stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, TextIO

from jqcow.cli.common import human_size
from jqcow.offline.compare import Progress

ProgressKind = Literal["none", "bar", "lines", "json"]
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
    if arguments.progress == "auto":
        return "bar" if sys.stderr.isatty() else "lines"
    kind: ProgressKind = arguments.progress
    return kind


def progress_of(arguments: argparse.Namespace) -> AbstractContextManager[Progress]:
    """Give a function that shows how far a command is, as its arguments ask for it."""
    return shown_progress(progress_kind(arguments), sys.stderr, arguments.verb)


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
