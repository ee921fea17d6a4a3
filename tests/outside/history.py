"""What a writer process says about its work, and what a disk may hold because of it.

A writer sends messages, one line of JSON each: before an operation, with its ``id``, and after it.

    {"do": "opening"}, {"do": "opened"}                 the image is opened, and recovered if it has to be
    {"do": "write", "id": 7, "at": 512, "length": 1024} an operation begins; also zero, discard, flush
    {"do": "transaction", "id": 8}                      what follows, up to its end, happens inside
    {"do": "savepoint", "id": 10}, {"do": "return", "to": 10}, {"do": "rollback"}, {"do": "commit", "id": 11}
    {"done": 7}, {"failed": 7, "error": "ENOSPC"}       the operation succeeded; it raised
    {"do": "closed"}                                    the image is closed, cleanly

An `Expectation` follows the messages. Offsets and lengths are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from jqcow.testing import FlushMark, Operation, SectorModel, Violation
from jqcow.testing.model import ReadFunction

MessageContent = dict[str, Any]


def data_of(seed: int, operation: int, length: int) -> bytes:
    """Return what an operation of a writer with ``seed`` writes: no two sectors are alike."""
    return Random(f"{seed}/{operation}").randbytes(length)


@dataclass
class _Transaction:
    """The changes of an open transaction, and how many there were at each savepoint."""

    changes: list[tuple[int, bytes]] = field(default_factory=list)
    savepoints: dict[int, int] = field(default_factory=dict)


class Expectation:
    """What the disk may hold now, after a crash or without one.

    There is more than one model where a transaction may be there or not: it is there whole or not at all, so
    a disk must fit one of them as a whole. ``seed`` is the running writer's.
    """

    def __init__(self, size_bytes: int, seed: int = 0) -> None:
        self.seed = seed
        self.models = [SectorModel(size_bytes)]
        self.acknowledged = 0
        self.transactions_committed = 0
        self._running: dict[int, list[Operation]] = {}
        self._flushes: dict[int, tuple[list[SectorModel], list[FlushMark]]] = {}
        self._transaction: _Transaction | None = None
        self._commit: int | None = None

    def copy(self) -> Expectation:
        """Return an independent copy, to judge by: it follows no further messages."""
        twin = Expectation(0, self.seed)
        twin.models = [model.copy() for model in self.models]
        return twin

    def found(self, content: bytes) -> None:
        """After a crash: the next opening found ``content``, which is the only state left."""
        self.models = [SectorModel(len(content), content)]
        self._running, self._flushes, self._transaction, self._commit = {}, {}, None, None

    @property
    def in_transaction(self) -> bool:
        """True while a transaction is open or commits."""
        return self._transaction is not None or self._commit is not None

    def check(self, read: ReadFunction) -> list[Violation]:
        """Return what a disk after a crash holds and must not, by the model that comes closest."""
        return min((model.check(read) for model in self.models), key=len)

    def expect_now(self, read: ReadFunction) -> list[Violation]:
        """Return what the running disk holds and must not."""
        return min((model.expect_now(read) for model in self.models), key=len)

    # Messages

    def tell(self, message: MessageContent) -> None:
        """Follow one message."""
        if "done" in message:
            self._done(message["done"])
        elif "failed" in message:
            self._failed(message["failed"])
        elif self._transaction is not None:
            self._tell_inside(self._transaction, message)
        else:
            self._tell_outside(message)

    def _tell_outside(self, message: MessageContent) -> None:
        match message["do"]:
            case "opening" | "opened" | "closed" | "checkpoint":
                pass
            case "transaction":
                self._transaction = _Transaction()
            case "flush":
                marks = [model.flush_begin() for model in self.models]
                self._flushes[message["id"]] = list(self.models), marks
            case _:
                offset, data = self._change(message)
                self._running[message["id"]] = [model.write(offset, data) for model in self.models]

    def _change(self, message: MessageContent) -> tuple[int, bytes]:
        """Return the offset and the new bytes of an operation that changes the disk."""
        if message["do"] == "write":
            return message["at"], data_of(self.seed, message["id"], message["length"])
        if message["do"] in ("zero", "discard"):
            return message["at"], bytes(message["length"])
        raise ValueError(f"an unknown message: {message}")

    def _tell_inside(self, transaction: _Transaction, message: MessageContent) -> None:
        match message["do"]:
            case "savepoint":
                transaction.savepoints[message["id"]] = len(transaction.changes)
            case "return":
                del transaction.changes[transaction.savepoints[message["to"]] :]
            case "rollback":
                self._transaction = None
            case "commit":
                self._begin_commit(message["id"], transaction)
            case _:
                transaction.changes.append(self._change(message))

    def _begin_commit(self, number: int, transaction: _Transaction) -> None:
        """From here on the transaction may be there, and with it everything that came before it."""
        if self._running:
            raise ValueError("a transaction commits beside other operations")
        self._transaction, self._commit = None, number
        after = self.models[0].copy()
        after.flush_end(after.flush_begin())
        for offset, data in transaction.changes:
            after.write(offset, data, durable=True).complete()
        self.models.append(after)

    def _done(self, number: int) -> None:
        if number == self._commit:
            self.models, self._commit = self.models[-1:], None
            self.acknowledged += 1
            self.transactions_committed += 1
        elif number in self._flushes:
            self._end_flush(*self._flushes.pop(number))
        else:
            for operation in self._running.pop(number, ()):
                operation.complete()

    def _end_flush(self, models: list[SectorModel], marks: list[FlushMark]) -> None:
        # A commit that failed before this flush began did not happen, for good.
        self.models = [model for model in self.models if model is models[0] or model not in models]
        models[0].flush_end(marks[0])
        self.acknowledged += 1

    def _failed(self, number: int) -> None:
        """The operation may have happened, or not: each sector is as before or as asked for."""
        self._running.pop(number, None)
        self._flushes.pop(number, None)
        if number == self._commit:
            # The disk does not show it; a record that came half-way may bring it back, until the next flush.
            self._commit = None
