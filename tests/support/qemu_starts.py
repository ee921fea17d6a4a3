"""Images made by QEMU, to start from: with snapshots, compressed clusters, refcounts of other widths."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

from jqcow.ondisk.header import Header, HeaderArea
from jqcow.testing import SectorModel
from tests.support.expectation import Taken, Windows
from tests.support.starts import Start

ENTRY_BYTES, DATE_AT = 40, 16
LENGTHS_AT = ((12, 2), (14, 2), (36, 4))
"""Of an entry of the snapshot table: its fixed part, the date, and the widths of id, name and extra data."""


@dataclass(frozen=True)
class Recipe:
    """How QEMU is to make an image: its options, what it holds, and how many snapshots it gets.

    ``compressed``: the patterns of the first snapshot are converted, not written.
    """

    options: str
    windows: Windows
    layers: tuple[tuple[tuple[int, int, int], ...], ...]
    compressed: bool = False

    def guest(self, layer: int) -> bytes:
        """Return what the windows hold after a layer of writes (position, length, pattern)."""
        content = bytearray(self.windows.model_bytes)
        for writes in self.layers[: layer + 1]:
            for position, length, pattern in writes:
                content[position : position + length] = bytes([pattern]) * length
        return bytes(content)

    def start(self) -> Start:
        """Return the image, with a snapshot of each layer but the last."""
        content = made(self)
        area = HeaderArea.parse(content[: 1 << HeaderArea.parse(content[:4096]).header.cluster_bits])
        size_bytes, taken = self.windows.disk_bytes, []
        for layer in range(len(self.layers) - 1):
            sectors = SectorModel(self.windows.model_bytes, self.guest(layer))
            taken.append(Taken(_name(layer), sectors, size_bytes))
        return Start(
            self.windows,
            content,
            self.guest(len(self.layers) - 1),
            size_bytes,
            extensions=area.data[area.header.header_length :],
            snapshots=tuple(taken),
        )


def _name(layer: int) -> str:
    return f"by-qemu-{layer}"


@functools.cache
def made(recipe: Recipe) -> bytes:
    """Return the file that QEMU makes."""
    with tempfile.TemporaryDirectory(prefix="jqcow-crash-") as folder:
        path, raw = Path(folder, "made.qcow2"), Path(folder, "first.raw")
        size = str(recipe.windows.disk_bytes)
        if recipe.compressed:
            _run("qemu-img", "create", "-q", "-f", "raw", str(raw), size)
            _write(recipe, 0, raw, "raw")
            _run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", recipe.options, str(raw), str(path))
        else:
            _run("qemu-img", "create", "-q", "-f", "qcow2", "-o", recipe.options, str(path), size)
            _write(recipe, 0, path, "qcow2")
        for layer in range(1, len(recipe.layers)):
            _run("qemu-img", "snapshot", "-c", _name(layer - 1), str(path))
            _write(recipe, layer, path, "qcow2")
        return without_dates(path.read_bytes())


def without_dates(content: bytes) -> bytes:
    """Return an image whose snapshots are dated 1970: a run is the same every time."""
    header, dated = Header.unpack(content[:512]), bytearray(content)
    position = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        lengths = [int.from_bytes(dated[position + at :][:width], "big") for at, width in LENGTHS_AT]
        dated[position + DATE_AT : position + DATE_AT + 8] = bytes(8)
        position += ENTRY_BYTES + sum(lengths) + -(ENTRY_BYTES + sum(lengths)) % 8
    return bytes(dated)


def _write(recipe: Recipe, layer: int, path: Path, kind: str) -> None:
    arguments = []
    for position, length, pattern in recipe.layers[layer]:
        arguments += ["-c", f"write -P {pattern} {recipe.windows.guest(position)} {length}"]
    if arguments:
        _run("qemu-io", "-f", kind, *arguments, str(path))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def qemu_image(cluster_bytes: int, random: Random) -> Start:
    """An image made and filled by QEMU: its header fills the first sector, its L1 table stands elsewhere."""
    windows = Windows.of(cluster_bytes)
    window_bytes = windows.window_bytes
    writes = ((0, window_bytes // 2, 0x11), (window_bytes, window_bytes, 0x22))
    return Recipe(f"cluster_size={cluster_bytes}", windows, (writes,)).start()


def qemu_snapshots_image(cluster_bytes: int, random: Random) -> Start:
    """An image by QEMU with two snapshots, in refcounts of some width."""
    options = f"cluster_size={cluster_bytes},refcount_bits={random.choice((4, 8, 16, 64))}"
    return Recipe(options, Windows.of(cluster_bytes), _layers(cluster_bytes)).start()


def qemu_compressed_image(cluster_bytes: int, random: Random) -> Start:
    """An image that QEMU compressed, packed to the byte, with a snapshot of all that."""
    kind = random.choice(("zlib", "zstd"))
    options = f"cluster_size={cluster_bytes},refcount_bits=16,compression_type={kind}"
    return Recipe(options, Windows.of(cluster_bytes), _layers(cluster_bytes)[:2], compressed=True).start()


def _layers(cluster_bytes: int) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    window_bytes = Windows.of(cluster_bytes).window_bytes
    return (
        ((0, window_bytes // 2, 0x11), (window_bytes, window_bytes, 0x22)),
        ((cluster_bytes, cluster_bytes, 0x33), (2 * window_bytes, 512, 0x44)),
        ((cluster_bytes - 512, 1024, 0x55), (window_bytes, cluster_bytes, 0x66)),
    )


def narrow_image(cluster_bytes: int, random: Random) -> Start:
    """An empty image by QEMU, whose refcounts have one bit or two."""
    options = f"cluster_size={cluster_bytes},refcount_bits={random.choice((1, 2))}"
    return Recipe(options, Windows.of(cluster_bytes), ((),)).start()
