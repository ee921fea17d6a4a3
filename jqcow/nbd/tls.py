"""TLS over a connection that two threads use: one receives, another one sends.

OpenSSL's state is for one thread at a time, so it is worked on in memory, with a lock, and the socket is used
without it.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Sequence

from jqcow.nbd.protocol import HangUp

RECEIVED_BYTES = 256 << 10
WRITTEN_BYTES = 1 << 20
"""Encrypted before it is sent: it bounds memory."""


class Tls:
    """The server's side of one TLS session.

    ``receive`` fills a buffer from the connection and returns how much it took; ``send`` sends all of one.
    Both raise `HangUp`.
    """

    def __init__(
        self, context: ssl.SSLContext, receive: Callable[[memoryview], int], send: Callable[[bytes], None]
    ) -> None:
        self._receive = receive
        self._send = send
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._using = threading.Lock()
        self._sending = threading.Lock()
        self._buffer = memoryview(bytearray(RECEIVED_BYTES))

    def shake_hands(self) -> None:
        """Agree with the client on keys.

        Raises:
            HangUp: it is gone, or is not one to be served.
        """
        while True:
            try:
                self._session.do_handshake()
            except ssl.SSLWantReadError:
                self._send_pending()
                self._fill()
            except ssl.SSLError as error:
                self._send_pending()
                raise HangUp(f"TLS failed: {error}") from error
            else:
                self._send_pending()
                return

    def _fill(self) -> None:
        self._incoming.write(self._buffer[: self._receive(self._buffer)])

    def _send_pending(self) -> None:
        with self._sending:
            data = self._outgoing.read()
            if data:
                self._send(data)

    def receive_some(self, view: memoryview) -> int:
        """Take what is there, at least a byte."""
        while True:
            with self._using:
                try:
                    # A buffer is what it takes, though its types tell of bytearray alone.
                    return int(self._session.read(len(view), view))
                except ssl.SSLWantReadError:
                    waits = bool(self._outgoing.pending)
                except ssl.SSLError as error:
                    raise HangUp(f"TLS failed: {error}") from error
            if waits:
                self._send_pending()
            self._fill()

    def send(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send buffers whole."""
        for part in buffers:
            for position in range(0, len(part), WRITTEN_BYTES):
                with self._sending:
                    with self._using:
                        try:
                            self._session.write(memoryview(part)[position : position + WRITTEN_BYTES])
                        except ssl.SSLError as error:
                            raise HangUp(f"TLS failed: {error}") from error
                        data = self._outgoing.read()
                    self._send(data)
