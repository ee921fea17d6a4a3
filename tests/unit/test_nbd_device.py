"""Exports as files: read anywhere, written in order, by the commands and by themselves."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.main import main, main_like_qemu_img
from jqcow.errors import ReadOnlyError
from jqcow.nbd import device as devices
from jqcow.nbd import protocol
from jqcow.nbd.client import Export
from jqcow.nbd.device import ExportDevice, ExportStream
from jqcow.nbd.protocol import Chunk, ExportFlag, Option, Reply
from tests.support.qemu import done

MIB = 1 << 20
CONTENT = bytes(MIB) + b"x" * MIB + bytes(2 * MIB)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with jqcow.create(tmp_path / "image", 4 * MIB) as image:
        image.pwrite(b"x" * MIB, MIB)
    return tmp_path


@contextmanager
def exported(folder: Path, *, read_only: bool = False) -> Iterator[tuple[Export, str]]:
    path = str(folder / "socket")
    with jqcow.serve(folder / "image", socket=path, read_only=read_only):
        yield Export(path), f"nbd+unix:///?socket={path}"


def test_it_reads_what_is_there_and_zeros_past_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "STEP_BYTES", 300_000)
    with exported(folder) as (export, uri), closing(ExportDevice(export, uri)) as device:
        assert (device.size(), device.path, device.is_on_host) == (4 * MIB, uri, False)
        parts = ((0, 4 * MIB), (MIB - 512, 1024), (4 * MIB - 512, 1024), (5 * MIB, 512), (7, 0))
        for offset, length in parts:
            wanted = (CONTENT + bytes(2 * MIB))[offset : offset + length]
            assert device.pread(length, offset) == wanted
        assert list(device.data_extents(0, 4 * MIB)) == [(MIB, MIB)]
        assert list(device.data_extents(MIB + 512, 512)) == [(MIB + 512, 512)]
        assert not [*device.data_extents(0, MIB), *device.data_extents(2 * MIB, MIB)]
        with pytest.raises(ReadOnlyError):
            device.pwrite(b"x", 0)
        device.close()
        with pytest.raises(OSError, match="closed"):
            device.pread(1, 0)


def test_commands_read_an_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, part, image = (str(folder / name) for name in ("copy", "part", "image"))
    with exported(folder, read_only=True) as (_, uri):
        assert main(["info", uri]) == 0
        told = capsys.readouterr().out.splitlines()
        assert told == [
            f"image: {uri}",
            "file format: raw",
            "virtual size: 4 MiB (4194304 bytes)",
            "disk size: unavailable",
        ]
        assert main(["info", "--output=json", "--image-opts", f"driver=nbd,path={folder}/socket"]) == 0
        assert "actual-size" not in capsys.readouterr().out
        assert main(["convert", "-f", "raw", "-O", "qcow2", uri, copy]) == 0
        assert main(["dd", "-f", "raw", f"if={uri}", f"of={part}", "bs=1M", "count=1", "skip=1"]) == 0
        assert main(["compare", "-f", "raw", uri, copy]) == 0
        assert main(["map", "--output=json", "-f", "raw", uri]) == 0
        assert main(["check", "-r", "all", uri]) == 1
    assert (folder / "part").read_bytes() == b"x" * MIB
    done("qemu-img", "compare", image, copy)


@pytest.mark.parametrize("words", [["-O", "qcow2"], ["-c", "-O", "qcow2"], ["-n", "-O", "raw"]])
@pytest.mark.parametrize("run", [main, main_like_qemu_img])
def test_convert_writes_into_an_export(
    run: Callable[[list[str]], int], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder / "source"
    with jqcow.create(source, 2 * MIB) as image:
        image.pwrite(b"y" * 100_000, 300_000)
    with exported(folder) as (_, uri):
        assert run(["convert", *words, str(source), uri]) == 0
        kind = words[-1]
        assert main(["compare", "-f", "qcow2", "-F", kind, str(source), uri]) == 0
        done("qemu-img", "compare", "-f", "qcow2", "-F", kind, source, uri)
        if kind == "qcow2":
            done("qemu-img", "check", "-f", "qcow2", uri)
            assert main(["check", uri]) == 0


def test_what_does_not_fit_or_may_not_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jqcow.create(folder / "source", 8 * MIB).close()
    words = ["convert", "-n", "-O", "raw", str(folder / "source")]
    with exported(folder) as (_, uri):
        assert main([*words, uri]) == 1
        assert "needs" in capsys.readouterr().err
        assert main([*words, str(folder / "source"), uri]) == 1
        assert main(["convert", "-S", "0", "-O", "qcow2", str(folder / "source"), uri]) == 1
        assert main(["create", "-f", "qcow2", uri, "1M"]) == 1
        assert not list(folder.glob("nbd*"))
    with exported(folder, read_only=True) as (_, uri):
        assert main([*words, uri]) == 1
        assert "read-only" in capsys.readouterr().err


def test_an_image_does_not_make_anybody_read_an_export(folder: Path) -> None:
    with exported(folder) as (_, uri):
        # It is known how by now.
        assert main(["info", uri]) == 0
        words = ["create", "-q", "-u", "-f", "qcow2", "-b", uri, "-F", "raw", str(folder / "top"), "1M"]
        assert main_like_qemu_img(words) == 0
        with pytest.raises(jqcow.JqcowError):
            jqcow.open(folder / "top", allow_files=True)


# Other servers

Answer = Callable[[socket.socket], None]


def simple(data: bytes, code: int = 0, cookie: int = 1) -> Answer:
    return lambda client: client.sendall(
        protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, code, cookie) + data
    )


def hang_up(client: socket.socket) -> None:
    simple(b"abc")(client)
    client.shutdown(socket.SHUT_RDWR)


def chunks(*parts: tuple[int, bytes], cookie: int = 1) -> Answer:
    def answer(client: socket.socket) -> None:
        for index, (kind, data) in enumerate(parts):
            flags = protocol.CHUNK_DONE if index + 1 == len(parts) else 0
            head = (protocol.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(data))
            client.sendall(protocol.STRUCTURED_REPLY.pack(*head) + data)

    return answer


def data_at(offset: int, data: bytes) -> tuple[int, bytes]:
    return Chunk.OFFSET_DATA, protocol.OFFSET.pack(offset) + data


def hole_at(offset: int, length: int) -> tuple[int, bytes]:
    return Chunk.OFFSET_HOLE, protocol.HOLE.pack(offset, length)


@contextmanager
def other_server(folder: Path, *answers: Answer) -> Iterator[Export]:
    """Be a server of an export of 1 MiB that knows no options but GO, nor zeroes and flushes."""
    path = str(folder / "socket")

    def serve() -> None:
        client, _ = listening.accept()
        with client:
            greeting = (protocol.NBD_MAGIC, protocol.OPTION_MAGIC, protocol.FLAG_FIXED_NEWSTYLE)
            client.sendall(protocol.GREETING.pack(*greeting))
            client.recv(protocol.CLIENT_FLAGS.size)
            for option in (Option.STRUCTURED_REPLY, Option.GO):
                client.recv(4096)
                found = Reply.ERR_UNSUP if option != Option.GO else Reply.INFO
                data = b"" if option != Option.GO else protocol.INFO_EXPORT.pack(0, MIB, ExportFlag.HAS_FLAGS)
                for kind, told in ((found, data), (Reply.ACK, b""))[: 2 if option == Option.GO else 1]:
                    head = (protocol.OPTION_REPLY_MAGIC, option, kind, len(told))
                    client.sendall(protocol.OPTION_REPLY.pack(*head) + told)
            for answer in answers:
                client.recv(protocol.REQUEST.size, socket.MSG_WAITALL)
                answer(client)
            client.recv(1 << 16)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        server = threading.Thread(target=serve)
        server.start()
        try:
            yield Export(path)
        finally:
            server.join()


@pytest.mark.parametrize(
    "answer",
    [
        simple(b"abcdef"),
        chunks(data_at(512, b"abcdef")),
        chunks(data_at(515, b"def"), data_at(512, b"abc")),
        chunks(data_at(512, b"abcdef"), (Chunk.NONE, b"")),
    ],
)
def test_every_form_of_an_answer_is_taken(answer: Answer, tmp_path: Path) -> None:
    with other_server(tmp_path, answer) as export, closing(ExportDevice(export, "it")) as device:
        assert list(device.data_extents(0, 2 * MIB)) == [(0, MIB)]
        assert device.pread(6, 512) == b"abcdef"


def test_a_hole_is_zeros(tmp_path: Path) -> None:
    answer = chunks(hole_at(0, 4), data_at(4, b"ab"))
    with other_server(tmp_path, answer) as export, closing(ExportDevice(export, "it")) as device:
        assert device.pread(6, 0) == bytes(4) + b"ab"


@pytest.mark.parametrize(
    ("answer", "number", "words"),
    [
        (hang_up, errno.EPROTO, "hung up"),
        (simple(b"", code=errno.EIO), errno.EIO, "refuses READ"),
        (simple(b"abcdef", cookie=2), errno.EPROTO, "another request"),
        (lambda client: client.sendall(b"x" * 20), errno.EPROTO, "another form"),
        (chunks(data_at(0, b"abc")), errno.EPROTO, "another part"),
        (chunks(data_at(0, b"abcdefg")), errno.EPROTO, "another part"),
        (chunks(data_at(1, b"abcdef")), errno.EPROTO, "another part"),
        (chunks(hole_at(0, 7)), errno.EPROTO, "another part"),
        (chunks((Chunk.OFFSET_HOLE, b"x")), errno.EPROTO, "another part"),
        (chunks((Chunk.NONE, b"x")), errno.EPROTO, "another part"),
        (chunks((Chunk.NONE, b"")), errno.EPROTO, "another part"),
        (chunks(data_at(0, b"abcdef"), cookie=2), errno.EPROTO, "another request"),
        (chunks((Chunk.ERROR, protocol.ERROR_HEAD.pack(errno.EPERM, 0))), errno.EPERM, "refuses READ"),
    ],
)
def test_what_a_server_may_not_answer(tmp_path: Path, answer: Answer, number: int, words: str) -> None:
    with other_server(tmp_path, answer) as export:
        device = ExportDevice(export, "it")
        with closing(device), pytest.raises(OSError, match=words) as raised:
            device.pread(6, 0)
    assert raised.value.errno == number


def test_zeros_are_written_where_the_server_makes_none(tmp_path: Path) -> None:
    got = list[bytes]()

    def take(client: socket.socket) -> None:
        got.append(client.recv(3, socket.MSG_WAITALL))
        simple(b"")(client)

    with other_server(tmp_path, take) as export:
        stream = ExportStream(export, tmp_path)
        stream.write_zeros(3)
        stream.finish()
        stream.close()
    assert stream.written_bytes == 3 and got == [bytes(3)]
