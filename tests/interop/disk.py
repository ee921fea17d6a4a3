"""An image of a kind, and its model: the disk, the snapshots, and what bitmaps must and may call dirty."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jqcow
from tests.interop.kinds import DATA_FILE, KEY, SECTOR_BYTES
from tests.interop.pairwise import Row
from tests.support.qemu import dirty_by_qemu, done, done_in_spite_of_load

PATTERN_BYTES = 1 << 16
PASSPHRASE = b"correct horse"
COMPLAINTS = ("failed", "error", "invalid", "not ")


@dataclass
class Noted:
    """A bitmap: the numbers of the granules that it must, and those that it may call dirty."""

    granularity: int
    is_enabled: bool = True
    is_consistent: bool = True
    must: set[int] = field(default_factory=set)
    may: set[int] = field(default_factory=set)

    @property
    def takes_note(self) -> bool:
        return self.is_enabled and self.is_consistent

    def granules(self, start: int, end: int) -> set[int]:
        return set(range(start // self.granularity, -(-end // self.granularity)))

    def cut(self, size: int) -> None:
        """Forget what lies behind the end of the disk."""
        count = -(-size // self.granularity)
        self.must = {granule for granule in self.must if granule < count}
        self.may = {granule for granule in self.may if granule < count}


@dataclass
class Content:
    """What an image must hold."""

    disk: bytearray = field(default_factory=bytearray)
    snapshots: dict[str, bytes] = field(default_factory=dict)
    bitmaps: dict[str, Noted] = field(default_factory=dict)

    def copied(self) -> Content:
        bitmaps = {
            name: replace(noted, must=set(noted.must), may=set(noted.may))
            for name, noted in self.bitmaps.items()
        }
        return Content(bytearray(self.disk), dict(self.snapshots), bitmaps)


@dataclass
class Disk:
    """An image, and what it must hold."""

    row: Row
    path: Path
    folder: Path
    chance: random.Random
    model: Content = field(default_factory=Content)
    snapshots_made: int = 0
    own_clusters: set[int] = field(default_factory=set)
    has_packed: bool = False
    with_state: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cluster_bytes = int(self.row["cluster"])
        self.pattern = self.folder / "pattern"
        # Half noise, half zeros: every cluster shrinks, but not to nothing.
        self.noise = b"".join(self.chance.randbytes(160) + bytes(96) for _ in range(PATTERN_BYTES // 256))
        self.pattern.write_bytes(self.noise)
        secret = self.folder / "secret"
        secret.write_bytes(PASSPHRASE)
        self.is_encrypted = self.row["encryption"] != "none"
        self.secrets = ["--object", f"secret,id={KEY},file={secret}"] if self.is_encrypted else []

    @property
    def size(self) -> int:
        return len(self.model.disk)

    @property
    def has_room_for_snapshots(self) -> bool:
        """Whether the refcounts can count one more, of which every cluster may be a part."""
        bits = int(self.row["refcounts"])
        if self.row["data"] != "inside":
            return False
        if bits <= 4 and self.has_packed:
            return False
        return len(self.model.snapshots) + 2 <= min(6, (1 << bits) - 1)

    def opened(self, mode: jqcow.image.Mode = "r", snapshot: str | None = None) -> jqcow.Image:
        passphrase = PASSPHRASE if self.is_encrypted else None
        return jqcow.open(self.path, mode, snapshot=snapshot, allow_files=True, passphrase=passphrase)

    # Where changes go: a few places, so that they meet.

    def place(self, unit: int) -> tuple[int, int]:
        """Return (offset, length) in whole units, or to the end of the disk."""
        hot = self.chance.choice((0, self.size // 3, max(0, self.size - 6 * self.cluster_bytes)))
        offset = min(self.size - 1, hot + self.chance.randrange(5 * self.cluster_bytes)) // unit * unit
        length = unit * self.chance.choice((1, 1, 2, max(1, 3 * self.cluster_bytes // unit)))
        return offset, min(length, self.size - offset)

    def noise_of(self, length: int) -> bytes:
        return (self.noise * (length // PATTERN_BYTES + 1))[:length]

    def other_size(self, *steps: int) -> int:
        step = self.chance.choice(steps) * self.cluster_bytes + SECTOR_BYTES
        return max(8 * self.cluster_bytes, self.size + step)

    def next_name(self) -> str:
        self.snapshots_made += 1
        return f"snap{self.snapshots_made}"

    # What changes, in the model.

    def put(self, data: bytes, offset: int) -> None:
        """Note new content: a bitmap must have what became other bytes, and may have all clusters of it."""
        old, end = bytes(self.model.disk[offset : offset + len(data)]), offset + len(data)
        self.model.disk[offset:end] = data
        first = offset // self.cluster_bytes * self.cluster_bytes
        last = min(self.size, -(-end // self.cluster_bytes) * self.cluster_bytes)
        for noted in self._noting():
            noted.may |= noted.granules(first, last)
            for granule in noted.granules(offset, end) - noted.must if old != data else ():
                start, stop = granule * noted.granularity - offset, (granule + 1) * noted.granularity - offset
                if old[max(0, start) : stop] != data[max(0, start) : stop]:
                    noted.must.add(granule)

    def _noting(self) -> list[Noted]:
        return [noted for noted in self.model.bitmaps.values() if noted.takes_note]

    def note_clusters(self, length: int, offset: int) -> bool:
        """Note clusters that may have a host cluster of their own; return whether none of them had.

        QEMU compresses over no such cluster.
        """
        first, end = offset // self.cluster_bytes, -(-(offset + length) // self.cluster_bytes)
        touched = set(range(first, end))
        were_free = not touched & self.own_clusters
        self.own_clusters |= touched
        return were_free

    def resized(self, size: int, *, by_jqcow: bool = False) -> None:
        """Note another size; jqcow makes dirty what it adds."""
        old, self.model.disk = self.size, self.model.disk[:size].ljust(size, b"\0")
        for noted in self.model.bitmaps.values():
            noted.cut(size)
            if noted.takes_note and size > old:
                added = noted.granules(old, size)
                noted.may |= added
                noted.must |= added if by_jqcow else set()
            elif noted.takes_note and by_jqcow:
                # What is cut off within a cluster is cleared.
                noted.may |= noted.granules(size // self.cluster_bytes * self.cluster_bytes, size)

    def applied(self, name: str) -> None:
        """Note that a snapshot was applied: all is dirty."""
        self.model.disk = bytearray(self.model.snapshots[name])
        for noted in self.model.bitmaps.values():
            noted.cut(self.size)
        for noted in self._noting():
            noted.must = noted.granules(0, self.size)
            noted.may = set(noted.must)

    def forget(self, name: str) -> None:
        del self.model.snapshots[name]

    # What QEMU does.

    def for_qemu(self) -> list[str]:
        """Return how QEMU's programs are told of the image."""
        if not self.is_encrypted:
            return ["-f", "qcow2", str(self.path)]
        return [
            *self.secrets,
            "--image-opts",
            f"driver=qcow2,file.filename={self.path},encrypt.key-secret={KEY}",
        ]

    def by_qemu_io(self, *commands: str) -> None:
        options = [word for command in commands for word in ("-c", command)]
        output = done("qemu-io", *options, *self.for_qemu())
        assert not any(word in output.lower() for word in COMPLAINTS), output

    def qemu_changes(self, steps: int) -> None:
        """Change the disk by qemu-io, with the kinds of clusters that the row has.

        QEMU 7.2 packs the next compressed cluster behind the last one of the same process, even when that one
        has been freed and other data is there now. So a process that compresses here frees nothing.
        """
        if self.row["compression"] != "none":
            self.has_packed = True
            self.by_qemu_io(*(self._qemu_compresses() for _ in range(5)))
        self.by_qemu_io(*self.qemu_commands(steps))

    def qemu_commands(self, steps: int) -> Iterable[str]:
        kinds = ["write"] * 3
        kinds += ["write -z -u"] * 2 if self.row["zeroes"] != "none" else []
        kinds += ["write -z"] * 2 if self.row["zeroes"] == "kept" else []
        return [self._qemu_changes(self.chance.choice(kinds)) for _ in range(steps)]

    def _qemu_compresses(self) -> str:
        """Return a command that compresses what has no cluster yet, if it finds some."""
        offset = self.chance.randrange(self.size) // self.cluster_bytes * self.cluster_bytes
        length = min(self.chance.randrange(1, 4) * self.cluster_bytes, self.size - offset)
        if not self.note_clusters(length, offset):
            return "flush"
        self.put(self.noise_of(length), offset)
        return f"write -c -s {self.pattern} {offset} {length}"

    def _qemu_changes(self, kind: str) -> str:
        offset, length = self.place(self.chance.choice((SECTOR_BYTES, self.cluster_bytes)))
        self.note_clusters(length, offset)
        if kind == "write":
            self.put(self.noise_of(length), offset)
            return f"write -s {self.pattern} {offset} {length}"
        self.put(bytes(length), offset)
        return f"{kind} {offset} {length}"

    def qemu_snapshot(self, option: str = "-c", name: str = "") -> None:
        """Make a snapshot, apply or delete one; the command takes no format, and secrets in other places."""
        name = name or self.next_name()
        image = self.for_qemu() if self.is_encrypted else [str(self.path)]
        if self.row["state"] == "kept" and option == "-c":
            self._machine(f"savevm {name}")
            self.with_state.add(name)
        else:
            done("qemu-img", "snapshot", option, name, *image)
        if option == "-c":
            self.model.snapshots[name] = bytes(self.model.disk)
        elif option == "-d":
            self.forget(name)
        else:
            self.applied(name)

    def _machine(self, command: str) -> None:
        """Give a machine without devices, whose state is small, a command of its monitor."""
        machine = ("-machine", "none", "-m", "2M", "-nodefaults", "-display", "none", "-monitor", "stdio")
        drive = f"if=none,driver=qcow2,file.filename={self.path}"
        told = done("qemu-system-x86_64", *machine, "-drive", drive, typed=f"{command}\nquit\n")
        assert "Error" not in told, told

    def require_states(self) -> None:
        """A machine goes on from each snapshot that has its state; over bitmaps QEMU loads none."""
        if self.model.bitmaps:
            return
        for name, content in self.model.snapshots.items():
            if name in self.with_state and len(content) == self.size:
                self._machine(f"loadvm {name}")

    def qemu_resizes(self, *steps: int) -> None:
        size = self.other_size(*steps)
        done("qemu-img", "resize", "-q", "--shrink", *self.for_qemu(), size)
        self.resized(size)
        self._take_noise()

    def qemu_adds_bitmap(self, name: str, granularity: int, *, is_enabled: bool = True) -> None:
        word = "--enable" if is_enabled else "--disable"
        done("qemu-img", "bitmap", "--add", word, "-g", granularity, *self.for_qemu(), name)
        self.model.bitmaps[name] = Noted(granularity, is_enabled)

    def qemu_creates(self, options: str, below: list[str], size: int) -> None:
        """Create the image; encryption makes QEMU measure the time of its hash."""
        words = ["create", "-q", *self.secrets, "-f", "qcow2", "-o", options, *below, self.path, size]
        done_in_spite_of_load("qemu-img", *words)
        self.resized(size)
        self._take_noise()

    def _take_noise(self) -> None:
        """What was never written is decrypted all the same, in clusters that were preallocated.

        On a device QEMU preallocates clusters of whatever it holds.
        """
        is_mapped = self.row["preallocation"] != "off" or self.row["data"] == "raw file"
        holds_anything = self.row["place"] != "file" and self.row["data"] == "inside"
        if is_mapped and (self.is_encrypted or holds_anything):
            self.model.disk = bytearray(self.read_by_qemu())

    def read_by_qemu(self, *options: str) -> bytes:
        copy = self.folder / "copy.raw"
        done("qemu-img", "convert", "-O", "raw", *options, *self.for_qemu(), copy)
        return copy.read_bytes()

    # What both must find.

    def require_content(self, title: str, *, is_dirty: bool = False) -> None:
        """QEMU and jqcow read the disk, snapshots and bitmaps as they must be; QEMU's check is clean."""
        if not is_dirty:
            done("qemu-img", "check", "-q", *self.for_qemu())
        require_same(self.read_by_qemu(), self.model.disk, f"{title}: the disk, by QEMU")
        if self.row["data"] == "raw file" and not self.is_encrypted:
            raw = (self.folder / DATA_FILE).read_bytes()
            # Where it is preallocated QEMU makes it whole clusters.
            assert not any(raw[self.size :]), f"{title}: bytes behind the end of its raw file"
            require_same(raw[: self.size], self.model.disk, f"{title}: its raw file")
        with self.opened() as image:
            require_same(image.pread(image.size, 0), self.model.disk, f"{title}: the disk")
            report = image.check()
            assert is_dirty or report.ok, report
            assert [snapshot.name for snapshot in image.snapshots()] == list(self.model.snapshots)
            self._require_bitmaps(image, title)
        for name, content in self.model.snapshots.items():
            with self.opened(snapshot=name) as image:
                require_same(image.pread(image.size, 0), content, f"{title}: {name}")
            # QEMU shows every snapshot with the size that the disk has now.
            shown = min(len(content), self.size)
            by_qemu = self.read_by_qemu("-l", f"snapshot.name={name}")
            require_same(by_qemu[:shown], content[:shown], f"{title}: {name}, by QEMU")

    def _require_bitmaps(self, image: jqcow.Image, title: str) -> None:
        found = {bitmap.name: bitmap for bitmap in image.bitmaps}
        assert found.keys() == self.model.bitmaps.keys(), title
        for name, noted in self.model.bitmaps.items():
            bitmap = found[name]
            assert (bitmap.granularity, bitmap.is_consistent) == (noted.granularity, noted.is_consistent)
            if not noted.is_consistent:
                continue
            assert bitmap.is_enabled == noted.is_enabled
            told = [(part.offset, part.end) for part in image.bitmaps.dirty_extents(name)]
            assert told == dirty_by_qemu(self.folder, self.for_qemu(), name), f"{title}: bitmap {name}"
            dirty = set().union(*(noted.granules(start, end) for start, end in told))
            assert noted.must <= dirty, f"{title}: bitmap {name} lacks {sorted(noted.must - dirty)}"
            assert dirty <= noted.may, f"{title}: bitmap {name} has too much: {sorted(dirty - noted.may)}"


def require_same(found: bytes, expected: bytes | bytearray, title: str) -> None:
    """Two disks are the same; the complaint names the first byte that is not."""
    assert len(found) == len(expected), f"{title}: {len(found)} bytes, not {len(expected)}"
    if found != expected:
        at = next(
            index for index, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other
        )
        raise AssertionError(f"{title} differs from byte {at:#x} on")
