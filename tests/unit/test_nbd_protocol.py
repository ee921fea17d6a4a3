"""The NBD protocol's structures: what a client's bytes may be, and what replies look like."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow.nbd import protocol
from jqcow.nbd.protocol import Asked, Form, Malformed, Queries, Request

REQUEST = Request(0, 0, 0x1122334455667788, 4096, 512)


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def test_what_is_asked_of_an_export() -> None:
    assert protocol.parse_asked(text(b"disk") + struct.pack(">HHH", 2, 3, 1)) == Asked("disk", (3, 1))
    assert protocol.parse_asked(text(b"") + b"\0\0") == Asked("", ())


def test_what_is_asked_of_contexts() -> None:
    data = text(b"disk") + struct.pack(">I", 2) + text(b"base:") + text("qemu:dirty-bitmap:é".encode())
    assert protocol.parse_queries(data) == Queries("disk", ("base:", "qemu:dirty-bitmap:é"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        text(b"disk"),
        text(b"disk") + b"\0\1",
        text(b"disk") + b"\0\0\0",
        text(b"a\0b") + b"\0\0",
        text(b"\xff") + b"\0\0",
        text(b"x" * 4097) + b"\0\0",
        b"\xff\xff\xff\xff" + bytes(8),
    ],
)
def test_what_asks_for_no_export(data: bytes) -> None:
    with pytest.raises(Malformed):
        protocol.parse_asked(data)


@pytest.mark.parametrize(
    "data",
    [
        text(b""),
        text(b"") + struct.pack(">I", 1),
        text(b"") + struct.pack(">I", 0) + b"\0",
        text(b"") + struct.pack(">I", protocol.QUERIES_MAX + 1) + text(b"") * (protocol.QUERIES_MAX + 1),
        text(b"") + struct.pack(">I", 0xFFFFFFFF),
    ],
)
def test_what_asks_for_no_contexts(data: bytes) -> None:
    with pytest.raises(Malformed):
        protocol.parse_queries(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    for parse in (protocol.parse_asked, protocol.parse_queries, protocol.parse_name):
        try:
            parse(data)
        except Malformed:
            continue


@pytest.mark.parametrize(
    ("form", "done", "failed", "data"),
    [
        (
            Form(),
            "67446698 00000000 1122334455667788",
            "67446698 00000016 1122334455667788",
            "67446698 00000000 1122334455667788",
        ),
        (
            Form(structured=True),
            "668e33ef 0001 0000 1122334455667788 00000000",
            "668e33ef 0001 8001 1122334455667788 00000008 00000016 0002 6e6f",
            "668e33ef 0001 0001 1122334455667788 00000208 0000000000001000",
        ),
        (
            Form(structured=True, extended=True),
            "6e8a278c 0001 0000 1122334455667788 0000000000001000 0000000000000000",
            "6e8a278c 0001 8001 1122334455667788 0000000000001000 0000000000000008 00000016 0002 6e6f",
            "6e8a278c 0001 0001 1122334455667788 0000000000001000 0000000000000208 0000000000001000",
        ),
    ],
)
def test_replies(form: Form, done: str, failed: str, data: str) -> None:
    assert form.done(REQUEST) == bytes.fromhex(done)
    assert form.failed(REQUEST, 22, "no") == bytes.fromhex(failed)
    assert form.data_head(REQUEST) == bytes.fromhex(data)


def test_the_text_of_an_error_is_bounded_utf_8() -> None:
    payload = protocol.error_payload(5, "é" * 5000 + "\udc80")
    code, length = struct.unpack(">IH", payload[:6])
    assert (code, length) == (5, 4096)
    assert payload[6:].decode() == "é" * 2048
