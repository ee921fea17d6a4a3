"""Mutants: jqcow with one rule taken away, and the trials of which one must then break a promise.

A mutant patches methods by their names (`tests.support.patches`); where a method is gone,
`tests/crash/test_mutants.py` fails. `tests.support.mutation` judges mutants; `tests.support.trials` knows the
kinds of trials.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from jqcow.ondisk.frame import ZeroOperation
from tests.support.patches import (
    Function,
    Number,
    Patch,
    after,
    before,
    holding,
    replacing,
    restoring,
    returning,
    setting,
    skipping,
    with_argument,
    with_result,
)
from tests.support.trials import DEEP, SCENARIO, SIMULATION


class Mutant:
    """A rule, what is done without it, the patches that do so, and the trials of which one must break."""

    def __init__(self, rule: str, what: str, *patches: Patch | Number, trials: tuple[str, ...]) -> None:
        self.rule = rule
        self.name = f"{rule}-{what}"
        self.patches = patches
        self.trials = trials


BARRIER_TRIALS: dict[str, tuple[str, ...]] = {
    "create.blank": ("fresh/4096/0",),
    "live.prepare": ("reopened/4096/0",),
    "live.autoclear": ("autoclear/4096/0",),
    "root.settle": ("root:root-write-fails/8192/0",),
    "flush.data": ("in-place/4096/0",),
    "flush.ordered": ("reuse/4096/0",),
    "flush.record": ("reopened/4096/0",),
    "checkpoint.homes": ("epochs/4096/0",),
    "move.range": ("move/4096/0",),
    "move.root": tuple(f"barrier-fails/4096/{seed}" for seed in (7, 3, 1)),
    "recover.settle": tuple(f"root:move-killed/8192/{seed}" for seed in range(4)),
    "recover.root": ("root:killed/8192/0",),
    "close.data": ("in-place/4096/0",),
    "close.clear": ("reopened/4096/0",),
    "close.release": ("reopened/4096/0",),
    "commit.base": ("dropping:commit",),
}

NATIVE = "jqcow._native"
MEDIUM = "jqcow.engine.medium:Medium"
JOURNAL = "jqcow.engine.journal:Journal"
METADATA = "jqcow.engine.metadata:Metadata"
SPACE = "jqcow.engine.space:Space"
REFCOUNTS = "jqcow.engine.refcounts:Refcounts"
MAPPING = "jqcow.engine.mapping:Mapping"
SNAPSHOTS = "jqcow.engine.snapshots:Snapshots"
STORE = "jqcow.engine.store:Store"
TURN = "jqcow.engine.turn:Turn"
DATAPATH = "jqcow.engine.datapath:DataPath"


def seeds(family: str, count: int) -> tuple[str, ...]:
    """Return the first workloads of a family."""
    return tuple(f"{family}/{seed}" for seed in range(count))


def without_barrier(name: str) -> Patch:
    """Leave out a barrier."""
    return skipping(f"{MEDIUM}.barrier", only=lambda medium, barrier, **_: barrier == name)


def write_home(metadata: Any, layer: Any) -> None:
    """Write staged blocks where only a checkpoint may."""
    for offset, block in layer.blocks.items():
        metadata.medium.pwrite(bytes(block), offset)


def keep_older_images(publish: Function, metadata: Any) -> None:
    """Publish a record, and keep the log images that were there before it."""
    older = dict(metadata.images)
    publish(metadata)
    metadata.images.update(older)


def free_what_was_taken(space: Any) -> None:
    """Give up at once what a transaction took."""
    for run in space._transaction or ():
        space.unknown.add(run.start, run.count)
    space._transaction = []


class NoTurn(nullcontext[None]):
    """A turn that anybody has at any time."""

    def _is_owned(self) -> bool:
        return False


def write_span_late(write_span: Function, datapath: Any, *arguments: Any) -> None:
    """Write a span, and its new data last, when the operation that maps it has ended."""
    datapath.medium.late = []
    try:
        write_span(datapath, *arguments)
    finally:
        late, datapath.medium.late = datapath.medium.late, None
    for write in late:
        write()


def put_off(pwrite: Function, medium: Any, data: Any, offset: int) -> None:
    """Write later."""
    medium.late.append(lambda: pwrite(medium, data, offset))


OF_MEDIUM = (
    Mutant(
        "M1",
        "healthy-after-a-failed-barrier",
        restoring(f"{MEDIUM}._sync", "self.poisoned"),
        trials=seeds("barrier-fails/4096", 2),
    ),
    Mutant(
        "M2",
        "high-water-forgotten",
        after(
            f"{MEDIUM}._raise_high_water", lambda _, medium, end: setattr(medium, "high_water", medium.size())
        ),
        trials=(DEEP + "move-fails-first/4096/0",),
    ),
    Mutant(
        "M3",
        "covered-by-any-barrier",
        with_argument("jqcow.engine.space:_covered", "number", lambda number: number + (1 << 40)),
        trials=("overlapping/4096/0",),
    ),
    Mutant(
        "M4",
        "barriers-overlap",
        setting(f"{MEDIUM}.__init__", "self._syncing", nullcontext),
        skipping(f"{MEDIUM}.require_healthy", during=f"{MEDIUM}._sync"),
        trials=(SCENARIO + "flush-beside-a-failed-barrier",),
    ),
    Mutant(
        "M5",
        "end-within-a-sector",
        Number("jqcow.engine.medium:SECTOR_BYTES", 1),
        trials=(
            SIMULATION + "512/qemu/0/65536 fua:24576:1 write:27136:651 cut:6:8192 flush write:27136:768",
        ),
    ),
)

OF_JOURNAL = (
    Mutant(
        "J1",
        "frames-side-by-side-in-a-block",
        Number("jqcow.ondisk.frame:FRAME_ALIGNMENT", 512),
        Number("jqcow.engine.journal:FRAME_ALIGNMENT", 512),
        trials=("epochs/8192/0",),
    ),
    Mutant(
        "J2",
        "failed-frame-accepted",
        replacing(f"{JOURNAL}.revoke", lambda _, journal, append: journal.accept(append)),
        trials=seeds("host-fails/4096", 3),
    ),
    Mutant(
        "J3",
        "sequence-with-gaps",
        with_argument(
            "jqcow.ondisk.frame:frame_payload",
            "sequence",
            lambda sequence: sequence + 1,
            during=f"{JOURNAL}.append",
        ),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "J4",
        "epoch-without-header",
        replacing(f"{STORE}._with_header", lambda _, store, layer: layer.operations()),
        trials=("epochs/4096/0",),
    ),
    Mutant(
        "J5",
        "payload-without-bound",
        with_argument(f"{JOURNAL}.has_room", "payload", lambda payload: replace(payload, decoded_length=0)),
        trials=("move/4096/0",),
    ),
    Mutant(
        "J6",
        "failed-frame-left",
        skipping(f"{MEDIUM}.pwrite", during=f"{JOURNAL}.revoke"),
        trials=("commit-fails-first/4096/0",),
    ),
    Mutant(
        "T8",
        "record-longer-than-a-half",
        returning("jqcow.ondisk.frame:EncodedPayload.frame_length", 0, during=f"{JOURNAL}.has_room"),
        trials=("epochs/4096/0",),
    ),
)

OF_METADATA = (
    Mutant(
        "D1",
        "staged-blocks-home",
        after(f"{METADATA}.cut", lambda layer, metadata: write_home(metadata, layer)),
        trials=("reopened/512/0",),
    ),
    Mutant(
        "D2",
        "older-images-kept",
        replacing(f"{METADATA}.publish", keep_older_images),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "D3",
        "failed-operation-kept",
        replacing(f"{METADATA}.roll_back", lambda _, metadata: metadata.finish()),
        trials=("host-fails/4096/0",),
    ),
    Mutant(
        "D4",
        "new-clusters-not-zeroed",
        with_result(
            "jqcow.engine.metadata:Layer.operations",
            lambda operations: [found for found in operations if not isinstance(found, ZeroOperation)],
        ),
        trials=seeds("unpunchable/8192", 2),
    ),
    Mutant(
        "D5",
        "transaction-seen-by-all",
        replacing(f"{METADATA}._top", lambda _, metadata: metadata._newest),
        trials=("transactions/4096/0",),
    ),
)

OF_SPACE = (
    Mutant(
        "S1",
        "freed-data-reused-at-once",
        replacing(f"{SPACE}.free_data", lambda _, space, start, count=1: space.unknown.add(start, count)),
        trials=("host-fails-dirty/4096/0", "transactions-dirty/4096/0"),
    ),
    Mutant(
        "S2",
        "freed-metadata-as-data",
        replacing(f"{SPACE}.free_metadata", lambda _, space, *run: space.free_data(*run)),
        trials=("reuse-tables/512/2", "reuse-tables/512/3"),
    ),
    Mutant(
        "S3",
        "unknown-as-zero-safe",
        with_result(f"{SPACE}.take", lambda run: replace(run, zero_safe=True)),
        trials=("unpunchable/4096/0",),
    ),
    Mutant(
        "S4",
        "frontier-before-the-journal",
        restoring(f"{SPACE}.reserve", "self.frontier"),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "S5",
        "failed-transaction-free-at-once",
        before(f"{SPACE}.abandon_transaction", free_what_was_taken),
        trials=("commit-fails-first/4096/0",),
    ),
)

OF_REFCOUNTS = (
    Mutant(
        "R1",
        "refcount-not-raised",
        skipping(f"{REFCOUNTS}._raise", during=f"{REFCOUNTS}.allocate"),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "R2",
        "any-cluster-is-free",
        replacing(
            f"{NATIVE}:refcount_find_zero",
            lambda _, data, order, position, limit: position,
            during=f"{REFCOUNTS}._search_free",
        ),
        returning(f"{NATIVE}:refcount_find_used", -1, during=f"{REFCOUNTS}._search_free"),
        returning(f"{NATIVE}:refcount_find_used", -1, during=f"{REFCOUNTS}._raise"),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "R3",
        "homes-of-old-not-allocated",
        skipping(f"{MEDIUM}.allocate", during=f"{REFCOUNTS}.allocate_homes"),
        trials=(SCENARIO + "checkpoint-on-full-disk",),
    ),
    Mutant(
        "R3",
        "homes-of-new-not-allocated",
        skipping(f"{MEDIUM}.allocate", during=f"{REFCOUNTS}._prepare_home"),
        trials=(SCENARIO + "checkpoint-on-full-disk",),
    ),
    Mutant(
        "R4",
        "packing-after-a-failed-operation",
        skipping(f"{REFCOUNTS}.stop_packing", during=f"{STORE}._settle_operation"),
        trials=(
            SIMULATION
            + "4096/empty/0/65536 write:0:1 flush fail:pwrite:1:EIO:0 packed:32768:1 packed:65536:1",
        ),
    ),
    Mutant(
        "R4",
        "packing-after-a-savepoint",
        skipping(f"{REFCOUNTS}.stop_packing", during=f"{STORE}.return_to"),
        trials=seeds("compressed-undone/4096", 4),
    ),
    Mutant(
        "R4",
        "packing-after-an-abandoned-transaction",
        skipping(f"{REFCOUNTS}.stop_packing", during=f"{STORE}.abandon_transaction"),
        trials=seeds("compressed-undone/4096", 4),
    ),
    Mutant(
        "R4",
        "packing-into-what-is-free",
        skipping(f"{REFCOUNTS}.stop_packing", during=f"{REFCOUNTS}.release"),
        trials=seeds("compressed/4096", 4),
    ),
)

OF_MAPPING_AND_SNAPSHOTS = (
    Mutant(
        "G1", "entries-unchecked", skipping(f"{MAPPING}._check_host"), trials=(SCENARIO + "unaligned-entry",)
    ),
    Mutant(
        "G2",
        "metadata-written-in-place",
        skipping(f"{REFCOUNTS}._check_holds_data"),
        trials=(SCENARIO + "entry-into-metadata",),
    ),
    Mutant(
        "G3",
        "shared-table-changed",
        returning(f"{REFCOUNTS}.get", 1, during=f"{MAPPING}._own_l2_table"),
        trials=("snapshots/4096/0",),
    ),
    Mutant(
        "N1",
        "data-not-counted",
        returning(f"{MAPPING}.references", (), during=f"{SNAPSHOTS}._share"),
        trials=("snapshots/4096/0",),
    ),
    Mutant(
        "N1",
        "tables-not-counted",
        skipping(
            f"{REFCOUNTS}.share",
            during=f"{SNAPSHOTS}._share",
            only=lambda refcounts, start, count: start in refcounts.metadata_clusters,
        ),
        trials=("snapshots/4096/0",),
    ),
    Mutant(
        "N1",
        "deleted-table-still-counted",
        skipping(f"{SNAPSHOTS}._release", during=f"{SNAPSHOTS}.delete"),
        trials=seeds("snapshots/4096", 2),
    ),
    Mutant(
        "N2",
        "flags-left-by-create",
        skipping(f"{SNAPSHOTS}.set_copied_flags", during=f"{SNAPSHOTS}.create"),
        trials=("snapshots/4096/0",),
    ),
    Mutant(
        "N2",
        "flags-left-by-delete",
        skipping(f"{SNAPSHOTS}.set_copied_flags", during=f"{SNAPSHOTS}.delete"),
        trials=seeds("snapshots/4096", 2),
    ),
)

OF_DATAPATH = (
    Mutant(
        "W1",
        "in-place-without-the-flag",
        with_argument(f"{DATAPATH}._may_overwrite", "copied", lambda _: True),
        trials=(SCENARIO + "two-owners",),
    ),
    Mutant(
        "W1",
        "in-place-where-shared",
        with_result(f"{REFCOUNTS}.data_refcount", lambda _: 1, during=f"{DATAPATH}._may_overwrite"),
        trials=(SCENARIO + "stale-copied-flag",),
    ),
    Mutant(
        "W1",
        "in-place-in-a-transaction",
        holding(f"{DATAPATH}._may_overwrite", "self.store.space.fresh", None),
        trials=("transactions/4096/0",),
    ),
    Mutant(
        "W2",
        "backing-file-taken-for-zeros",
        returning(f"{DATAPATH}._backing_reads_as_zeros", True, during=f"{DATAPATH}._was_zero"),
        trials=("overlay/4096/0", "overlay-reuse/4096/0", "copy-on-read/4096/0"),
    ),
    Mutant(
        "W2",
        "dirty-cluster-unordered",
        skipping(f"{METADATA}.require_order", during=f"{DATAPATH}._write_run"),
        trials=("reuse/4096/0",),
    ),
    Mutant(
        "W2",
        "compressed-data-unordered",
        skipping(f"{METADATA}.require_order", during=f"{DATAPATH}._write_packed"),
        trials=("compressed-new/4096/0",),
    ),
    Mutant(
        "W3",
        "old-bytes-not-copied",
        skipping(f"{DATAPATH}.read_into", during=f"{DATAPATH}._write_run"),
        trials=("snapshots-cow/4096/0",),
    ),
    Mutant(
        "W3",
        "dirty-cluster-written-in-part",
        before(f"{DATAPATH}._write_run", lambda datapath, *_: datapath.store.metadata.require_order()),
        with_argument(f"{DATAPATH}._write_run", "run", lambda run: replace(run, zero_safe=True)),
        trials=("unpunchable/4096/0",),
    ),
    Mutant(
        "W4",
        "data-after-its-entry",
        replacing(
            f"{MEDIUM}.pwrite",
            put_off,
            during=f"{DATAPATH}._write_run",
            only=lambda medium, *_: getattr(medium, "late", None) is not None,
        ),
        replacing(f"{DATAPATH}._write_span", write_span_late),
        trials=seeds("host-fails-dirty/4096", 4),
    ),
)

OF_STORE = (
    Mutant("T1", "record-before-ordered-data", without_barrier("flush.ordered"), trials=("reuse/4096/0",)),
    Mutant(
        "T1",
        "record-before-data-of-a-transaction",
        holding(f"{STORE}._cut", "commit.of_transaction", False),
        trials=("transactions-new/4096/0",),
    ),
    Mutant("T2", "flush-without-barrier", without_barrier("flush.record"), trials=("reopened/4096/0",)),
    Mutant(
        "T3",
        "home-before-its-record",
        after(f"{STORE}._cut", lambda _, store, commit: write_home(store.metadata, commit.layer)),
        trials=seeds("reopened/512", 2),
    ),
    Mutant("T4", "epoch-ends-in-the-log", skipping(f"{STORE}._write_homes"), trials=("reopened/4096/0",)),
    Mutant(
        "T5",
        "root-beside-its-copy",
        returning(f"{STORE}._root_copy_serves", True),
        trials=("root:half-moved/8192/0",),
    ),
    Mutant(
        "T6",
        "failed-root-left",
        skipping(f"{STORE}._write_root", during=f"{STORE}._give_up"),
        trials=seeds("going-live-fails/4096", 2),
    ),
    Mutant(
        "T7",
        "file-cut-too-short",
        with_result(f"{REFCOUNTS}.used_end", lambda end: end - 1, during=f"{STORE}._release_journal"),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "F1",
        "search-before-repair",
        after(
            f"{STORE}.prepare_to_repair", lambda _, store: store.refcounts.start_search(store.space.frontier)
        ),
        trials=("repair/4096/0", "repair/4096/1", "repair-snapshots/4096/0"),
    ),
    Mutant(
        "C1",
        "commits-side-by-side",
        setting(f"{TURN}.__init__", "self.taken", NoTurn),
        trials=(SCENARIO + "checkpoint-while-flushing",),
    ),
    Mutant(
        "C2",
        "flush-shares-an-older-commit",
        returning(f"{TURN}.changes", 0, during=f"{STORE}.flush"),
        trials=("reopened/4096/0",),
    ),
)

MUTANTS = (
    *OF_MEDIUM,
    *OF_JOURNAL,
    *OF_METADATA,
    *OF_SPACE,
    *OF_REFCOUNTS,
    *OF_MAPPING_AND_SNAPSHOTS,
    *OF_DATAPATH,
    *OF_STORE,
)


def mutant_named(name: str) -> Mutant:
    """Return the mutant of a name."""
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    return mutant
