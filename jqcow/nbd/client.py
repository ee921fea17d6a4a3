"""A client that asks another server which parts of an export hold what: block status, and nothing else.

Numbers and structures are those of `jqcow.nbd.protocol`. What a server says is bounded before it is kept.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from jqcow.nbd import protocol
from jqcow.nbd.protocol import Chunk, Command, Info, Option, Reply

ASKED_BYTES = 1 << 30
"""Length of the range of one request."""
TIMEOUT_SECONDS = 60
_COOKIE = 1


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
    with closing(_Connection(export)) as connection:
        size, context_id = connection.negotiate(context)
        waiting: Status | None = None
        for found in connection.status(size, context_id):
            if waiting is not None and waiting.flags == found.flags:
                waiting = waiting._replace(length=waiting.length + found.length)
                continue
            if waiting is not None:
                yield waiting
            waiting = found
        if waiting is not None:
            yield waiting
        connection.leave()


class _Connection:
    def __init__(self, export: Export) -> None:
        self._export = export
        self._socket = export.connect()

    def close(self) -> None:
        self._socket.close()

    def negotiate(self, context: str) -> tuple[int, int]:
        """Return the size of the export, and the number of the metadata context."""
        magic, kind, flags = protocol.GREETING.unpack(self._read(protocol.GREETING.size))
        if (magic, kind) != (protocol.NBD_MAGIC, protocol.OPTION_MAGIC):
            raise _broken("it greets in another protocol")
        if not flags & protocol.FLAG_FIXED_NEWSTYLE:
            raise _broken("it does not know the fixed newstyle negotiation")
        wanted = flags & (protocol.FLAG_FIXED_NEWSTYLE | protocol.FLAG_NO_ZEROES)
        self._socket.sendall(protocol.CLIENT_FLAGS.pack(wanted))
        self._ask(Option.STRUCTURED_REPLY, b"")
        name = _counted(self._export.name)
        found = self._ask(Option.SET_META_CONTEXT, name + protocol.WORD.pack(1) + _counted(context))
        ids = [data[: protocol.WORD.size] for kind, data in found if kind == Reply.META_CONTEXT]
        if not ids:
            raise OSError(errno.ENOENT, f"the NBD server has no metadata context {context!r}")
        told = self._ask(Option.GO, name + protocol.HALF.pack(0))
        sizes = [
            protocol.INFO_EXPORT.unpack(data)[1]
            for kind, data in told
            if kind == Reply.INFO
            and len(data) == protocol.INFO_EXPORT.size
            and not int.from_bytes(data[:2], "big")
        ]
        if not sizes or len(ids[0]) != protocol.WORD.size:
            raise _broken(f"it does not tell what the export has ({Info.EXPORT.name})")
        return sizes[0], protocol.WORD.unpack(ids[0])[0]

    def status(self, size: int, context_id: int) -> Iterator[Status]:
        """Yield what the server says, in order."""
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
        """Say that nothing more is asked."""
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


def _counted(text: str) -> bytes:
    data = text.encode()
    return protocol.WORD.pack(len(data)) + data


def _broken(what: str) -> OSError:
    return OSError(errno.EPROTO, f"the NBD server breaks the protocol: {what}")
