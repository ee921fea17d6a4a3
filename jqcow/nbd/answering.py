"""Replies to one client: sent together by the thread that receives, one by one by others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from jqcow.nbd.limits import Limits
from jqcow.nbd.protocol import HangUp
from jqcow.nbd.stream import Stream

READY_BYTES_MAX = 1 << 20
"""Of replies that wait for others to be sent with."""

Buffers = list[bytes | bytearray | memoryview]


class Answers:
    """What goes out to a client.

    ``is_pressing`` says that a client which takes nothing is not to be waited for (limits.py, O1).
    ``broken`` is why nothing more is sent.
    """

    def __init__(self, stream: Stream, limits: Limits, is_pressing: Callable[[], bool]) -> None:
        self._stream = stream
        self._limits = limits
        self._is_pressing = is_pressing
        self._sending = threading.Lock()
        self._ready: Buffers = []
        self._ready_bytes = 0
        self.broken: HangUp | None = None

    def add(self, reply: Buffers) -> None:
        """Have a reply sent with others; for the thread that receives, which calls `send_ready`.

        Raises:
            HangUp: as `send`.
        """
        self._ready += reply
        self._ready_bytes += sum(map(len, reply))
        if self._ready_bytes >= READY_BYTES_MAX:
            self.send_ready()

    def send_ready(self) -> None:
        """Send what was added; errors as `send`."""
        if self._ready:
            ready, self._ready, self._ready_bytes = self._ready, [], 0
            self.send(ready)

    def send(self, reply: Buffers) -> None:
        """Send a reply now, unless nothing more is sent.

        Raises:
            HangUp: the client is gone, or takes nothing while that presses.
        """
        with self._sending:
            if self.broken is None:
                since = time.monotonic()
                self._stream.send(reply, lambda: self._may_wait(since))

    def _may_wait(self, since: float) -> bool:
        return time.monotonic() - since <= self._limits.stalled_seconds or not self._is_pressing()

    def give_up(self, error: HangUp) -> None:
        """Send nothing more, and have whoever sends or receives find the end."""
        if self.broken is None:
            self.broken = error
        self._stream.cut()
