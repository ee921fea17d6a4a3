"""The NBD protocol's numbers and structures: what goes over the wire, and nothing about what is behind it.

All of it is from the NBD protocol document (https://github.com/NetworkBlockDevice/nbd, doc/proto.md): the
fixed newstyle negotiation, structured replies, block status and extended headers. Everything is big-endian.
Functions that take bytes of a client raise `Malformed`, or refuse them by the limits that stand here.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

# Metadata contexts

ALLOCATION = "base:allocation"
STATE_HOLE, STATE_ZERO = 1, 2
"""Flags of `ALLOCATION`."""
DEPTH = "qemu:allocation-depth"
BITMAP_PREFIX = "qemu:dirty-bitmap:"
"""These two are as QEMU has them (docs/interop/nbd.rst in its source)."""
STATE_DIRTY = 1

# Limits

NAME_BYTES_MAX = 4096
"""Of a string: the name of an export, a query, an error's text."""
OPTION_BYTES_MAX = 64 << 10
"""Of an option's data that is looked at: a name, and some queries or kinds of information."""
OPTION_BYTES_SKIPPED_MAX = 1 << 20
"""Of an option's data that is skipped; whoever announces more is hung up on."""
OPTIONS_MAX = 1024
"""Of options in one negotiation: nobody needs so many."""
QUERIES_MAX = 256
"""Of queries in one option."""
PAYLOAD_BYTES_MAX = 32 << 20
"""Of the data of a read or write: what the protocol has every server take."""
PAYLOAD_BYTES_SKIPPED_MAX = 64 << 20
"""Of the data of a request that is refused; whoever announces more is hung up on."""
LENGTH_MAX = (1 << 32) - 1
"""Of a range in a request without extended headers."""

# Negotiation

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9

GREETING = Struct(">QQH")
CLIENT_FLAGS = Struct(">I")
OPTION_HEADER = Struct(">QII")
OPTION_REPLY = Struct(">QIII")
EXPORT_REPLY = Struct(">QH")
INFO_EXPORT = Struct(">HQH")
INFO_BLOCK_SIZE = Struct(">HIII")
WORD = Struct(">I")
HALF = Struct(">H")
ZEROES_AFTER_EXPORT = bytes(124)

FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2


class Option(IntEnum):
    """What a client asks in the negotiation."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """What a server answers to an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


class Info(IntEnum):
    """What `Option.INFO` and `Option.GO` tell of an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class ExportFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_CACHE = 1024
    SEND_FAST_ZERO = 2048


# Transmission

REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

REQUEST = Struct(">IHHQQI")
EXTENDED_REQUEST = Struct(">IHHQQQ")
SIMPLE_REPLY = Struct(">IIQ")
STRUCTURED_REPLY = Struct(">IHHQI")
EXTENDED_REPLY = Struct(">IHHQQQ")
OFFSET = Struct(">Q")
HOLE = Struct(">QI")
ERROR_HEAD = Struct(">IH")
STATUS = Struct(">II")
EXTENDED_STATUS = Struct(">QQ")

assert (GREETING.size, OPTION_HEADER.size, OPTION_REPLY.size) == (18, 16, 20)
assert (REQUEST.size, EXTENDED_REQUEST.size) == (28, 32)
assert (SIMPLE_REPLY.size, STRUCTURED_REPLY.size, EXTENDED_REPLY.size) == (16, 20, 32)

CHUNK_DONE = 1
"""The flag of a reply's last chunk."""


class Command(IntEnum):
    """What a client asks of an export."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """How it is to be done."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32


class Chunk(IntEnum):
    """The types of chunks of structured and extended replies."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1


FLAGS_OF = {
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA | CommandFlag.PAYLOAD_LEN,
    Command.DISC: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}
"""The flags that a command may have. FUA means nothing where nothing is changed, and does no harm."""

CHANGES = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})

ERRORS = frozenset(
    {
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.ENOTSUP,
        errno.ESHUTDOWN,
    }
)
"""The errors that the protocol knows; Linux numbers them alike."""


class Malformed(Exception):
    """A client's bytes are no option, or no request; the text says why."""


class HangUp(Exception):
    """A client breaks the protocol, or is gone: nothing more can be said to it."""


