"""A real process that works on a real image and says what it does, for the tests that look from outside.

    python -m tests.outside.writer IMAGE --seed 1 --operations 50 --create 1048576 --cluster-size 65536

It sends its messages (see history.py) to the standard output, each by one write: before an operation, and
after it. Its exit status is 0 if all went well, 3 if an operation raised ``OSError``.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from random import Random
from typing import Any

import jqcow
from jqcow.image.transaction import Transaction
from tests.outside.history import data_of
from tests.support.operations import Discard, Request, Write, WriteZeroes

SECTOR_BYTES = 512
JOURNAL_BYTES = 64 << 10
FAILED_STATUS = 3

# What is done outside transactions, and how often.
OPERATIONS = {"write": 12, "zero": 2, "discard": 3, "flush": 5, "transaction": 3, "checkpoint": 1}
CHANGES = {"write": 8, "zero": 1, "discard": 2}


def say(**message: Any) -> None:
    """Send a message, whole: a line this short is never split by a pipe."""
    os.write(1, json.dumps(message).encode() + b"\n")


def failure(number: int, error: OSError) -> dict[str, Any]:
    """Return the message that an operation raised."""
    return {"failed": number, "error": errno.errorcode.get(error.errno or 0, "unknown")}


class Writer:
    """Does random operations on the part of a disk from ``start`` to ``end``.

    ``numbers`` makes the ids of operations; writers of one process share it.
    """

    def __init__(
        self, image: jqcow.Image, seed: int, random: Random, numbers: Iterator[int], start: int, end: int
    ) -> None:
        self.image = image
        self.seed = seed
        self.random = random
        self.numbers = numbers
        self.start = start
        self.end = end
        self.failures = 0
        self.cluster_bytes = image.info().cluster_size

    def work(self, operations: int, kinds: dict[str, int]) -> None:
        """Do so many operations, of random kinds; stop early where the image has turned read-only."""
        for _ in range(operations):
            kind = self.choose(kinds)
            try:
                if kind == "transaction":
                    self.transaction()
                else:
                    self.operate(kind, self.image)
            except jqcow.PoisonedError:
                return
            except OSError:
                # Said already; the image must serve on.
                self.failures += 1

    def choose(self, kinds: dict[str, int]) -> str:
        """Return one of the kinds, by their weights."""
        return self.random.choices(list(kinds), list(kinds.values()))[0]

    @contextmanager
    def said(self, kind: str, **details: int) -> Iterator[int]:
        """Say that an operation begins, and how it ended; its id is the value."""
        number = next(self.numbers)
        say(do=kind, id=number, **details)
        try:
            yield number
        except OSError as error:
            say(**failure(number, error))
            raise
        say(done=number)

    def operate(self, kind: str, target: jqcow.Image | Transaction) -> None:
        """Do one operation on the image or inside a transaction."""
        if kind in ("flush", "checkpoint"):
            with self.said(kind):
                (self.image.flush if kind == "flush" else self.image.checkpoint)()
            return
        offset, length = self.range_for(kind)
        with self.said(kind, at=offset, length=length) as number:
            if kind == "write":
                request: Request = Write(offset, data_of(self.seed, number, length))
            elif kind == "zero":
                request = WriteZeroes(offset, length, self.random.random() < 0.5)
            else:
                request = Discard(offset, length)
            request.on(target)

    def range_for(self, kind: str) -> tuple[int, int]:
        """Return offset and length of a range: sectors, or whole clusters where the operation needs them."""
        unit = self.cluster_bytes if kind == "discard" or self.random.random() < 0.3 else SECTOR_BYTES
        units = (self.end - self.start) // unit
        at = self.random.randrange(units)
        length = min(units - at, self.random.choice((1, 1, 2, 5)))
        return self.start + at * unit, length * unit

    def transaction(self) -> None:
        """Do a transaction: some changes, perhaps a savepoint, then a commit or a rollback."""
        say(do="transaction", id=next(self.numbers))
        committing: int | None = None
        try:
            with self.image.transaction() as transaction:
                self.change_some(transaction)
                if self.random.random() < 0.4:
                    self.go_back_perhaps(transaction)
                if self.random.random() < 0.25:
                    transaction.rollback()
                else:
                    committing = next(self.numbers)
                    say(do="commit", id=committing)
        except OSError as error:
            say(**({"do": "rollback"} if committing is None else failure(committing, error)))
            raise
        say(**({"do": "rollback"} if committing is None else {"done": committing}))

    def go_back_perhaps(self, transaction: Transaction) -> None:
        """Make a savepoint and some changes, and in most cases undo them."""
        savepoint, number = transaction.savepoint(), next(self.numbers)
        say(do="savepoint", id=number)
        self.change_some(transaction)
        if self.random.random() < 0.6:
            savepoint.rollback()
            say(do="return", to=number)

    def change_some(self, transaction: Transaction) -> None:
        """Make a few changes inside a transaction."""
        for _ in range(self.random.randrange(1, 5)):
            self.operate(self.choose(CHANGES), transaction)


def work_in_threads(image: jqcow.Image, seed: int, operations: int, threads: int) -> int:
    """Let threads work beside each other, each on its own part of the disk; return how many calls failed."""
    numbers = count()
    part = image.size // threads
    kinds = {kind: weight for kind, weight in OPERATIONS.items() if kind != "transaction"}
    writers = [
        Writer(image, seed, Random(f"{seed}/{index}"), numbers, index * part, (index + 1) * part)
        for index in range(threads)
    ]
    running = [
        threading.Thread(target=writer.work, args=(operations // threads, kinds)) for writer in writers
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(writer.failures for writer in writers)


def parse_arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="writer")
    parser.add_argument("image")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--operations", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--create", type=int, metavar="BYTES", help="make a new image of this size")
    parser.add_argument("--cluster-size", type=int, default=65536)
    parser.add_argument("--end", choices=("close", "exit"), default="close", help="exit: without closing")
    return parser.parse_args()


def opener(options: argparse.Namespace) -> Callable[[], jqcow.Image]:
    """Return what opens or creates the image."""
    if options.create is None:
        return lambda: jqcow.open(options.image, "r+", journal_size=JOURNAL_BYTES)
    return lambda: jqcow.create(
        options.image, options.create, cluster_size=options.cluster_size, journal_size=JOURNAL_BYTES
    )


def main() -> int:
    """Work as told; return the exit status."""
    options = parse_arguments()
    try:
        say(do="opening")
        image = opener(options)()
        say(do="opened")
        if options.threads > 1:
            failures = work_in_threads(image, options.seed, options.operations, options.threads)
        else:
            writer = Writer(image, options.seed, Random(options.seed), count(), 0, image.size)
            writer.work(options.operations, OPERATIONS)
            failures = writer.failures
        if options.end == "exit":
            # As a killed process ends: nothing is flushed, nothing is closed.
            os._exit(FAILED_STATUS if failures else 0)
        image.close()
        say(do="closed")
    except OSError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILED_STATUS
    return FAILED_STATUS if failures else 0


if __name__ == "__main__":
    sys.exit(main())
