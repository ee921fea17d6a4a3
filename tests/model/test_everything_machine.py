"""Everything at once: overlays, snapshots, compression, transactions, crashes, commit, rebase, repair.

The rules of `tests.model.test_image_machine` hold, and more join them. QEMU judges the end of some runs,
chosen by what the disk holds: its check, the disk, each snapshot; then it writes, and jqcow goes on.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

import jqcow
from jqcow import _native
from jqcow.disks.chain import Chain
from jqcow.image.opening import open_backing
from jqcow.image.transaction import Transaction
from jqcow.offline.commit import commit
from jqcow.offline.rebase import rebase
from jqcow.ondisk.header import INCOMPATIBLE_DIRTY
from jqcow.ondisk.naming import DiskFormat, NamedFile
from jqcow.testing import SECTOR_BYTES, SectorModel, SimulatedDevice
from tests.crash.mutants import mutant_named
from tests.model.test_image_machine import (
    CLUSTERS_MAX,
    JOURNAL_BYTES,
    Draft,
    ImageMachine,
    Step,
    counted_salts,
    fractions,
    part_of,
    range_of,
    seeds,
)
from tests.support import inside, mutation
from tests.support.inside import Shown
from tests.support.mutation import Verdict
from tests.support.operations import Disk, PackedWrite, Write, WriteZeroes, apply
from tests.support.patients import DIRTY_BYTE, Tables
from tests.support.qemu import check_clean, compare, done, qemu_io

SNAPSHOTS_MAX = 3

Below = tuple[float, DiskFormat]
below_strategy = st.tuples(
    st.floats(min_value=0.01, max_value=2), st.sampled_from(("raw", "qcow2", "overlay"))
)
Place = tuple[float, float]
Kept = dict[str, bytes]
"""What each snapshot holds, by its name, in the order of the table."""

PLAIN_KINDS = ("write", "zeroes", "discard", "resize", "savepoint", "return")
MORE_KINDS = ("compressed", "create", "apply", "delete")
endings = st.sampled_from(("commit", "rollback", "exception"))
full_steps = st.tuples(st.sampled_from(PLAIN_KINDS + MORE_KINDS), fractions, fractions, seeds)


class Runs:
    """How many runs QEMU judged, over all examples."""

    judged = 0


class EverythingMachine(ImageMachine):
    """An image over other files, with snapshots; ``kept`` says what these hold."""

    judge_one_in = 8

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="jqcow-model-"))
        self.path = self.folder / "image.qcow2"
        self.kept: Kept = {}
        self.snapshots_made = 0
        self.files_made = 0
        self.chain: Chain | None = None
        self.copy_on_read = False

    def teardown(self) -> None:
        """Judge the end by QEMU, in some runs; remove the files."""
        try:
            if hasattr(self, "image") and self.is_chosen():
                self.ask_qemu()
        finally:
            if hasattr(self, "image"):
                with suppress(jqcow.JqcowError, OSError):
                    self.image.close()
            shutil.rmtree(self.folder)

    @initialize(
        share=st.floats(min_value=0, max_value=1),
        can_punch=st.booleans(),
        refcount_bits=st.sampled_from((16, 16, 16, 1, 2, 4, 8, 64)),
        compression_type=st.sampled_from(("zlib", "zstd")),
        below=st.none() | below_strategy,
        seed=seeds,
    )
    def create(
        self, share: float, can_punch: bool, refcount_bits: int, compression_type: Any, below: Any, seed: int
    ) -> None:
        """Start with an image of any size, over a file or none."""
        self.new_salt = counted_salts()
        self.refcount_bits = refcount_bits
        self.below = below
        size = part_of(CLUSTERS_MAX * self.cluster_bytes, share)
        name, backing_format, content = self.make_below(below, seed)
        jqcow.create(
            self.path,
            size,
            cluster_size=self.cluster_bytes,
            refcount_bits=refcount_bits,
            compression_type=compression_type,
            backing_file=name,
            backing_format=backing_format,
            allow_files=True,
        ).close()
        self.take_file(can_punch)
        self.model = SectorModel(size, content[:size])
        self.flushed_size = size
        self.open()

    # Files below

    def make_below(self, below: Any, seed: int) -> tuple[str | None, DiskFormat | None, bytes]:
        """Make a file of a kind and size; return its name, format, and what its disk shows."""
        if below is None:
            return None, None, b""
        share, kind = below
        chance = random.Random(seed)
        self.files_made += 1
        name = f"below{self.files_made}"
        # A raw file may end within a sector: the rest of that reads as zeros.
        length = int(share * CLUSTERS_MAX * self.cluster_bytes)
        whole = -(-length // SECTOR_BYTES) * SECTOR_BYTES
        content = bytearray(whole)
        for _ in range(8):
            offset = chance.randrange(whole)
            part = chance.randbytes(min(chance.randrange(4 * self.cluster_bytes), whole - offset))
            content[offset : offset + len(part)] = part
        if kind == "raw":
            content[length:] = bytes(whole - length)
            (self.folder / name).write_bytes(content[:length])
            return name, "raw", bytes(content)
        (self.folder / f"{name}.raw").write_bytes(content)
        base = f"{name}.raw" if kind == "overlay" else None
        with jqcow.create(
            self.folder / name,
            whole,
            cluster_size=chance.choice((512, 4096, 65536)),
            backing_file=base,
            backing_format="raw" if base else None,
            allow_files=True,
        ) as image:
            if base is None:
                image.pwrite(content, 0)
            offset = chance.randrange(whole)
            length = min(chance.randrange(3 * self.cluster_bytes), whole - offset)
            image.pwrite(b"\x55" * length, offset)
            content[offset : offset + length] = b"\x55" * length
        return name, "qcow2", bytes(content)

    def find_below(self, named: NamedFile) -> Chain:
        """Open what the image names."""
        known: DiskFormat = "raw" if named.format == "raw" else "qcow2"
        self.chain = open_backing(self.path, named.name, known, allow_files=True)
        return self.chain

    # Sessions

    def open(self) -> None:
        """Open for writing."""
        self.device.reopen()
        self.image = jqcow.open_device(
            self.device,
            "r+",
            journal_size=JOURNAL_BYTES,
            new_salt=self.new_salt,
            backing=self.find_below,
        )
        if self.copy_on_read and self.image.backing_file is not None:
            inside.copy_on_read(self.image)

    def come_back(self) -> None:
        """Recover; the files below are closed with the process that had them."""
        if self.chain is not None:
            self.chain.close()
        super().come_back()

    def take_file(self, can_punch: bool | None = None) -> None:
        """Take what the file holds as the device's content, all of it durable."""
        punch = self.device.can_punch if can_punch is None else can_punch
        self.device = SimulatedDevice(self.path.read_bytes(), can_punch=punch)
        self.device.drop_barriers.update(self.dropped_barriers)

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """Close the image and lend its file; what is there afterwards is opened again."""
        self.image.close()
        self.promise_everything()
        self.path.write_bytes(self.device.content())
        yield self.path
        self.take_file()
        self.open()

    @rule(copy_on_read=st.booleans())
    def reopen(self, copy_on_read: bool) -> None:
        """Close cleanly and open again, as it was or such that reading copies."""
        self.image.close()
        self.promise_everything()
        self.look_at_snapshots()
        self.copy_on_read = copy_on_read
        self.open()
        assert self.image.recovered is None

    def look_at_snapshots(self) -> None:
        """Open each snapshot of the closed image for reading."""
        for name, content in self.kept.items():
            self.device.reopen(read_only=True)
            with jqcow.open_device(self.device, snapshot=name, backing=self.find_below) as shown:
                assert shown.pread(shown.size, 0) == content

    # Requests

    @rule(start=fractions, length=fractions, seed=seeds)
    def pwrite_compressed(self, start: float, length: float, seed: int) -> None:
        """Write whole clusters compressed."""
        request = random_packed(self.image, start, length, seed, self.cluster_bytes)
        apply(request, self.image, self.model)

    @precondition(lambda self: len(self.kept) < SNAPSHOTS_MAX)
    @rule()
    def create_snapshot(self) -> None:
        """Make a snapshot, or find that the refcounts have no room."""
        self.change_snapshots("create", 0)

    @precondition(lambda self: self.kept)
    @rule(kind=st.sampled_from(("apply", "delete")), seed=seeds)
    def use_snapshot(self, kind: str, seed: int) -> None:
        """Go back to a snapshot, or give it up."""
        self.change_snapshots(kind, seed)

    def change_snapshots(self, kind: str, seed: int) -> None:
        self.snapshots_made += 1
        changed = snapshots_on(
            self.image, self.model, self.kept, kind, seed, self.snapshots_made, self.refcount_bits
        )
        if changed:
            self.promise_everything()

    @rule(script=st.lists(full_steps, max_size=8), ending=endings)
    def transaction(self, script: list[Step], ending: Literal["commit", "rollback", "exception"]) -> None:
        """All of it is there, and durable, or nothing is; meanwhile nobody else sees it."""
        self.run_transaction(script, ending)

    def new_draft(self, transaction: Transaction) -> Draft:
        """Return what follows a transaction, and its snapshots."""
        return FullDraft(transaction, self.model.copy(), dict(self.kept), self)

    def adopt(self, draft: Draft) -> None:
        """The transaction is committed: what it holds is there."""
        super().adopt(draft)
        assert isinstance(draft, FullDraft)
        self.kept = draft.kept

    # Between sessions

    @precondition(lambda self: not self.kept)
    @rule(below=st.none() | below_strategy, seed=seeds)
    def rebase(self, below: Any, seed: int) -> None:
        """Give the image another file below, or none: it reads the same."""
        with self.as_file() as path:
            name, backing_format, _ = self.make_below(below, seed)
            rebase(path, name, backing_format, allow_files=True)

    @precondition(lambda self: not self.kept and self.image.backing_file is not None)
    @rule(keep=st.booleans())
    def commit(self, keep: bool) -> None:
        """Write what the image has into the file below: both read the same then."""
        named = self.image.backing_file
        assert named is not None
        with self.as_file() as path:
            commit(path, allow_files=True, keep=keep)
            content = self.model.current_content()
            raw = self.folder / "committed.raw"
            done("qemu-img", "convert", "-f", str(named.format), "-O", "raw", self.folder / named.name, raw)
            assert raw.read_bytes()[: len(content)] == content

    @precondition(lambda self: self.refcount_bits == 16)
    @rule(seed=seeds, is_marked=st.booleans())
    def damage_and_repair(self, seed: int, is_marked: bool) -> None:
        """Spoil refcounts of the closed image; opening makes them right, and no byte reads otherwise."""
        self.image.close()
        self.promise_everything()
        tables = Tables(self.device.content())
        tables.spoil_refcounts(random.Random(seed), 0.3, (0, 0, 1, 2, 5))
        if is_marked:
            tables.image[DIRTY_BYTE] |= INCOMPATIBLE_DIRTY
        self.device = SimulatedDevice(bytes(tables.image), can_punch=self.device.can_punch)
        if not is_marked:
            with jqcow.open_device(
                self.device, "r+", repair="all", new_salt=self.new_salt, backing=self.find_below
            ):
                pass
        self.open()

    def is_chosen(self) -> bool:
        """Whether QEMU is asked: of as many disks as time allows, the same ones in each run of an example."""
        return zlib.crc32(self.model.current_content()) % self.judge_one_in == 0

    @precondition(is_chosen)
    @rule()
    def ask_qemu(self) -> None:
        """QEMU finds nothing wrong and reads the same everywhere; then it writes, and jqcow reads that."""
        Runs.judged += 1
        with self.as_file() as path:
            check_clean(path)
            raw, size = self.folder / "model.raw", self.model.size_bytes
            raw.write_bytes(self.model.current_content())
            compare(path, raw)
            for name, content in self.kept.items():
                shown = self.folder / "shown.raw"
                options = ("-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={name}")
                done("qemu-img", "convert", *options, path, shown)
                # QEMU shows every snapshot with the size that the disk has now.
                length = min(len(content), size)
                assert shown.read_bytes()[:length] == content[:length], f"QEMU reads {name} otherwise"
            if size:
                offset = size // 2 // SECTOR_BYTES * SECTOR_BYTES
                length = min(3 * SECTOR_BYTES, size - offset)
                by_qemu = Write.pattern(offset, length, 77), WriteZeroes(max(0, offset - 512), 512)
                qemu_io(path, *(request.qemu() for request in by_qemu))
                for request in by_qemu:
                    self.model.write(*request.result(self.cluster_bytes, size), durable=True).complete()

    # Judgement

    @invariant()
    def snapshots_hold_what_they_held(self) -> None:
        """The snapshots are there, in their order, each with every byte."""
        require_snapshots(self.image, self.kept)


