"""Images that jqcow and QEMU change in turn, and a raw disk as the model that both are held to."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import jqcow
from jqcow.testing import SECTOR_BYTES
from tests.support.operations import Discard, Request, Write, WriteZeroes
from tests.support.qemu import check_clean, compare, done, qemu_io


class RawModel:
    """A sparse raw file that gets every change too; it may be larger than memory."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        path.touch()
        os.truncate(path, size)

    def write(self, data: bytes, offset: int) -> None:
        """Write; a hole is made by `zero`."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def zero(self, length: int, offset: int) -> None:
        """Zero a range, by writing."""
        self.write(bytes(length), offset)

    def resize(self, size: int) -> None:
        """Cut or grow."""
        os.truncate(self.path, size)
        self.size = size

    def read(self, length: int, offset: int) -> bytes:
        """Read; the range lies on the disk."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclass
class Rounds:
    """One image that jqcow and QEMU change in turn. ``hot`` ranges get most of the changes."""

    image: Path
    model: RawModel
    cluster_bytes: int
    chance: random.Random

    def __post_init__(self) -> None:
        reach = min(self.model.size, 24 * self.cluster_bytes)
        starts = [0, max(0, self.model.size - reach)]
        starts += [self.chance.randrange(max(1, self.model.size - reach)) for _ in range(2)]
        self.hot = [(start, reach) for start in starts]

    def random_range(self, *, unit: int = 1) -> tuple[int, int]:
        """Return (offset, length) in a hot range, multiples of ``unit`` save for the end of the disk."""
        start, reach = self.chance.choice(self.hot)
        offset = (start + self.chance.randrange(max(1, reach))) // unit * unit
        length = self.chance.choice((1, 512, 4096, self.cluster_bytes, 3 * self.cluster_bytes + 700))
        length = min(-(-length // unit) * unit, self.model.size - offset)
        return offset, max(0, length)

    def by_jqcow(self, steps: int) -> None:
        """Change the image through jqcow, and close it cleanly."""
        with jqcow.open(self.image, "r+", allow_files=True) as image:
            self.require_same(image)
            for _ in range(steps):
                self._jqcow_step(image)
            self.require_same(image)
            assert image.check().ok
        self.judge()

    def _jqcow_step(self, image: jqcow.Image) -> None:
        offset, length = self.random_range()
        match self.chance.randrange(8):
            case 0 | 1 | 2 | 3:
                data = self.chance.randbytes(length)
                self.take(Write(offset, data, self.chance.random() < 0.1)).on(image)
            case 4:
                self.take(WriteZeroes(offset, length, self.chance.random() < 0.5)).on(image)
            case 5:
                self.take(Discard(*self.random_range(unit=self.cluster_bytes))).on(image)
            case 6:
                image.flush()
            case _:
                image.checkpoint()

    def take(self, request: Request) -> Request:
        """Tell the model of a request, and return it."""
        offset, data = request.result(self.cluster_bytes, self.model.size)
        self.model.write(data, offset)
        return request

    def by_qemu(self, steps: int) -> None:
        """Change the image through qemu-io."""
        qemu_io(self.image, *(self._qemu_step() for _ in range(steps)))
        self.judge()

    def _qemu_step(self) -> str:
        unit = self.chance.choice((SECTOR_BYTES, self.cluster_bytes))
        offset, length = self.random_range(unit=unit)
        if not length:
            return "flush"
        match self.chance.randrange(7):
            case 0 | 1 | 2:
                return self.take(Write.pattern(offset, length, self.chance.randrange(1, 256))).qemu()
            case 3 | 4 as kind:
                return self.take(WriteZeroes(offset, length, unmap=kind == 4)).qemu()
            case 5:
                return self.take(Discard(*self.random_range(unit=self.cluster_bytes))).qemu()
            case _:
                return "flush"

    def resize_by_qemu(self, size: int) -> None:
        """Grow or shrink the disk by qemu-img."""
        done("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", self.image, size)
        self.model.resize(size)
        self.__post_init__()

    def resize_by_jqcow(self, size: int) -> None:
        """Grow the disk by jqcow."""
        with jqcow.open(self.image, "r+", allow_files=True) as image:
            image.resize(size)
        self.model.resize(size)
        self.__post_init__()
        self.judge()

    def require_same(self, image: jqcow.Image) -> None:
        """jqcow reads the model in all hot ranges."""
        assert image.size == self.model.size
        for start, reach in self.hot:
            assert image.pread(reach, start) == self.model.read(reach, start), f"differs near {start:#x}"

    def judge(self) -> None:
        """QEMU finds nothing wrong, and reads the model; so does jqcow, everywhere."""
        check_clean(self.image)
        compare(self.image, self.model.path)
        with jqcow.open(self.image, allow_files=True) as image:
            self.require_same(image)
            assert image.info().journal is None
