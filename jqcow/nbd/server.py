"""The server: it accepts clients, has a thread for each, and stops in order."""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from jqcow.nbd.export import Export
from jqcow.nbd.limits import Budget, Limits
from jqcow.nbd.listening import Address, TcpAddress, forget, listen, uri_of
from jqcow.nbd.negotiation import Negotiation
from jqcow.nbd.protocol import HangUp
from jqcow.nbd.stream import Stream
from jqcow.nbd.transmission import Transmission
from jqcow.nbd.workers import Flusher

_log = logging.getLogger("jqcow.nbd")


class _Client:
    """One connection, and the thread that serves it."""

    def __init__(self, server: Server, connected: socket.socket) -> None:
        self._server = server
        self._stream = Stream(connected)
        self._transmission: Transmission | None = None
        self._stops = False
        self._changing = threading.Lock()
        self.thread = threading.Thread(target=self._serve, name="nbd-client", daemon=True)

    def _serve(self) -> None:
        server = self._server
        try:
            self._stream.begin_handshake(server.limits.handshake_seconds)
            agreed = Negotiation(self._stream, {server.export.name: server.export}, server.tls).run()
            self._stream.end_handshake()
            transmission = Transmission(self._stream, agreed, server.budget, server.flusher, server.limits)
            with self._changing:
                self._transmission = transmission
                if self._stops:
                    transmission.stop()
            transmission.run()
        except HangUp as error:
            _log.info("a client is gone: %s", error)
        except Exception:
            _log.exception("a client was not served")
        finally:
            self._stream.close()
            server.client_ended(self, had_export=self._transmission is not None)

    def stop(self) -> None:
        """Answer what is in flight, and end."""
        with self._changing:
            self._stops = True
            if self._transmission is None:
                self._stream.cut()
            else:
                self._transmission.stop()

    def cut(self) -> None:
        """End now."""
        with self._changing:
            self._stream.cut()


class Server:
    """Serves one export at some listening sockets until it is stopped.

    As a context manager it runs in a thread of its own, and stops at the end.
    """

    def __init__(
        self,
        export: Export,
        address: Address | None = None,
        *,
        listeners: Sequence[socket.socket] = (),
        limits: Limits | None = None,
        persistent: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Listen; nobody is accepted yet.

        Args:
            export: what is served. Whoever made its image closes it, after `stop`.
            address: where to listen.
            listeners: sockets that listen already, instead; they are closed, and keep their names.
            limits: what clients may take.
            persistent: serve on when no client is left; otherwise `run` ends then.
            tls: for `ssl.PROTOCOL_TLS_SERVER`: who does not use it is told nothing.

        Raises:
            OSError: nobody can listen there.
        """
        self.export = export
        self.tls = tls
        self.limits = limits or Limits()
        self.budget = Budget(self.limits.inflight_bytes)
        self._listeners = list(listeners) if address is None else listen(address)
        self._host = address.host if isinstance(address, TcpAddress) else ""
        self._is_ours = address is not None
        self._persistent = persistent
        self._clients: set[_Client] = set()
        self._changing = threading.Lock()
        self._stops = False
        self._was_used = False
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._thread: threading.Thread | None = None
        self.flusher = Flusher(export.image.flush)

    @property
    def uri(self) -> str:
        """The NBD URI of the export, at the first of the sockets."""
        return uri_of(self._listeners[0], self.export.name, host=self._host, tls=self.tls is not None)

    @property
    def address(self) -> object:
        """The address of the first socket, as `socket.getsockname` tells it."""
        return self._listeners[0].getsockname()

    def run(self) -> None:
        """Accept clients until `request_stop`, or until the last one is gone; then stop."""
        with selectors.DefaultSelector() as selector:
            for listener in self._listeners:
                listener.setblocking(False)
                selector.register(listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._stops:
                has_room = len(self._clients) < self.limits.clients
                for key, _ in selector.select() if has_room else self._wait_for_room():
                    if key.fileobj is self._woken:
                        self._woken.recv(4096)
                    elif isinstance(key.fileobj, socket.socket):
                        self._accept(key.fileobj)
        self._end()

    def _wait_for_room(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait until somebody wakes the server: meanwhile clients wait in the listening queue."""
        self._woken.recv(4096)
        return []

    def _accept(self, listener: socket.socket) -> None:
        try:
            connected, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        client = _Client(self, connected)
        with self._changing:
            self._clients.add(client)
        client.thread.start()

    def client_ended(self, client: _Client, *, had_export: bool) -> None:
        """A client's thread is at its end."""
        with self._changing:
            self._clients.discard(client)
            self._was_used |= had_export
            if self._was_used and not self._clients and not self._persistent:
                self._stops = True
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            # A full socket has reasons enough to wake.
            self._waker.send(b"\0")

    def request_stop(self) -> None:
        """Have `run` stop; a signal handler may call it."""
        self._stops = True
        self._wake()

    def _end(self) -> None:
        for listener in self._listeners:
            if self._is_ours:
                forget(listener)
            else:
                listener.close()
        self._stop_clients()
        self.flusher.end()

    def _stop_clients(self) -> None:
        with self._changing:
            left = list(self._clients)
        for client in left:
            client.stop()
        until = time.monotonic() + self.limits.stop_seconds
        for client in left:
            client.thread.join(max(0.0, until - time.monotonic()))
        for client in left:
            client.cut()
        for client in left:
            client.thread.join()

    # In a thread of its own

    def start(self) -> None:
        """Run in a thread."""
        self._thread = threading.Thread(target=self.run, name="nbd-server", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer what is in flight, and hang up. Stopping again does nothing."""
        if self._thread is not None and self._thread.is_alive():
            self.request_stop()
            self._thread.join()

    def close(self) -> None:
        """Release what is left of a server that does not run any more."""
        self._waker.close()
        self._woken.close()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.close()
