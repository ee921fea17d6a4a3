"""A client of another server: which parts of an export hold what, and requests one after the other.

Numbers and structures are those of `jqcow.nbd.protocol`. What a server says is bounded before it is kept.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import NamedTuple

from jqcow.device.base import ReadBuffer
from jqcow.nbd import protocol
from jqcow.nbd.protocol import Chunk, Command, Info, Option, Reply

ASKED_BYTES = 1 << 30
"""Length of the range of one request."""
TIMEOUT_SECONDS = 60
_COOKIE = 1
_NOTHING = memoryview(b"")


@dataclass(frozen=True)
class Export:
    """An export of a server: by the path of a unix socket, or by host and port."""

    address: str | tuple[str, int]
    name: str = ""

    def connect(self) -> socket.socket:
        """Return a connection.

        Raises:
            OSError: nobody answers.
        """
        if not isinstance(self.address, str):
            return socket.create_connection(self.address, TIMEOUT_SECONDS)
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        found.settimeout(TIMEOUT_SECONDS)
        try:
            found.connect(self.address)
        except BaseException:
            found.close()
            raise
        return found


class Status(NamedTuple):
    """A range of an export, in bytes, and what a metadata context says of it."""

    offset: int
    length: int
    flags: int


def read_status(export: Export, context: str = protocol.ALLOCATION) -> Iterator[Status]:
    """Yield what a server says of all of an export, neighbours with equal flags joined.

    Args:
        export: where to ask.
        context: the name of the metadata context.

    Raises:
        OSError: the connection failed, the server has no such export or context, or breaks the protocol.
    """
    with closing(Connection(export)) as connection:
        yield from connection.status(*connection.negotiate(context))
        connection.leave()


class Connection:
    """A connection to an export, which asks one thing at a time; errors are those of `read_status`."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._socket = export.connect()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def negotiate(self, context: str) -> tuple[int, int]:
        """Return the size of the export, and the number of the metadata context."""
        self._greet()
        context_id = self._select(context)
        if context_id is None:
            raise OSError(errno.ENOENT, f"the NBD server has no metadata context {context!r}")
        return self._go()[0], context_id

    def enter(self) -> tuple[int, int, int | None]:
        """Return the size of the export, its flags, and the number of `ALLOCATION`; None without that."""
        self._greet()
        context_id = None
        try:
            context_id = self._select(protocol.ALLOCATION)
        except OSError as error:
            # A server need not know either.
            if error.errno != errno.ENOENT:
                raise
        return *self._go(), context_id

    def request(
        self, command: Command, offset: int, length: int, data: ReadBuffer = b"", into: memoryview = _NOTHING
    ) -> None:
        """Do one request, which sends ``data`` or fills ``into``."""
        self._socket.sendall(
            protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, command, _COOKIE, offset, length)
        )
        if data:
            self._socket.sendall(data)
        filled, is_done = 0, False
        while not is_done:
            magic = self._read(protocol.WORD.size)
            if magic == protocol.WORD.pack(protocol.SIMPLE_REPLY_MAGIC):
                rest = self._read(protocol.SIMPLE_REPLY.size - len(magic))
                _, code, cookie = protocol.SIMPLE_REPLY.unpack(magic + rest)
                _refuse(command, code)
                self._receive(into)
                filled, is_done = len(into), True
            else:
                rest = self._read(protocol.STRUCTURED_REPLY.size - len(magic))
                found, flags, kind, cookie, count = protocol.STRUCTURED_REPLY.unpack(magic + rest)
                if found != protocol.STRUCTURED_REPLY_MAGIC:
                    raise _broken("it answers in another form")
                filled += self._chunk(command, kind, count, into, offset)
                is_done = bool(flags & protocol.CHUNK_DONE)
            if cookie != _COOKIE:
                raise _broken("it answers another request")
        if filled != len(into):
            raise _broken("it gives another part than was asked for")

    def _chunk(self, command: Command, kind: int, length: int, into: memoryview, start: int) -> int:
        """Take one chunk of a reply; return how many bytes it fills of ``into``, which is from ``start``."""
        if kind & Chunk.ERROR & ~1:
            data = self._read_bounded(length)
            known = length >= protocol.ERROR_HEAD.size
            _refuse(command, protocol.ERROR_HEAD.unpack_from(data)[0] if known else errno.EIO)
        if kind == Chunk.OFFSET_DATA and length >= protocol.OFFSET.size:
            first, count = protocol.OFFSET.unpack(self._read(protocol.OFFSET.size))[0] - start, length - 8
            if 0 <= first <= first + count <= len(into):
                self._receive(into[first : first + count])
                return count
        elif kind == Chunk.OFFSET_HOLE and length == protocol.HOLE.size:
            first, count = protocol.HOLE.unpack(self._read(protocol.HOLE.size))
            first -= start
            if 0 <= first <= first + count <= len(into):
                into[first : first + count] = bytes(count)
                return int(count)
        elif kind == Chunk.NONE and not length:
            return 0
        raise _broken("it gives another part than was asked for")

    def _receive(self, buffer: memoryview) -> None:
        while buffer:
            count = self._socket.recv_into(buffer)
            if not count:
                raise _broken("it hung up")
            buffer = buffer[count:]

    def _greet(self) -> None:
        magic, kind, flags = protocol.GREETING.unpack(self._read(protocol.GREETING.size))
        if (magic, kind) != (protocol.NBD_MAGIC, protocol.OPTION_MAGIC):
            raise _broken("it greets in another protocol")
        if not flags & protocol.FLAG_FIXED_NEWSTYLE:
            raise _broken("it does not know the fixed newstyle negotiation")
        wanted = flags & (protocol.FLAG_FIXED_NEWSTYLE | protocol.FLAG_NO_ZEROES)
        self._socket.sendall(protocol.CLIENT_FLAGS.pack(wanted))

    def _select(self, context: str) -> int | None:
        """Ask for structured replies and a metadata context; return its number, None if there is none."""
        self._ask(Option.STRUCTURED_REPLY, b"")
        query = _counted(self._export.name) + protocol.WORD.pack(1) + _counted(context)
        for kind, data in self._ask(Option.SET_META_CONTEXT, query):
            if kind == Reply.META_CONTEXT:
                if len(data) < protocol.WORD.size:
                    raise _broken("a metadata context without a number")
                return int(protocol.WORD.unpack_from(data)[0])
        return None

    def _go(self) -> tuple[int, int]:
        """Return the size of the export, and its flags."""
        name = _counted(self._export.name)
        told = self._ask(Option.GO, name + protocol.HALF.pack(0))
        found = [
            protocol.INFO_EXPORT.unpack(data)
            for kind, data in told
            if kind == Reply.INFO
            and len(data) == protocol.INFO_EXPORT.size
            and not int.from_bytes(data[:2], "big")
        ]
        if not found:
            raise _broken(f"it does not tell what the export has ({Info.EXPORT.name})")
        return found[0][1], found[0][2]

    def status(self, size: int, context_id: int) -> Iterator[Status]:
        """Yield what the server says, in order, neighbours with equal flags joined."""
        waiting: Status | None = None
        for found in self._status(size, context_id):
            if waiting is not None and waiting.flags == found.flags:
                waiting = waiting._replace(length=waiting.length + found.length)
                continue
            if waiting is not None:
                yield waiting
            waiting = found
        if waiting is not None:
            yield waiting

    def _status(self, size: int, context_id: int) -> Iterator[Status]:
        offset = 0
        while offset < size:
            length = min(ASKED_BYTES, size - offset)
            head = (protocol.REQUEST_MAGIC, 0, Command.BLOCK_STATUS, _COOKIE, offset, length)
            self._socket.sendall(protocol.REQUEST.pack(*head))
            end = offset
            for told, flags in self._status_reply(context_id):
                count = min(told, size - end)
                if not count:
                    raise _broken("it tells of nothing, or of more than there is")
                yield Status(end, count, flags)
                end += count
            if end == offset:
                raise _broken("it does not tell of the context")
            offset = end

    def leave(self) -> None:
        """Say that nothing more is asked, to whoever still hears it."""
        with suppress(OSError):
            self._socket.sendall(protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))

    def _status_reply(self, context_id: int) -> list[tuple[int, int]]:
        found = list[tuple[int, int]]()
        is_done = False
        while not is_done:
            head = protocol.STRUCTURED_REPLY.unpack(self._read(protocol.STRUCTURED_REPLY.size))
            magic, flags, kind, cookie, length = head
            if (magic, cookie) != (protocol.STRUCTURED_REPLY_MAGIC, _COOKIE):
                raise _broken("it answers another request")
            data = self._read_bounded(length)
            if kind & Chunk.ERROR & ~1:
                number = protocol.ERROR_HEAD.unpack_from(data)[0] if length >= protocol.ERROR_HEAD.size else 0
                raise OSError(number or errno.EIO, "the NBD server cannot tell the block status")
            if kind == Chunk.BLOCK_STATUS and data[: protocol.WORD.size] == protocol.WORD.pack(context_id):
                pairs = data[protocol.WORD.size :]
                if len(pairs) % protocol.STATUS.size:
                    raise _broken("a status is cut short")
                found += protocol.STATUS.iter_unpack(pairs)
            is_done = bool(flags & protocol.CHUNK_DONE)
        return found

    def _ask(self, option: Option, data: bytes) -> list[tuple[int, bytes]]:
        """Return what the server answers to an option, by kinds of replies."""
        self._socket.sendall(protocol.OPTION_HEADER.pack(protocol.OPTION_MAGIC, option, len(data)) + data)
        found = list[tuple[int, bytes]]()
        while len(found) <= protocol.OPTIONS_MAX:
            head = protocol.OPTION_REPLY.unpack(self._read(protocol.OPTION_REPLY.size))
            magic, asked, kind, length = head
            if (magic, asked) != (protocol.OPTION_REPLY_MAGIC, option):
                raise _broken("it answers another option")
            answer = self._read_bounded(length)
            if kind == Reply.ACK:
                return found
            if kind >= Reply.ERR_UNSUP:
                told = answer.decode("utf-8", "replace")
                raise OSError(errno.ENOENT, f"the NBD server refuses {option.name}: {told or hex(kind)}")
            found.append((kind, answer))
        raise _broken("it answers without end")

    def _read_bounded(self, length: int) -> bytes:
        if length > protocol.OPTION_BYTES_SKIPPED_MAX:
            raise _broken(f"it announces {length} bytes")
        return self._read(length)

    def _read(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            part = self._socket.recv(length - len(found))
            if not part:
                raise _broken("it hung up")
            found += part
        return bytes(found)


def _refuse(command: Command, code: int) -> None:
    """Raise what a server says of a request, if it is an error."""
    if code:
        raise OSError(code, f"the NBD server refuses {command.name}: {os.strerror(code)}")


def _counted(text: str) -> bytes:
    data = text.encode()
    return protocol.WORD.pack(len(data)) + data


def _broken(what: str) -> OSError:
    return OSError(errno.EPROTO, f"the NBD server breaks the protocol: {what}")
