"""The client that asks for block status: what a server may say, and what it may not."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import jqcow
from jqcow.nbd import protocol
from jqcow.nbd.client import Export, Status, read_status
from jqcow.nbd.protocol import Chunk, Option, Reply

MIB = 1 << 20
Answer = Callable[[socket.socket], None]


def test_it_tells_what_a_server_of_our_own_has(tmp_path: Path) -> None:
    with jqcow.create(tmp_path / "image", 4 * MIB) as image:
        image.pwrite(b"x" * MIB, MIB)
        image.flush()
    path = str(tmp_path / "socket")
    with jqcow.serve(tmp_path / "image", socket=path, read_only=True):
        assert list(read_status(Export(path))) == [
            Status(0, MIB, 3),
            Status(MIB, MIB, 0),
            Status(2 * MIB, 2 * MIB, 3),
        ]


def greet(client: socket.socket) -> None:
    greeting = (protocol.NBD_MAGIC, protocol.OPTION_MAGIC, protocol.FLAG_FIXED_NEWSTYLE)
    client.sendall(protocol.GREETING.pack(*greeting))
    client.recv(protocol.CLIENT_FLAGS.size)


def reply(client: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    client.sendall(protocol.OPTION_REPLY.pack(protocol.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


def agree(client: socket.socket) -> None:
    """Negotiate an export of 1 MiB and a context of number 5."""
    greet(client)
    client.recv(4096)
    reply(client, Option.STRUCTURED_REPLY, Reply.ACK)
    client.recv(4096)
    reply(client, Option.SET_META_CONTEXT, Reply.META_CONTEXT, protocol.WORD.pack(5) + b"base:allocation")
    reply(client, Option.SET_META_CONTEXT, Reply.ACK)
    client.recv(4096)
    reply(client, Option.GO, Reply.INFO, protocol.INFO_EXPORT.pack(0, MIB, 1))
    reply(client, Option.GO, Reply.ACK)
    client.recv(4096)


def tell(data: bytes, kind: int = Chunk.BLOCK_STATUS, cookie: int = 1) -> Answer:
    def answer(client: socket.socket) -> None:
        agree(client)
        head = (protocol.STRUCTURED_REPLY_MAGIC, protocol.CHUNK_DONE, kind, cookie, len(data))
        client.sendall(protocol.STRUCTURED_REPLY.pack(*head) + data)

    return answer


def no_context(client: socket.socket) -> None:
    greet(client)
    client.recv(4096)
    reply(client, Option.STRUCTURED_REPLY, Reply.ACK)
    client.recv(4096)
    reply(client, Option.SET_META_CONTEXT, Reply.ACK)


def refuse(client: socket.socket) -> None:
    greet(client)
    client.recv(4096)
    reply(client, Option.STRUCTURED_REPLY, Reply.ERR_UNSUP, b"not here")


def announce_much(client: socket.socket) -> None:
    greet(client)
    client.recv(4096)
    head = (protocol.OPTION_REPLY_MAGIC, Option.STRUCTURED_REPLY, Reply.INFO, (1 << 32) - 1)
    client.sendall(protocol.OPTION_REPLY.pack(*head))


@pytest.mark.parametrize(
    ("answer", "number", "words"),
    [
        (lambda client: client.sendall(b"x" * 18), errno.EPROTO, "another protocol"),
        (lambda client: None, errno.EPROTO, "hung up"),
        (lambda client: client.sendall(b"x"), errno.EPROTO, "hung up"),
        (no_context, errno.ENOENT, "no metadata context"),
        (refuse, errno.ENOENT, "not here"),
        (announce_much, errno.EPROTO, "announces 4294967295 bytes"),
        (tell(protocol.WORD.pack(5) + protocol.STATUS.pack(0, 0)), errno.EPROTO, "tells of nothing"),
        (tell(protocol.WORD.pack(5)), errno.EPROTO, "does not tell of the context"),
        (
            tell(protocol.WORD.pack(6) + protocol.STATUS.pack(9, 0)),
            errno.EPROTO,
            "does not tell of the context",
        ),
        (tell(protocol.WORD.pack(5) + b"short"), errno.EPROTO, "cut short"),
        (tell(b"", cookie=2), errno.EPROTO, "another request"),
        (tell(protocol.ERROR_HEAD.pack(errno.EPERM, 0), Chunk.ERROR), errno.EPERM, "block status"),
    ],
)
def test_what_a_server_may_not_say(tmp_path: Path, answer: Answer, number: int, words: str) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def serve() -> None:
            client, _ = listening.accept()
            with client:
                answer(client)

        server = threading.Thread(target=serve)
        server.start()
        try:
            with pytest.raises(OSError, match=words) as raised:
                list(read_status(Export(path)))
        finally:
            server.join()
    assert raised.value.errno == number
