"""A player does the steps of `tests.support.operations` on the image of a session, one after another."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random
from typing import Any

from jqcow.testing import EVERYTHING, SECTOR_BYTES, Fault, FaultPlan
from tests.support.expectation import Windows
from tests.support.operations import DRAWN, LEAVING, OPERATIONS, Step
from tests.support.telling import Block, Teller
from tests.support.users import Draft, DraftPoint, Session, User


class Player(Teller):
    """Does steps. ``draft`` is the open transaction, ``savepoints`` are those within it."""

    def __init__(self, session: Session, random: Random) -> None:
        """Take a session, which may have its image open, and what chance decides by."""
        windows = session.windows
        super().__init__(windows.cluster_bytes, windows.window_bytes, random)
        self.session = session
        self.draft: Draft | None = None
        self.savepoints: list[DraftPoint] = []
        self._context: Any = None

    @property
    def windows(self) -> Windows:
        """The parts of the disk that are used."""
        return self.session.windows

    @property
    def cluster_bytes(self) -> int:
        """Of the image."""
        return self.windows.cluster_bytes

    @property
    def user(self) -> User:
        """Who does what comes next: the transaction, if one is open, or the session."""
        return self.session if self.draft is None else self.draft

    @property
    def drafted(self) -> Draft:
        """The open transaction."""
        if self.draft is None:
            raise RuntimeError("no transaction is open")
        return self.draft

    # Steps

    def tell_block(self, block: Block) -> None:
        """Tell what a block asks for, also while the host fails."""
        kind, *how = block.head.split(":")
        if kind == "fail":
            with self.faults(some_fault(self.random) if how == ["some"] else self._plan(how)):
                self.tell(block.choices[0])
        elif kind == "try":
            with suppress(OSError):
                self.tell(block.choices[0])
        else:
            super().tell_block(block)

    def _plan(self, how: list[str]) -> FaultPlan:
        """Return the plan of a story's words, which are drawn in their order."""
        call, error, numbers = "pwrite", "EIO", {"at": 1, "applied": 0, "full": 0, "room": -1}
        for name, _, value in (word.partition("=") for word in how):
            if name == "call":
                call = self.values.choose(value)
            elif name == "error":
                error = self.values.choose(value)
            else:
                numbers[name] = self.values.read(value)
        if numbers["full"]:
            return FaultPlan(full_from=numbers["full"])
        if numbers["room"] >= 0:
            return FaultPlan(capacity_bytes=self.session.device.used_bytes + numbers["room"])
        applied = numbers["applied"]
        return FaultPlan(Fault(getattr(errno, error), at=numbers["at"], call=call, applied_bytes=applied))

    def _draw(self, kind: str, count: int = 1, flush_every: int = 0) -> None:
        for number in range(1, count + 1):
            self.perform(DRAWN[kind](self))
            if flush_every and number % flush_every == 0:
                self.session.flush()

    def perform(self, step: Step) -> None:
        """Do one step, or nothing where it makes no sense."""
        if step.kind in DRAWN:
            self._draw(step.kind, *map(int, step.arguments))
            return
        operation = OPERATIONS[step.kind]
        act = operation.outside if self.draft is None else operation.inside
        if act is None:
            return
        if self.draft is None and self.session.image is None:
            if step.kind in LEAVING:
                return
            self.be_open()
        act(self, *step.arguments)

    def be_open(self) -> None:
        """Open the image if it is not, or create it."""
        if self.session.image is not None:
            return
        if self.session.expectation.exists:
            self.session.open()
        else:
            self.session.create(self.session.expectation.sizes[-1])

    def look(self) -> None:
        """What is read now is what was asked for, in the transaction and beside it."""
        self.user.look()

    # Transactions

    def begin(self) -> None:
        """Open a transaction."""
        context = self.session.transaction()
        self.draft = context.__enter__()
        self._context, self.savepoints = context, []

    def commit(self) -> None:
        """End the transaction: by a commit, unless it was rolled back or its process killed."""
        context, self._context, self.draft = self._context, None, None
        context.__exit__(None, None, None)

    def leave(self, error: BaseException) -> None:
        """Leave the transaction, if one is open, by an exception."""
        context, self._context, self.draft = self._context, None, None
        if context is not None:
            with suppress(type(error)):
                assert not context.__exit__(type(error), error, error.__traceback__)

    def return_to(self, number: int) -> None:
        """Go back to a savepoint, which stays; later ones are gone."""
        if self.savepoints:
            kept = number % len(self.savepoints) + 1
            del self.savepoints[kept:]
            self.drafted.return_to(self.savepoints[-1])

    # Errors of the host

    @contextmanager
    def faults(self, plan: FaultPlan) -> Iterator[None]:
        """Let the host fail meanwhile, as `Session.faults`: an error ends an open transaction too."""
        with self.session.faults(plan):
            try:
                yield
            except OSError as error:
                self.leave(error)
                raise


FAILURES = {
    "EIO": (errno.EIO, 0),
    "ENOSPC": (errno.ENOSPC, 0),
    "short": (errno.EIO, SECTOR_BYTES),
    "late": (errno.EIO, EVERYTHING),
}
"""How a call of the host may fail: its error, and how many bytes of it happen all the same."""


def some_fault(chance: Random) -> FaultPlan:
    """Return a plan by which a call of the host fails, or its disk is full."""
    if chance.random() < 0.15:
        return FaultPlan(full_from=chance.randint(1, 8))
    call = chance.choice(("pwrite", "pwrite", "pwrite", "barrier", "allocate", "punch"))
    applied = chance.choice((0, 512, 4096, EVERYTHING))
    at = chance.randint(1, 3 if call == "barrier" else 6)
    return FaultPlan(Fault(errno.EIO, at=at, call=call, applied_bytes=applied))