class Request(NamedTuple):
    """One request. ``offset`` and ``length`` in bytes; the data of a write follows."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Asked:
    """An export that a client asks for, and what it wants to be told of it."""

    name: str
    kinds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Queries:
    """What a client asks of the metadata contexts of an export."""

    name: str
    queries: tuple[str, ...]


def parse_name(data: bytes) -> str:
    """Return a string of a client.

    Raises:
        Malformed: it is too long, or no UTF-8 without NUL.
    """
    if len(data) > NAME_BYTES_MAX:
        raise Malformed(f"a string of {len(data)} bytes is longer than {NAME_BYTES_MAX}")
    if b"\0" in data:
        raise Malformed("a string holds a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Malformed("a string is not UTF-8") from None


class _Reader:
    """Takes the data of an option apart, front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def bytes(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._data):
            raise Malformed("the data of an option ends too early")
        found = self._data[self._position : end]
        self._position = end
        return found

    def number(self, form: Struct) -> int:
        found: int = form.unpack(self.bytes(form.size))[0]
        return found

    def name(self) -> str:
        return parse_name(self.bytes(self.number(WORD)))

    def end(self) -> None:
        if self._position != len(self._data):
            raise Malformed("the data of an option goes on behind its end")


def parse_asked(data: bytes) -> Asked:
    """Return what the data of `Option.INFO` and `Option.GO` asks for.

    Raises:
        Malformed: it is no such data.
    """
    reader = _Reader(data)
    name = reader.name()
    kinds = tuple(reader.number(HALF) for _ in range(reader.number(HALF)))
    reader.end()
    return Asked(name, kinds)


def parse_queries(data: bytes) -> Queries:
    """Return what the data of `Option.LIST_META_CONTEXT` and `Option.SET_META_CONTEXT` asks for.

    Raises:
        Malformed: it is no such data, or has too many queries.
    """
    reader = _Reader(data)
    name = reader.name()
    count = reader.number(WORD)
    if count > QUERIES_MAX:
        raise Malformed(f"{count} queries are more than {QUERIES_MAX}")
    queries = tuple(reader.name() for _ in range(count))
    reader.end()
    return Queries(name, queries)


def option_reply(option: int, reply: Reply, data: bytes = b"") -> bytes:
    """Return a reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def counted(text: bytes) -> bytes:
    """Return a string with its length before it."""
    return WORD.pack(len(text)) + text


def error_payload(code: int, text: str) -> bytes:
    """Return the data of an error chunk."""
    told = text.encode("utf-8", "replace")[:NAME_BYTES_MAX].decode("utf-8", "ignore").encode()
    return ERROR_HEAD.pack(code, len(told)) + told


@dataclass(frozen=True)
class Form:
    """How requests and replies of a connection look, as its negotiation left it."""

    structured: bool = False
    extended: bool = False

    def head(self, request: Request, chunk: Chunk, length: int) -> bytes:
        """Return the head of a reply's only chunk, of ``length`` bytes."""
        if self.extended:
            return EXTENDED_REPLY.pack(
                EXTENDED_REPLY_MAGIC, CHUNK_DONE, chunk, request.cookie, request.offset, length
            )
        return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, chunk, request.cookie, length)

    def more_head(self, request: Request, chunk: Chunk, length: int) -> bytes:
        """Return the head of a chunk that others of the same reply follow."""
        if self.extended:
            return EXTENDED_REPLY.pack(EXTENDED_REPLY_MAGIC, 0, chunk, request.cookie, request.offset, length)
        return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, 0, chunk, request.cookie, length)

    def done(self, request: Request) -> bytes:
        """Return the reply to a request that succeeded and has nothing to return."""
        if self.structured:
            return self.head(request, Chunk.NONE, 0)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def failed(self, request: Request, code: int, text: str) -> bytes:
        """Return the reply to a request that failed; ``code`` is one of `ERRORS`."""
        if self.structured:
            payload = error_payload(code, text)
            return self.head(request, Chunk.ERROR, len(payload)) + payload
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, code, request.cookie)

    def data_head(self, request: Request) -> bytes:
        """Return what stands before the data of a read."""
        if self.structured:
            head = self.head(request, Chunk.OFFSET_DATA, OFFSET.size + request.length)
            return head + OFFSET.pack(request.offset)
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def hole(self, request: Request) -> bytes:
        """Return the reply to a read of zeros; the form is structured."""
        head = self.head(request, Chunk.OFFSET_HOLE, HOLE.size)
        return head + HOLE.pack(request.offset, request.length)

    @property
    def request(self) -> Struct:
        """The structure of requests."""
        return EXTENDED_REQUEST if self.extended else REQUEST

    @property
    def request_magic(self) -> int:
        """What a request begins with."""
        return EXTENDED_REQUEST_MAGIC if self.extended else REQUEST_MAGIC
