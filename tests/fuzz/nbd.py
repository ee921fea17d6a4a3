"""Seeded fuzzing of the NBD server: clients that break the protocol in every way that a mutation can.

    python -m tests.fuzz.nbd [--clients N] [--seed SEED]

A client sends a conversation that was good before bytes of it were changed, cut out or doubled, and hangs up.
Whatever it said, the server must serve the next client, keep its threads and memory, and leave the image
whole.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import jqcow
from jqcow.nbd import Limits, Server
from tests.support import nbd
from tests.support.nbd import Client, connected

SIZE = 1 << 20
MEMORY_MAX_KIB = 200 << 10
"""More than the process had before; requests announce gigabytes."""


def conversation(drawn: random.Random) -> bytes:
    """Return what a client says in a good conversation, without waiting for answers."""

    def option(kind: int, data: bytes = b"") -> bytes:
        return b"IHAVEOPT" + struct.pack(">II", kind, len(data)) + data

    def text(value: bytes) -> bytes:
        return struct.pack(">I", len(value)) + value

    said = struct.pack(">I", drawn.choice((1, 3)))
    extended = drawn.random() < 0.4
    for kind in drawn.sample((nbd.LIST, nbd.STARTTLS, nbd.INFO, nbd.LIST_META, 77), drawn.randrange(4)):
        data = text(b"") + b"\0\1\0\3" if kind == nbd.INFO else b""
        said += option(kind, text(b"") + struct.pack(">I", 0) if kind == nbd.LIST_META else data)
    said += option(nbd.EXTENDED if extended else nbd.STRUCTURED)
    queries = [b"base:allocation", b"qemu:allocation-depth", b"qemu:dirty-bitmap:b"]
    said += option(nbd.SET_META, text(b"") + struct.pack(">I", 3) + b"".join(map(text, queries)))
    said += option(nbd.EXPORT_NAME) if drawn.random() < 0.2 else option(nbd.GO, text(b"") + b"\0\0")
    form, magic = (">IHHQQQ", 0x21E41C71) if extended else (">IHHQQI", 0x25609513)
    for cookie in range(drawn.randrange(1, 12)):
        command = drawn.randrange(9)
        data = bytes(drawn.choice((1, 512, 70_000))) if command == nbd.WRITE else b""
        length = len(data) if data else drawn.choice((0, 512, 65536, SIZE, 1 << 31))
        flags = drawn.choice((0, 0, 1, 2, 4, 8, 16, 32, 0xFFFF))
        said += struct.pack(form, magic, flags, command, cookie, drawn.randrange(SIZE), length) + data
    return said


def mutated(said: bytes, drawn: random.Random) -> bytes:
    """Return a conversation that is not quite as good."""
    found = bytearray(said)
    for _ in range(drawn.choice((0, 1, 1, 2, 5))):
        at = drawn.randrange(max(1, min(len(found), drawn.choice((200, 400, len(found) or 1)))))
        match drawn.randrange(5):
            case 0:
                found[at : at + 1] = drawn.randbytes(1)
            case 1:
                found[at : at + 4] = drawn.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0")
                )
            case 2:
                del found[at : at + drawn.randrange(1, 64)]
            case 3:
                found[at:at] = found[at : at + drawn.randrange(1, 64)]
            case 4:
                del found[at:]
    return bytes(found)


def attack(server: Server, drawn: random.Random) -> None:
    """Say something wrong to a server, and read or do not read what it answers."""
    with contextlib.closing(Client(str(server.address))) as client:
        client.socket.settimeout(drawn.choice((0.0005, 0.01, 0.05)))
        with contextlib.suppress(OSError):
            client.send(mutated(conversation(drawn), drawn))
            while drawn.random() < 0.9 and client.socket.recv(1 << 20):
                pass


def run(folder: Path, *, seed: int, clients: int) -> None:
    """Attack a new server so many times; every 50 it is looked at.

    Raises:
        AssertionError: it suffered.
    """
    drawn = random.Random(seed)
    limits = Limits(handshake_seconds=2, inflight_bytes=32 << 20, clients=8)
    with jqcow.create(folder / "disk.qcow2", SIZE, cluster_size=4096, overwrite=True) as image:
        image.bitmaps.add("b", 4096)
        threads = threading.active_count()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with jqcow.serve(image, limits=limits) as server:
            for count in range(clients):
                attack(server, drawn)
                if count % 50 == 49 or count == clients - 1:
                    with connected(str(server.address), contexts=["base:allocation"]) as client:
                        client.write(b"well", 512 * (count % 100), nbd.FUA)
                        assert client.read(4, 512 * (count % 100)) == b"well"
                        assert not client.do(nbd.STATUS, 0, SIZE).error
        assert not image.check().findings
        until = time.monotonic() + nbd.WAIT_SECONDS
        while threading.active_count() > threads and time.monotonic() < until:
            time.sleep(0.01)
        assert threading.active_count() <= threads
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < MEMORY_MAX_KIB, f"{grown} KiB"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), seed=arguments.seed, clients=arguments.clients)
    print(f"{arguments.clients} clients: nothing wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
