"""Good images for the differential run: of every kind that both programs read, most of them made by QEMU.

The same images come out in every process and every run: what QEMU dates is set to 0.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jqcow
from jqcow.ondisk import layout
from jqcow.ondisk.header import Header
from jqcow.testing import SimulatedDevice
from tests.fuzz.hostile import JOURNAL_BYTES, Sample
from tests.support.qemu import done, qemu_io

BASE_NAME = "base.raw"
"""What an overlay names; it lies beside the image."""

BASE_BYTES = 256 << 10
_SNAPSHOT_DATE_OFFSET = 16
_SNAPSHOT_DATE_BYTES = 16
_SNAPSHOT_FIXED_BYTES = 40


@dataclass(frozen=True)
class Recipe:
    """How a sample is made: what is given to ``qemu-img create -o``, and how large the disk is, in clusters.

    ``snapshots`` are how many; ``lives`` tells that a sample with a live journal is made of it, too.
    """

    cluster_bytes: int
    options: str = "refcount_bits=16"
    disk_clusters: int = 200
    snapshots: int = 0
    overlay: bool = False
    bitmap: bool = False
    lives: bool = False

    @property
    def name(self) -> str:
        """What a case tells of its sample."""
        parts = [f"{self.cluster_bytes}", self.options, f"{self.snapshots} snapshots"]
        return ", ".join(parts + ["overlay"] * self.overlay + ["bitmap"] * self.bitmap)


RECIPES = (
    Recipe(512, snapshots=2, disk_clusters=600, lives=True),
    Recipe(512, "compat=0.10", snapshots=1, disk_clusters=300),
    Recipe(1024, "refcount_bits=1", lives=True),
    Recipe(2048, "refcount_bits=2"),
    Recipe(4096, "refcount_bits=4", snapshots=2, lives=True),
    Recipe(4096, "compression_type=zstd", snapshots=1, disk_clusters=1100),
    Recipe(4096, overlay=True, snapshots=1),
    Recipe(8192, "refcount_bits=64", disk_clusters=1500),
    Recipe(16384, "refcount_bits=8", bitmap=True),
    Recipe(65536, snapshots=2, disk_clusters=40, lives=True),
    Recipe(65536, "compat=0.10", disk_clusters=40),
    Recipe(65536, "compat=0.10", disk_clusters=30, overlay=True, snapshots=1),
    Recipe(65536, "lazy_refcounts=on", disk_clusters=30, overlay=True),
    Recipe(1 << 20, disk_clusters=4, snapshots=1),
    Recipe(2 << 20, "refcount_bits=32", disk_clusters=3, snapshots=1, lives=True),
)


def base_content() -> bytes:
    """Return the bytes of what lies below an overlay."""
    return random.Random(BASE_NAME).randbytes(BASE_BYTES)


@functools.cache
def made() -> tuple[tuple[Recipe, Sample], ...]:
    """Return all samples, clean and live."""
    found: list[tuple[Recipe, Sample]] = []
    with tempfile.TemporaryDirectory(prefix="jqcow-samples-") as folder:
        Path(folder, BASE_NAME).write_bytes(base_content())
        for number, recipe in enumerate(RECIPES):
            content = _make(Path(folder, f"{number}.qcow2"), recipe)
            found.append((recipe, _sample(content, live=False)))
            if recipe.lives:
                found += [(recipe, sample) for sample in _continued(content, random.Random(number))]
    return tuple(found)


def _sample(content: bytes, *, live: bool, snapshots_offset: int | None = None) -> Sample:
    header = Header.unpack(content[:512])
    table = header.snapshots_offset if snapshots_offset is None else snapshots_offset
    return Sample(content, 1 << header.cluster_bits, live, table)


def _make(path: Path, recipe: Recipe) -> bytes:
    options = f"cluster_size={recipe.cluster_bytes},{recipe.options}"
    below = ("-b", BASE_NAME, "-F", "raw") if recipe.overlay else ()
    disk_bytes = recipe.cluster_bytes * recipe.disk_clusters
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *below, path, disk_bytes)
    chance = random.Random(recipe.name)
    # QEMU does not compress into a cluster that has data: each of these is for one write.
    packed = list(range(1, recipe.disk_clusters, 2))
    chance.shuffle(packed)
    for number in range(recipe.snapshots + 1):
        qemu_io(path, *_writes(recipe, chance, [packed.pop() for _ in range(min(3, len(packed)))]))
        if number < recipe.snapshots:
            done("qemu-img", "snapshot", "-c", f"snapshot {number}", path)
    if recipe.bitmap:
        done("qemu-img", "bitmap", "--add", path, "changed")
    return _undated(path.read_bytes())


def _writes(recipe: Recipe, chance: random.Random, packed: list[int]) -> Iterator[str]:
    """Yield what qemu-io does: data, compressed data, zeros of both kinds, a discard."""
    size, half = recipe.cluster_bytes, (recipe.disk_clusters + 1) // 2
    for _ in range(3):
        start = 2 * chance.randrange(half) * size + 512 * chance.randrange(size // 512)
        yield f"write -P {chance.randrange(1, 255)} {start} {size - start % size}"
    for cluster in packed:
        yield f"write -c -P {chance.randrange(1, 255)} {cluster * size} {size}"
    zeroes = "write -z" if "compat=0.10" in recipe.options else "write -z -u"
    yield f"write -z {2 * chance.randrange(half) * size} {size}"
    yield f"{zeroes} {2 * chance.randrange(half) * size} {size}"
    yield f"discard {2 * chance.randrange(half) * size} {size}"


def _undated(content: bytes) -> bytes:
    header, image = Header.unpack(content[:512]), bytearray(content)
    place = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        date = place + _SNAPSHOT_DATE_OFFSET
        image[date : date + _SNAPSHOT_DATE_BYTES] = bytes(_SNAPSHOT_DATE_BYTES)
        id_bytes, name_bytes = (int.from_bytes(image[at : at + 2], "big") for at in (place + 12, place + 14))
        extra_bytes = int.from_bytes(image[place + 36 : place + 40], "big")
        place += layout.round_up(_SNAPSHOT_FIXED_BYTES + extra_bytes + id_bytes + name_bytes, 8)
    return bytes(image)


def _continued(content: bytes, chance: random.Random) -> Iterator[Sample]:
    """Yield what an image of QEMU's is after jqcow worked on it: live after few and many flushes, closed."""
    device = SimulatedDevice(content)
    image = jqcow.open_device(device, "r+", journal_size=JOURNAL_BYTES, new_salt=lambda: chance.randbytes(16))
    cluster_bytes = image.info().cluster_size
    for flushes in range(6):
        offset = chance.randrange(image.size // cluster_bytes - 2) * cluster_bytes
        image.pwrite(chance.randbytes(min(2 * cluster_bytes, 70_000)), offset)
        image.write_zeroes(cluster_bytes, chance.randrange(image.size // cluster_bytes) * cluster_bytes)
        image.flush()
        if flushes in (1, 5):
            table = image._engine.public.view.header.snapshots_offset
            yield _sample(device.content(), live=True, snapshots_offset=table)
    image.close()
    yield _sample(device.content(), live=False)