class FullDraft(Draft):
    """An open transaction with snapshots."""

    def __init__(
        self, transaction: Transaction, model: SectorModel, kept: Kept, machine: EverythingMachine
    ) -> None:
        super().__init__(transaction, model, machine.cluster_bytes)
        self.kept = kept
        self.machine = machine
        self.kept_at: list[Kept] = []

    def take(self, step: Step) -> None:
        """Do one thing inside; what is read is right afterwards."""
        kind, start, length, seed = step
        match kind:
            case "compressed":
                self.apply(random_packed(self.transaction, start, length, seed, self.cluster_bytes))
            case "create" | "apply" | "delete":
                if (len(self.kept) < SNAPSHOTS_MAX) if kind == "create" else self.kept:
                    self.machine.snapshots_made += 1
                    snapshots_on(
                        self.transaction,
                        self.model,
                        self.kept,
                        kind,
                        seed,
                        self.machine.snapshots_made,
                        self.machine.refcount_bits,
                    )
            case "savepoint":
                self.kept_at.append(dict(self.kept))
            case "return" if self.savepoints:
                number = seed % len(self.savepoints)
                self.kept = dict(self.kept_at[number])
                del self.kept_at[number + 1 :]
        if kind in MORE_KINDS:
            step = ("write", 0.0, 0.0, 0)
        super().take(step)
        require_snapshots(self.transaction, self.kept)


