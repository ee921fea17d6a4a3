"""Stories of what others wrote: names that lead elsewhere, extensions of one type, bytes behind a table."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import jqcow
from jqcow.engine import tracking
from jqcow.errors import CorruptionError, JqcowError
from jqcow.ondisk import bitmaps
from jqcow.ondisk.header import EXTENSION_BACKING_FORMAT, Extension, HeaderArea
from jqcow.ondisk.naming import NamedFile
from jqcow.testing import SimulatedDevice
from tests.crash.judge import PromiseBroken, require
from tests.support.users import create_simulated, open_simulated

SIZE = 1 << 20
BASE = b"\x33" * SIZE
SECRET = b"\x66" * SIZE
WHOLE_REGION_BITS = 24


def link_that_leads_elsewhere() -> None:
    """P6: between the question and the opening somebody turns a link."""
    with TemporaryDirectory() as folder:
        link, base, secret = (Path(folder, name) for name in ("link", "base", "secret"))
        base.write_bytes(BASE)
        secret.write_bytes(SECRET)
        link.symlink_to(base)
        image = Path(folder, "image")
        jqcow.create(image, SIZE, backing_file="link", backing_format="raw").close()

        def allow(named: NamedFile) -> bool:
            allowed = named.real_path == os.path.realpath(base)
            link.unlink()
            link.symlink_to(secret)
            return allowed

        with suppress(JqcowError), jqcow.open(image, allow_files=allow) as opened:
            require(opened.pread(SIZE, 0) == BASE, "P6: a file was read that nobody allowed")


def two_formats_of_one_file() -> None:
    """P6: a guest's raw disk looks like an image; of two formats the last counts, as in QEMU."""
    with TemporaryDirectory() as folder:
        Path(folder, "secret").write_bytes(SECRET)
        guest, image = Path(folder, "guest"), Path(folder, "image")
        jqcow.create(guest, SIZE, backing_file="secret", backing_format="raw").close()
        disk = guest.read_bytes().ljust(SIZE, b"\0")
        guest.write_bytes(disk)
        jqcow.create(image, SIZE, backing_file="guest", backing_format="raw").close()
        content = image.read_bytes()
        header = HeaderArea.parse(content[:65536]).header
        first = Extension(EXTENSION_BACKING_FORMAT, b"qcow2").pack()
        changed = bytearray(content[: header.header_length] + first + content[header.header_length :])
        changed[8:16] = (header.backing_file_offset + len(first)).to_bytes(8, "big")
        image.write_bytes(bytes(changed[:65536]) + content[65536:])
        with jqcow.open(image, allow_files=True) as opened:
            require(opened.pread(SIZE, 0) == disk[:SIZE], "P6: a guest's bytes were taken for an image")


def bytes_behind_a_bitmap_table() -> None:
    """P1: behind the entries of a bitmap's table lies what looks like more; a region reaches further."""
    device = SimulatedDevice()
    with create_simulated(device, 600 << 10, 512) as image:
        image.bitmaps.add("fine", 512)
        image.pwrite(b"old!" * 128, 0)
        (guest,) = [extent.host_offset for extent in image.extents(512, 0)]
    content = bytearray(device.content())
    place = bitmaps.place_of(HeaderArea.parse(bytes(content[:512])))
    if place is None or guest is None:
        raise RuntimeError("the image has no bitmap, or no data")
    table = int.from_bytes(content[place.offset : place.offset + 8], "big")
    entries = int.from_bytes(content[place.offset + 8 : place.offset + 12], "big")
    length = 512 - 8 * entries
    content[table + 8 * entries : table + 512] = guest.to_bytes(8, "big") * (length // 8)
    before, tracking.REGION_BITS = tracking.REGION_BITS, WHOLE_REGION_BITS
    try:
        with open_simulated(SimulatedDevice(bytes(content))) as image:
            image.pwrite(b"new" * 100, 0)
            image.flush()
            image.write_zeroes(1024, 300 << 10)
            image.flush()
            require(image.pread(301, 0) == b"new" * 100 + b"o", "P1: bits were written over the guest's data")
            require(image.check().ok, "P2: bits behind the end of a table")
    except CorruptionError as error:
        raise PromiseBroken(f"P1: what lies behind a table was taken for a part of it: {error}") from error
    finally:
        tracking.REGION_BITS = before
