"""What all clients of a server together may take: connections, time to say what they want, and memory.

O1. The data of requests in flight, over all clients, stays within a budget: who would go beyond waits, and
    reads nothing more from its client meanwhile. A client that takes no replies while others wait for the
    budget is hung up on, so that it cannot keep them waiting.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from jqcow.nbd.protocol import PAYLOAD_BYTES_MAX, HangUp

_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """What a server grants.

    Attributes:
        clients: connections at a time; further ones wait in the listening queue.
        handshake_seconds: until a client has chosen an export.
        stalled_seconds: a client that takes no reply for so long is hung up on, if others need its memory.
        stop_seconds: how long a stopping server waits for the requests in flight before it cuts clients off.
        inflight_bytes: data of requests in flight, of all clients.
        workers: threads for the requests of one client.
    """

    clients: int = 64
    handshake_seconds: float = 30.0
    stalled_seconds: float = 30.0
    stop_seconds: float = 10.0
    inflight_bytes: int = 256 << 20
    workers: int = 8

    def __post_init__(self) -> None:
        """Refuse what no server can work with."""
        if self.clients < 1 or self.workers < 1:
            raise ValueError("a server needs room for a client, and a thread for its requests")
        if self.inflight_bytes < PAYLOAD_BYTES_MAX:
            raise ValueError(f"one request may have {PAYLOAD_BYTES_MAX} bytes: a server needs room for them")


class Owner(Protocol):
    """Who takes bytes of a budget, by one thread."""

    def is_over(self) -> bool:
        """Return True if nobody needs the bytes any more."""
        ...


class Budget:
    """Bytes that requests in flight may have together (O1)."""

    def __init__(self, total_bytes: int) -> None:
        self._free_bytes = total_bytes
        self._changed = threading.Condition()
        self.waiting: set[Owner] = set()
        """Who waits for bytes."""

    def is_short_for_others(self, owner: Owner) -> bool:
        """Return True while somebody else waits."""
        return bool(self.waiting) and self.waiting != {owner}

    def take(self, length: int, owner: Owner) -> None:
        """Take ``length`` bytes, at most the whole; wait until there are so many.

        Raises:
            HangUp: nobody needs them any more.
        """
        with self._changed:
            if length > self._free_bytes:
                self._wait(length, owner)
            self._free_bytes -= length

    def _wait(self, length: int, owner: Owner) -> None:
        self.waiting.add(owner)
        try:
            while length > self._free_bytes:
                if owner.is_over():
                    raise HangUp("the server stops")
                self._changed.wait(_LOOK_SECONDS)
        finally:
            self.waiting.discard(owner)

    def give_back(self, length: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._free_bytes += length
            if self.waiting:
                self._changed.notify_all()