def random_packed(disk: Disk, start: float, length: float, seed: int, cluster_bytes: int) -> PackedWrite:
    """Return a compressed write of whole clusters, or up to the disk's end; a third does not shrink."""
    offset, length_bytes = range_of(disk.size, start, length)
    offset -= offset % cluster_bytes
    length_bytes = min(-(-length_bytes // cluster_bytes) * cluster_bytes, disk.size - offset)
    chance = random.Random(seed)
    parts = []
    for part in range(0, length_bytes, cluster_bytes):
        noise = chance.choice((cluster_bytes, cluster_bytes // 4, cluster_bytes // 2))
        size = min(cluster_bytes, length_bytes - part)
        parts.append(chance.randbytes(min(noise, size)).ljust(size, b"\x11"))
    return PackedWrite(offset, b"".join(parts))


def snapshots_on(
    disk: Disk,
    model: SectorModel,
    kept: Kept,
    kind: str,
    seed: int,
    number: int,
    refcount_bits: int,
) -> bool:
    """Make, apply or delete a snapshot; return False where the refcounts could not count it."""
    name = f"s{number}" if kind == "create" else list(kept)[seed % len(kept)]
    try:
        if kind == "create":
            disk.create_snapshot(name)
        elif kind == "apply":
            disk.apply_snapshot(name)
        else:
            disk.delete_snapshot(name)
    except jqcow.UnsupportedFeatureError as error:
        # Streams of some bytes share a host cluster: a few snapshots of it are more than 8 bits can count.
        assert refcount_bits <= 8 and "a refcount above" in str(error), error
        return False
    if kind == "create":
        kept[name] = model.current_content()
    elif kind == "apply":
        model.reset_to(kept[name])
    else:
        del kept[name]
    return True


def require_snapshots(holder: jqcow.Image | Transaction, kept: Kept) -> None:
    there = holder.snapshots()
    assert [snapshot.name for snapshot in there] == list(kept)
    for snapshot in there:
        shown = Shown(holder, snapshot)
        assert shown.pread(shown.size, 0) == kept[snapshot.name], f"{snapshot.name} has changed"


def run_machine(cluster_bytes: int, given: settings) -> None:
    machine = type("SizedMachine", (EverythingMachine,), {"cluster_bytes": cluster_bytes})
    run_state_machine_as_test(machine, settings=given)


SETTINGS = settings(
    max_examples=10 if _native.active() == "c" else 5,
    deadline=None,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
CLUSTERS = (512, 1024, 4096, 8192)
WITH_TEETH = ("G3-shared-table-changed", "N1-data-not-counted", "N2-flags-left-by-create")


@pytest.mark.parametrize("cluster_bytes", CLUSTERS)
def test_everything_is_its_model(cluster_bytes: int) -> None:
    before = Runs.judged
    run_machine(cluster_bytes, SETTINGS)
    assert Runs.judged > before, "QEMU judged no run"


@pytest.mark.parametrize("name", WITH_TEETH)
def test_machine_notices_a_rule_that_is_broken(name: str) -> None:
    """The model has teeth: where the engine lacks a rule, some example fails."""
    verdict, text = mutation.run_alone(judge_by_examples, name, seconds_max=600)
    assert verdict is Verdict.RED, text


def judge_by_examples(name: str) -> tuple[Verdict, str]:
    """Run the examples on a mutant; return the verdict."""
    given = settings(SETTINGS, max_examples=400, phases=[Phase.generate], database=None, derandomize=True)
    return mutation.judge(mutant_named(name), [lambda: run_machine(CLUSTERS[1], given)])


def main() -> int:
    """Run many examples: their number is the argument, 1000 for each size of clusters if there is none."""
    given = settings(SETTINGS, max_examples=int((*sys.argv, "1000")[1]))
    for cluster_bytes in CLUSTERS:
        try:
            run_machine(cluster_bytes, given)
        except Exception as failure:
            print(f"clusters of {cluster_bytes} bytes: {mutation.text_of(failure)}")
            return 1
        print(f"clusters of {cluster_bytes} bytes: {given.max_examples} examples, none fails", flush=True)
    print(f"QEMU judged {Runs.judged}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
