"""The bytes of one connection, in and out, with bounds on how long each may take."""

from __future__ import annotations

import errno
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from struct import Struct

from jqcow.nbd.protocol import HangUp
from jqcow.nbd.tls import Tls

LOOK_SECONDS = 1
"""So often a sender that waits looks whether it should go on."""
BUFFERS_MAX = 512
"""Of buffers that are sent at once; the kernel takes 1024."""
_TIME = Struct("@ll")
_GONE = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.EBADF, errno.ETIMEDOUT})


class Stream:
    """A connected socket. One thread receives; those that send take turns."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(None)
        self._until: float | None = None
        self._tls: Tls | None = None
        self._wait_on: Callable[[], bool] = lambda: False

    def secure(self, context: ssl.SSLContext) -> None:
        """Go on by TLS; nothing that came in the clear is left to be taken for what came by TLS.

        Raises:
            HangUp: the client is gone, late, or not one to be served.
        """
        tls = Tls(context, self._receive_plain, lambda data: self._send_plain([data], self._wait_on))
        tls.shake_hands()
        self._tls = tls

    # The negotiation, which has an end

    def begin_handshake(self, seconds: float) -> None:
        """From here on all is to be over within ``seconds``."""
        self._until = time.monotonic() + seconds

    def end_handshake(self) -> None:
        """From here on a client may be silent for as long as it likes."""
        self._until = None
        self._socket.settimeout(None)
        # Not a timeout of Python's: it would ask the kernel before each call.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(LOOK_SECONDS, 0))

    def _keep_time(self) -> None:
        if self._until is not None:
            left = self._until - time.monotonic()
            if left <= 0:
                raise HangUp("the negotiation takes too long")
            self._socket.settimeout(left)

    def receive(self, length: int) -> bytes:
        """Return ``length`` bytes, which are few.

        Raises:
            HangUp: the client is gone, or late.
        """
        buffer = bytearray(length)
        with memoryview(buffer) as view:
            self.receive_into(view)
        return bytes(buffer)

    def receive_into(self, view: memoryview) -> None:
        """Fill a buffer; errors as `receive`."""
        position = 0
        while position < len(view):
            position += self.receive_some(view[position:])

    def receive_some(self, view: memoryview) -> int:
        """Take what is there, at least a byte; errors as `receive`."""
        found = self._receive_plain(view) if self._tls is None else self._tls.receive_some(view)
        if not found:
            raise HangUp("the client is gone")
        return found

    def _receive_plain(self, view: memoryview) -> int:
        try:
            self._keep_time()
            found = self._socket.recv_into(view)
        except TimeoutError:
            raise HangUp("the negotiation takes too long") from None
        except OSError as error:
            raise _gone(error) from error
        if not found:
            raise HangUp("the client is gone")
        return found

    def has_more(self) -> bool:
        """Return True if bytes came in that nobody has received yet.

        Raises:
            HangUp: the client is gone.
        """
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except OSError as error:
            raise _gone(error) from error

    def skip(self, length: int) -> None:
        """Receive bytes that nobody needs."""
        with memoryview(bytearray(min(length, 64 << 10))) as view:
            while length > 0:
                length -= self.receive_some(view[:length])

    def send(self, buffers: Sequence[bytes | bytearray | memoryview], may_wait: Callable[[], bool]) -> None:
        """Send buffers whole; ``may_wait`` is asked every second in which the client takes nothing.

        Raises:
            HangUp: the client is gone, or may not be waited for.
        """
        if self._tls is None:
            self._send_plain(buffers, may_wait)
            return
        self._wait_on = may_wait
        self._tls.send(buffers)

    def _send_plain(
        self, buffers: Sequence[bytes | bytearray | memoryview], may_wait: Callable[[], bool]
    ) -> None:
        left = [part for part in buffers if len(part)]
        while left:
            try:
                self._keep_time()
                sent = self._socket.sendmsg(left[:BUFFERS_MAX])
            except TimeoutError:
                raise HangUp("the negotiation takes too long") from None
            except BlockingIOError:
                if may_wait():
                    continue
                raise HangUp("the client takes no replies") from None
            except OSError as error:
                raise _gone(error) from error
            left = _rest(left, sent)

    def stop_receiving(self) -> None:
        """Have whoever receives find the end; what is to be sent is still sent."""
        self._shut(socket.SHUT_RD)

    def cut(self) -> None:
        """Have whoever receives or sends find the end."""
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError as error:
            # The client was first.
            if error.errno not in _GONE:
                raise

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _gone(error: OSError) -> HangUp:
    return HangUp(f"the connection failed: {error.strerror}")


def _rest(buffers: list[bytes | bytearray | memoryview], sent: int) -> list[bytes | bytearray | memoryview]:
    """Return what is left of buffers of which the first ``sent`` bytes were sent."""
    for index, part in enumerate(buffers):
        if sent < len(part):
            return [memoryview(part)[sent:], *buffers[index + 1 :]]
        sent -= len(part)
    return []
