"""The NBD server, asked by a client that shares nothing with it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import jqcow
from jqcow.nbd import Limits, Server
from tests.support import nbd
from tests.support.nbd import Answer, Client, connected

SIZE = (1 << 20) + 512
GREETED_SECONDS = 0.3


@pytest.fixture
def image(tmp_path: Path) -> Iterator[jqcow.Image]:
    with jqcow.create(tmp_path / "disk.qcow2", SIZE, cluster_size=4096) as image:
        image.pwrite(b"data" * 1024, 8192)
        yield image


@pytest.fixture
def server(image: jqcow.Image) -> Iterator[Server]:
    with jqcow.serve(image) as server:
        yield server


def where(server: Server) -> str:
    assert isinstance(server.address, str)
    return server.address


@contextlib.contextmanager
def greeted(server: Server, flags: int = 3) -> Iterator[Client]:
    with contextlib.closing(Client(where(server))) as client:
        client.greet(flags)
        yield client


# Negotiation


def test_the_socket_is_for_its_user_alone(server: Server) -> None:
    assert stat.S_IMODE(os.stat(where(server)).st_mode) == 0o600


def test_an_export_by_its_old_name(server: Server) -> None:
    for flags, zeroes in ((3, 0), (1, 124)):
        with greeted(server, flags) as client:
            client.send(b"IHAVEOPT" + struct.pack(">II", nbd.EXPORT_NAME, 0))
            size, _ = struct.unpack(">QH", client.receive(10))
            assert size == SIZE
            assert client.receive(zeroes) == bytes(zeroes)
            assert client.read(4, 8192) == b"data"
            client.disconnect()


def test_what_is_told_of_an_export(image: jqcow.Image) -> None:
    with jqcow.serve(image, name="ä", description="a disk") as server:
        assert server.uri.startswith("nbd+unix:///%C3%A4?socket=")
        with greeted(server) as client:
            assert client.option(nbd.LIST) == [(nbd.SERVER, b"\0\0\0\2\xc3\xa4a disk"), (nbd.ACK, b"")]
            assert client.go("", nbd.INFO)[0][0] == nbd.UNKNOWN
            told = [data for kind, data in client.go("ä", nbd.INFO, (1, 2, 3)) if kind == nbd.REP_INFO]
            assert struct.pack(">H", 1) + "ä".encode() in told
            assert struct.pack(">H", 2) + b"a disk" in told
            assert struct.pack(">HIII", 3, 1, 4096, 32 << 20) in told
            assert client.size == SIZE
            # All but READ_ONLY, ROTATIONAL and RESIZE; DF needs structured replies.
            assert client.flags == 0b1101_0110_1101
            client.option(nbd.STRUCTURED)
            client.go("ä")
            assert client.flags == 0b1101_1110_1101


def test_a_client_that_wants_nothing(server: Server) -> None:
    with greeted(server) as client:
        assert client.option(nbd.ABORT) == [(nbd.ACK, b"")]
        assert client.is_hung_up()


@pytest.mark.parametrize(
    ("option", "data", "reply"),
    [
        (nbd.STARTTLS, b"", nbd.POLICY),
        (nbd.LIST, b"x", nbd.INVALID),
        (nbd.STRUCTURED, b"x", nbd.INVALID),
        (nbd.EXTENDED, b"x", nbd.INVALID),
        (nbd.GO, b"", nbd.INVALID),
        (nbd.GO, b"\0\0\0\4none\0\0", nbd.UNKNOWN),
        (nbd.INFO, b"\xff\xff\xff\xff\0\0", nbd.INVALID),
        (nbd.SET_META, b"\0" * 8, nbd.INVALID),
        (4, b"", nbd.UNSUP),
        (99, b"whatever", nbd.UNSUP),
        (nbd.GO, bytes(100_000), nbd.TOO_BIG),
    ],
)
def test_an_option_that_is_refused(server: Server, option: int, data: bytes, reply: int) -> None:
    with greeted(server) as client:
        assert [kind for kind, _ in client.option(option, data)] == [reply]
        assert client.go()[-1] == (nbd.ACK, b"")
        assert client.read(4, 8192) == b"data"


@pytest.mark.parametrize(
    "said",
    [
        b"IHAVEOPT" + struct.pack(">II", nbd.EXPORT_NAME, 4) + b"none",
        b"IHAVEOPT" + struct.pack(">II", nbd.EXPORT_NAME, 100_000),
        b"IHAVEOPT" + struct.pack(">II", nbd.GO, 0xFFFFFFFF),
        b"IHAVENOT" + bytes(8),
        (b"IHAVEOPT" + struct.pack(">II", 99, 0)) * 1100,
    ],
)
def test_a_client_that_is_hung_up_on(server: Server, said: bytes) -> None:
    with greeted(server) as client:
        client.send(said)
        assert client.is_hung_up()


def test_unknown_flags_of_a_client(server: Server) -> None:
    with greeted(server, 7) as client:
        assert client.is_hung_up()


def test_a_client_that_takes_its_time(image: jqcow.Image) -> None:
    limits = Limits(handshake_seconds=GREETED_SECONDS)
    with (
        jqcow.serve(image, limits=limits) as server,
        greeted(server) as slow,
        connected(where(server)) as other,
    ):
        assert slow.is_hung_up()
        # One that has an export may be silent for as long as it likes.
        time.sleep(GREETED_SECONDS)
        assert other.read(4, 8192) == b"data"


def test_contexts_are_listed_and_chosen(image: jqcow.Image, server: Server) -> None:
    image.bitmaps.add("b")
    with greeted(server) as client:
        client.option(nbd.STRUCTURED)

        def names(option: int, *queries: str) -> list[str]:
            return [
                data[4:].decode()
                for kind, data in client.ask_contexts(option, "", queries)
                if kind == nbd.META
            ]

        every = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"]
        assert names(nbd.LIST_META) == every
        assert names(nbd.LIST_META, "qemu:", "base:allocation") == [every[1], every[2], every[0]]
        assert names(nbd.LIST_META, "qemu:dirty-bitmap:", "other:") == [every[2]]
        assert names(nbd.SET_META) == names(nbd.SET_META, "base:", "other:x", "qemu:dirty-bitmap:") == []
        assert names(nbd.SET_META, "qemu:dirty-bitmap:b", "base:allocation") == [every[2], every[0]]
        assert client.ask_contexts(nbd.SET_META, "none", ["base:allocation"])[0][0] == nbd.UNKNOWN


# Requests


@pytest.mark.parametrize(
    "form", [{"structured": False}, {}, {"extended": True}], ids=["simple", "structured", "extended"]
)
def test_what_requests_do(image: jqcow.Image, server: Server, form: dict[str, bool]) -> None:
    with connected(where(server), **form) as client:
        client.write(b"one", 1)
        client.write(b"two" * 100_000, 100_000, nbd.FUA)
        assert client.read(5, 0) == b"\0one\0"
        assert client.read(300_000, 100_000) == image.pread(300_000, 100_000) == b"two" * 100_000
        assert client.do(nbd.ZEROES, 100_001, 50_000, flags=nbd.NO_HOLE | nbd.FUA) == Answer()
        assert image.pread(50_002, 100_000) == b"t" + bytes(50_000) + b"t"
        assert client.do(nbd.TRIM, 163_840, 8192, flags=nbd.FUA) == Answer()
        assert image.reads_as_zeros(8192, 163_840)
        assert client.do(nbd.CACHE, 0, SIZE) == Answer()
        assert client.do(nbd.READ, 0, 0) == Answer()
        client.flush()
        client.disconnect()


@pytest.mark.parametrize("form", [{"structured": False}, {}, {"extended": True}])
def test_requests_that_fail(image: jqcow.Image, server: Server, form: dict[str, bool]) -> None:
    with connected(where(server), **form) as client:
        for command, offset, length, flags, error in (
            (nbd.READ, SIZE - 1, 2, 0, nbd.EINVAL),
            (nbd.READ, 2**64 - 1, 1, 0, nbd.EINVAL),
            (nbd.READ, 0, (32 << 20) + 1, 0, nbd.EINVAL),
            (nbd.READ, 0, 1, nbd.NO_HOLE, nbd.EINVAL),
            (nbd.TRIM, SIZE, 1, 0, nbd.EINVAL),
            (nbd.ZEROES, SIZE - 511, 512, 0, nbd.ENOSPC),
            (nbd.CACHE, SIZE, 1, 0, nbd.EINVAL),
            (nbd.STATUS, 0, 1, 0, nbd.EINVAL),
            (nbd.FLUSH, 0, 0, nbd.DF, nbd.EINVAL),
            (8, 0, SIZE, 0, nbd.EINVAL),
            (77, 0, 0, 0, nbd.EINVAL),
        ):
            assert client.do(command, offset, length, flags=flags).error == error, (command, flags)
        for data in (b"xy", b"xy" * 200_000):
            assert client.do(nbd.WRITE, SIZE - 1, data=data).error == nbd.ENOSPC
            assert client.do(nbd.WRITE, 0, data=data, flags=nbd.DF).error == nbd.EINVAL
        if not client.structured:
            assert client.do(nbd.READ, 0, 1, flags=nbd.DF).error == nbd.EINVAL
        # The data of a write that is refused for its length is skipped.
        assert client.do(nbd.WRITE, 0, data=bytes((32 << 20) + 1)).error == nbd.EINVAL
        assert client.read(4, 8192) == b"data"
    assert not image.check().findings


def test_a_read_only_export(image: jqcow.Image) -> None:
    with jqcow.serve(image, read_only=True) as server, connected(where(server)) as client:
        assert client.flags & 0b1000_0110_0010 == 2
        assert client.do(nbd.WRITE, 0, data=b"x").error == nbd.EPERM
        assert client.do(nbd.TRIM, 0, 4096).error == nbd.EPERM
        assert client.do(nbd.ZEROES, 0, 4096).error == nbd.EPERM
        assert client.read(4, 8192) == b"data"
        client.flush()


def test_zeroes_that_are_fast_or_are_not(image: jqcow.Image, server: Server) -> None:
    with connected(where(server)) as client:
        assert client.do(nbd.ZEROES, 8192 + 512, 512, flags=nbd.FAST_ZERO).error == nbd.ENOTSUP
        assert image.pread(4096, 8192) == b"data" * 1024
        assert client.do(nbd.ZEROES, 8192, 4096, flags=nbd.FAST_ZERO) == Answer()
        assert client.do(nbd.ZEROES, 8192 + 512, 512, flags=nbd.FAST_ZERO) == Answer()
        assert image.pread(4096, 8192) == bytes(4096)


def test_zeros_are_told_not_sent(server: Server) -> None:
    with connected(where(server)) as client:
        assert client.do(nbd.READ, 65536, 65536).holes == [(65536, 65536)]
        assert client.do(nbd.READ, 0, 65536).holes == []


@pytest.mark.parametrize("extended", [False, True])
def test_block_status(image: jqcow.Image, server: Server, extended: bool) -> None:
    image.bitmaps.add("b", 4096)
    image.pwrite(b"x", 65536)
    wanted = ["qemu:dirty-bitmap:b", "base:allocation", "qemu:allocation-depth"]
    with connected(where(server), contexts=wanted, extended=extended) as client:
        bitmap, allocation, depth = (client.contexts[name] for name in wanted)
        assert client.do(nbd.STATUS, 0, SIZE).status == {
            bitmap: [(65536, 0), (4096, 1), (SIZE - 69632, 0)],
            allocation: [(8192, 3), (4096, 0), (53248, 3), (4096, 0), (SIZE - 69632, 3)],
            depth: [(8192, 0), (4096, 1), (53248, 0), (4096, 1), (SIZE - 69632, 0)],
        }
        one = client.do(nbd.STATUS, 8192 + 512, 8192, flags=nbd.REQ_ONE)
        assert one.status == {bitmap: [(8192, 0)], allocation: [(3584, 0)], depth: [(3584, 1)]}
        assert client.do(nbd.STATUS, SIZE, 1).error == nbd.EINVAL
        assert client.do(nbd.STATUS, 0, 0).error == nbd.EINVAL
        image.bitmaps.remove("b")
        assert client.do(nbd.STATUS, 0, SIZE).error == nbd.EIO


def test_a_disk_that_grows_meanwhile(image: jqcow.Image, server: Server) -> None:
    with connected(where(server)) as client:
        assert client.do(nbd.READ, SIZE, 1).error == nbd.EINVAL
        image.resize(2 << 20)
        assert client.read(1, SIZE) == b"\0"
    with connected(where(server)) as client:
        assert client.size == 2 << 20


def test_many_requests_in_one_packet(image: jqcow.Image, server: Server) -> None:
    with connected(where(server)) as client:
        packet = b""
        for index in range(300):
            packet += client.request(nbd.WRITE, index * 512, data=bytes([index % 256]) * 512)
            packet += client.request(nbd.FLUSH) if index % 50 == 0 else client.request(nbd.READ, 500_000, 512)
        client.send(packet)
        answers = dict(client.answer() for _ in range(600))
        assert not any(answer.error for answer in answers.values())
        assert image.pread(300 * 512, 0) == b"".join(bytes([index % 256]) * 512 for index in range(300))


@pytest.mark.parametrize("cut", [10, 28, 30, 5000, 400_000])
def test_a_client_that_dies_in_a_request(image: jqcow.Image, server: Server, cut: int) -> None:
    with connected(where(server)) as client:
        client.send(client.request(nbd.WRITE, 0, data=b"n" * 500_000)[:cut])
    with connected(where(server)) as client:
        # No byte of a write that did not come whole is written.
        assert client.read(8, 0) == bytes(8)


@pytest.mark.parametrize("said", [bytes(28), struct.pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 65 << 20)])
def test_a_request_that_is_hung_up_on(server: Server, said: bytes) -> None:
    with connected(where(server)) as client:
        client.send(said)
        assert client.is_hung_up()
    with connected(where(server)) as client:
        assert client.read(4, 8192) == b"data"


def test_a_flush_that_keeps_nobody_waiting_takes_no_other_thread(server: Server) -> None:
    with connected(where(server)) as client:
        for _ in range(3):
            client.write(b"data", 0, nbd.FUA)
            client.flush()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbd-work")]


def test_a_request_that_waited_for_a_flush_waits_for_no_other(
    image: jqcow.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Semaphore(0), threading.Semaphore(0)

    def flush() -> None:
        begun.release()
        may_end.acquire(timeout=nbd.WAIT_SECONDS)

    monkeypatch.setattr(image, "flush", flush)
    with jqcow.serve(image) as server, connected(where(server)) as client:
        flushed = client.ask(nbd.FLUSH)
        begun.acquire()
        read = client.ask(nbd.READ, 8192, 4)
        may_end.release()
        assert [client.answer()[0] for _ in range(2)] == [flushed, read]
        flushed = client.ask(nbd.FLUSH)
        begun.acquire()
        read = client.ask(nbd.READ, 8192, 4)
        assert client.answer()[0] == read
        may_end.release()
        assert client.answer()[0] == flushed


# Limits, and the end


def test_more_clients_than_there_may_be(image: jqcow.Image) -> None:
    with jqcow.serve(image, limits=Limits(clients=2)) as server:
        with connected(where(server)) as first, connected(where(server)) as second:
            waiting = Client(where(server))
            waiting.socket.settimeout(0.2)
            with pytest.raises(TimeoutError):
                waiting.receive(1)
            waiting.socket.settimeout(nbd.WAIT_SECONDS)
            assert first.read(4, 8192) == second.read(4, 8192) == b"data"
        with contextlib.closing(waiting):
            assert waiting.begin().read(4, 8192) == b"data"


def test_a_client_that_takes_nothing_gives_way_to_others(image: jqcow.Image) -> None:
    """O1: its replies fill the budget; who needs it waits, and then it is hung up on."""
    image.resize(64 << 20)
    image.pwrite(b"x" * (64 << 20), 0)
    limits = Limits(inflight_bytes=32 << 20, stalled_seconds=0.5)
    with jqcow.serve(image, limits=limits) as server, connected(where(server)) as greedy:
        for index in range(8):
            greedy.ask(nbd.READ, index << 23, 8 << 20)
        while not server.budget.waiting:
            time.sleep(0.01)
        # As long as it keeps nobody waiting it may take its time.
        time.sleep(1.5)
        assert greedy.answer()[1].data == b"x" * (8 << 20)
        with connected(where(server)) as other:
            assert other.read(8 << 20, 0) == b"x" * (8 << 20)
        with pytest.raises(ConnectionError):
            for _ in range(8):
                greedy.answer()


def test_a_stopping_server_answers_what_is_in_flight(image: jqcow.Image) -> None:
    with jqcow.serve(image) as server:
        client = Client(where(server)).begin()
        cookies = [client.ask(nbd.WRITE, 512 * index, data=b"w" * 512, flags=nbd.FUA) for index in range(50)]
        # All were received when the last one is answered.
        answers = dict(client.answer() for _ in cookies)
        client.ask(nbd.READ, 0, 100_000)
        assert client.answer()[1].data[:512] == b"w" * 512
    assert sorted(answers) == cookies
    assert client.is_hung_up()
    assert image.pread(25_600, 0) == b"w" * 25_600


def test_a_client_that_leaves_durable_changes_behind(image: jqcow.Image) -> None:
    """They need no further place among those in flight, while the connection waits for all of these."""
    for _ in range(20):
        with jqcow.serve(image) as server, contextlib.closing(Client(where(server)).begin()) as client:
            asked = [client.request(nbd.ZEROES, 4096 * index, 4096, flags=nbd.FUA) for index in range(40)]
            client.send(b"".join(asked) + client.request(nbd.DISC))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbd")]


def test_a_closed_image_is_a_shutdown(tmp_path: Path) -> None:
    image = jqcow.create(tmp_path / "closed.qcow2", SIZE)
    with jqcow.serve(image) as server, connected(where(server)) as client:
        image.close()
        assert client.do(nbd.READ, 0, 1).error == nbd.ESHUTDOWN
        assert client.do(nbd.FLUSH).error == nbd.ESHUTDOWN


def test_a_path_is_opened_and_closed_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    jqcow.create(path, SIZE).close()
    with jqcow.serve(path, socket=tmp_path / "s") as server, connected(str(tmp_path / "s")) as client:
        assert server.uri == f"nbd+unix:///?socket={tmp_path}/s"
        client.write(b"kept", 0)
        with pytest.raises(jqcow.ImageInUse):
            jqcow.open(path)
    assert not (tmp_path / "s").exists()
    with jqcow.open(path) as image:
        assert image.recovered is None
        assert image.pread(4, 0) == b"kept"


def test_tcp(image: jqcow.Image) -> None:
    with jqcow.serve(image, port=0) as server:
        address = server.address
        assert isinstance(address, tuple)
        with connected(("localhost", address[1])) as client:
            assert client.read(4, 8192) == b"data"


def test_where_nobody_can_listen(image: jqcow.Image, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError), jqcow.serve(image, socket=tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    with (
        jqcow.serve(image, socket=tmp_path / "s"),
        pytest.raises(OSError),
        jqcow.serve(image, socket=tmp_path / "s"),
    ):
        pass
    with pytest.raises(ValueError), jqcow.serve(image, socket=tmp_path / "s", port=1):
        pass


def test_a_dead_server_leaves_its_socket(image: jqcow.Image, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with jqcow.serve(image, socket=tmp_path / "s"), connected(str(tmp_path / "s")) as client:
        assert client.read(4, 8192) == b"data"


def test_no_thread_is_left(image: jqcow.Image) -> None:
    with jqcow.serve(image) as server, connected(where(server)) as client:
        client.read(1 << 20, 0)
        client.flush()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("nbd")]
    assert left == []
