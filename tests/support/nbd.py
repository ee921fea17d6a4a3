"""An NBD client of the tests' own, written from the protocol document: it shares nothing with the server."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = (
    1, 2, 3, 5, 6, 7, 8, 9, 10, 11,
)  # fmt: skip
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, TOO_BIG, EXT_HEADER_REQD = (
    2**31 + 1, 2**31 + 2, 2**31 + 3, 2**31 + 5, 2**31 + 6, 2**31 + 9, 2**31 + 10,
)  # fmt: skip
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
WAIT_SECONDS = 60


@dataclass
class Answer:
    """What a server answered to one request; ``status`` are (context, [(length, flags)])."""

    error: int = 0
    text: str = ""
    data: bytes = b""
    holes: list[tuple[int, int]] = field(default_factory=list)
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


class Client:
    """One connection."""

    def __init__(self, where: str | tuple[str, int] | socket.socket) -> None:
        if isinstance(where, socket.socket):
            self.socket = where
        elif isinstance(where, str):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(WAIT_SECONDS)
            try:
                self.socket.connect(where)
            except BaseException:
                self.socket.close()
                raise
        else:
            self.socket = socket.create_connection(where, timeout=WAIT_SECONDS)
        self.socket.settimeout(WAIT_SECONDS)
        self.structured = self.extended = False
        self.size = self.flags = 0
        self.contexts: dict[str, int] = {}
        self.cookie = 0
        self.asked: dict[int, tuple[int, int, int]] = {}

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            part = self.socket.recv(length - len(found))
            if not part:
                raise ConnectionError("the server hung up")
            found += part
        return found

    # Negotiation

    def greet(self, flags: int = 3) -> None:
        assert self.receive(16) == b"NBDMAGICIHAVEOPT"
        assert struct.unpack(">H", self.receive(2)) == (3,)
        self.send(struct.pack(">I", flags))

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return the replies to it: (type, data)."""
        self.send(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        found = []
        while not found or (found[-1][0] != ACK and not found[-1][0] >> 31):
            magic, about, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, about) == (0x3E889045565A9, option)
            found.append((kind, self.receive(length)))
        return found

    def ask_contexts(self, option: int, name: str, queries: Sequence[str]) -> list[tuple[int, bytes]]:
        return self.option(
            option, _text(name) + struct.pack(">I", len(queries)) + b"".join(map(_text, queries))
        )

    def go(self, name: str = "", option: int = GO, kinds: Sequence[int] = ()) -> list[tuple[int, bytes]]:
        data = _text(name) + struct.pack(f">H{len(kinds)}H", len(kinds), *kinds)
        found = self.option(option, data)
        for kind, told in found:
            if kind == REP_INFO and told[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", told[2:])
        return found

    def begin(
        self, *, name: str = "", structured: bool = True, extended: bool = False, contexts: Sequence[str] = ()
    ) -> Client:
        """Negotiate as most clients do."""
        self.greet()
        if extended:
            assert self.option(EXTENDED) == [(ACK, b"")]
        elif structured:
            assert self.option(STRUCTURED) == [(ACK, b"")]
        self.structured, self.extended = structured or extended, extended
        if contexts:
            for kind, told in self.ask_contexts(SET_META, name, contexts):
                if kind == META:
                    self.contexts[told[4:].decode()] = int.from_bytes(told[:4], "big")
        assert self.go(name)[-1] == (ACK, b"")
        return self

    # Transmission

    def ask(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        """Send a request; return its cookie."""
        self.send(self.request(command, offset, length, data, flags))
        return self.cookie

    def request(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> bytes:
        """Return a request, to be sent with others."""
        self.cookie += 1
        self.asked[self.cookie] = command, offset, length
        if command == WRITE and self.extended:
            flags |= PAYLOAD_LEN
        length = len(data) if command == WRITE else length
        magic, form = (0x21E41C71, ">IHHQQQ") if self.extended else (0x25609513, ">IHHQQI")
        return struct.pack(form, magic, flags, command, self.cookie, offset, length) + data

    def answer(self) -> tuple[int, Answer]:
        """Receive the whole answer to one request; return its cookie too. Chunks of others do not mix in."""
        found = Answer()
        magic = struct.unpack(">I", self.receive(4))[0]
        if magic == 0x67446698:
            found.error, cookie = struct.unpack(">IQ", self.receive(12))
            command, _, length = self.asked.pop(cookie)
            assert not (self.structured and command == READ)
            if command == READ and not found.error:
                found.data = self.receive(length)
            return cookie, found
        while True:
            assert self.structured and magic == (0x6E8A278C if self.extended else 0x668E33EF)
            flags, kind, cookie = struct.unpack(">HHQ", self.receive(12))
            if self.extended:
                assert struct.unpack(">Q", self.receive(8)) == (self.asked[cookie][1],)
            (length,) = struct.unpack(
                ">Q" if self.extended else ">I", self.receive(8 if self.extended else 4)
            )
            self._take_chunk(found, cookie, kind, self.receive(length))
            if flags & 1:
                del self.asked[cookie]
                return cookie, found
            magic = struct.unpack(">I", self.receive(4))[0]

    def _take_chunk(self, found: Answer, cookie: int, kind: int, data: bytes) -> None:
        _, offset, length = self.asked[cookie]
        if kind == 1:
            assert struct.unpack(">Q", data[:8]) == (offset,)
            found.data = data[8:]
        elif kind == 2:
            assert struct.unpack(">QI", data) == (offset, length)
            found.holes.append((offset, length))
            found.data = bytes(length)
        elif kind in (5, 6):
            assert (kind == 6) == self.extended
            number = int.from_bytes(data[:4], "big")
            pairs = struct.iter_unpack(">QQ" if self.extended else ">II", data[8 if self.extended else 4 :])
            found.status[number] = list(pairs)
        elif kind >> 15:
            found.error, length = struct.unpack(">IH", data[:6])
            assert len(data) == 6 + length
            found.text = data[6:].decode()
        else:
            assert (kind, data) == (0, b"")

    def do(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> Answer:
        """Send one request and wait for its answer; no other is in flight."""
        cookie = self.ask(command, offset, length, data, flags)
        about, found = self.answer()
        assert about == cookie
        return found

    def read(self, length: int, offset: int) -> bytes:
        found = self.do(READ, offset, length)
        assert not found.error and len(found.data) == length, found
        return found.data

    def write(self, data: bytes, offset: int, flags: int = 0) -> None:
        assert self.do(WRITE, offset, data=data, flags=flags) == Answer()

    def flush(self) -> None:
        assert self.do(FLUSH) == Answer()

    def disconnect(self) -> None:
        self.ask(DISC)
        assert self.socket.recv(1) == b""
        self.close()

    def is_hung_up(self) -> bool:
        """Wait until the server hangs up; what it says before counts as nothing."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(65536):
                pass
        self.close()
        return True


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data


@contextlib.contextmanager
def connected(where: str | tuple[str, int], **options: object) -> Iterator[Client]:
    """A client that has negotiated; arguments as `Client.begin`."""
    with contextlib.closing(Client(where)) as client:
        yield client.begin(**options)  # type: ignore[arg-type]


class Served:
    """A server in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "jqcow", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.uri = self.process.stdout.readline().strip()

    @property
    def socket(self) -> str:
        return self.uri.partition("socket=")[2]

    def end(self, number: int) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        assert self.process.stdout
        self.process.stdout.close()
        return self.process.wait(WAIT_SECONDS)


@contextlib.contextmanager
def served(*arguments: object) -> Iterator[Served]:
    """A server that must still be there at the end, and end well when it is asked to."""
    server = Served(*arguments)
    try:
        yield server
        assert server.process.poll() is None
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.process.kill()
        server.wait()
