"""Mutants: jqcow with one rule taken away, and the trials of which one must then break a promise.

A mutant patches methods by their names (`tests.support.patches`); where a method is gone,
`tests/crash/test_mutants.py` fails. `tests.support.mutation` judges mutants; `tests.crash.trials` knows the
kinds of trials. Mutants that need several threads, or a call that is cut off, are in
`tests.crash.mutants_of_threads`.

    python -m tests.crash.mutants RULE-WHAT [TRIAL...]

judges one. It says what broke.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from jqcow.engine.clusters import Run
from jqcow.engine.datafile import DataFile
from jqcow.engine.journal import Contents
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import ChangeSet, Undone
from jqcow.engine.preallocating import Preallocating
from jqcow.engine.resizing import Resizing
from jqcow.engine.space import Space
from jqcow.engine.transaction import PrivateChanges
from jqcow.engine.write import WritePlan, Writes
from jqcow.ondisk import frame as frames
from jqcow.ondisk.frame import ZeroOperation
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.root import JournalRange
from tests.crash.mutants_of_devices import MUTANTS_OF_DEVICES
from tests.crash.mutants_of_protection import MUTANTS_OF_PROTECTION
from tests.crash.mutants_of_salvage import MUTANTS_OF_SALVAGE
from tests.crash.mutants_of_small_writes import MUTANTS_OF_SMALL_WRITES
from tests.crash.mutants_of_threads import MUTANTS_OF_THREADS
from tests.crash.trials import SCENARIO, SIMULATION, action_of, judge_trial
from tests.support.mutant import (
    ALLOCATION,
    AMENDING,
    BITMAPS,
    BLOCKS,
    CHANGES,
    CLOSING,
    COMMITS,
    DATA_FILE,
    ENCRYPTED_DATA,
    FRAME,
    GUARD,
    JOURNAL,
    JOURNAL_MODULE,
    KEY_SLOTS,
    LEAVE_TO_ONE,
    LIFECYCLE,
    LOG,
    LOG_MODULE,
    MAPPING,
    MAPPING_EDITOR,
    MEDIUM,
    NATIVE,
    OPERATION,
    PACKED,
    PLACES,
    PLANNING,
    PREALLOCATING,
    PRIVATE,
    PRIVATE_MARKS,
    READS,
    RECOUNTING,
    REFCOUNTS,
    REFCOUNTS_MODULE,
    REGION,
    RESIZING,
    ROOT,
    SNAPSHOTS,
    SPACE,
    TABLES,
    TRACKING,
    TRACKING_MODULE,
    UNDO_HEADER,
    UNDO_MODULE,
    VACATED,
    WRITES,
    Mutant,
    seeds,
    without_barrier,
)
from tests.support.mutation import Verdict, judge, text_of
from tests.support.patches import (
    Function,
    Number,
    after,
    before,
    holding,
    replacing,
    restoring,
    returning,
    skipping,
    with_argument,
    with_result,
)

BARRIER_TRIALS: dict[str, tuple[str, ...]] = {
    "live.prepare": ("reopened/4096/0",),
    "live.root": ("autoclear/4096/0",),
    "root.settle": ("root:root-write-fails/8192/0",),
    "flush.data": ("in-place/4096/0",),
    "flush.ordered": ("deep:reuse/4096/0",),
    "flush.record": ("reopened/4096/0",),
    "checkpoint.homes": ("deep:epochs/4096/0",),
    "move.range": ("deep:move/4096/0",),
    "move.root": tuple(f"deep:barrier-fails-shown/4096/{seed}" for seed in (0, 7)),
    "open.data": ("data-file-killed-in-place/1024/0",),
    "data.first": ("data-file-in-place/1024/0",),
    "open.settle": tuple(f"root:move-killed/8192/{seed}" for seed in range(4)),
    "recover.root": ("root:killed/8192/0",),
    "finish.epoch": ("dropping:stale-root-copy",),
    "finish.cut": ("dropping:unfinished-close",),
    "close.data": ("in-place/4096/0",),
    "close.epoch": ("dropping:stale-root-copy",),
    "close.clear": ("reopened/4096/0",),
    "close.release": ("reopened/4096/0",),
    "commit.base": ("dropping:commit",),
    "copy.target": ("dropping:written-into",),
    "resize.raw": ("dropping:written-into",),
    "slots.material": ("dropping:key-slots",),
    "slots.wiped": ("dropping:key-slots",),
    "anew.begin": ("dropping:written-anew",),
    "anew.content": ("dropping:written-anew",),
    "anew.end": ("dropping:written-anew",),
    "salvage.target": ("dropping:salvage",),
    "salvage.report": ("dropping:salvage",),
    "in-place.tables": ("dropping:in-place",),
    "in-place.header": ("dropping:in-place",),
    "undo.settle": ("dropping:repair-done",),
    "undo.done": ("dropping:repair-done",),
    "undo.begin": ("dropping:undo",),
    "undo.root": ("dropping:half-taken-back",),
    "undo.image": ("dropping:half-taken-back",),
    "undo.header": ("dropping:undo",),
    "undo.end": ("dropping:undo",),
}


def unordered(_: None, preallocating: Preallocating, plan: object) -> None:
    """Let the record land before what it names and does not hold."""
    preallocating.tables.changes.ordered = False


def take_old_space(original: Function, space: Space, count: int) -> Run:
    """Take free clusters with old bytes in them, if there are so many in a row."""
    run = next((run for run in space.unknown if run.count >= count), None)
    if run is None:
        taken: Run = original(space, count)
        return taken
    space.unknown.discard(run.start, count)
    space._lent.add(run.start, count)
    return Run(run.start, count, zero_safe=True)


def write_home(medium: Medium, changes: ChangeSet | None) -> None:
    """Write staged blocks where only a checkpoint may."""
    if changes is not None:
        for offset, block in changes.blocks.items():
            medium.pwrite(bytes(block), offset)


def keep_older_images(publish: Function, blocks: Any, durable: ChangeSet) -> None:
    """Publish a record, and keep the log images that were there before it."""
    older = dict(blocks.images)
    publish(blocks, durable)
    blocks.images.update(older)


def whole_other_half(_: Function, extent: JournalRange, contents: Contents) -> list[tuple[int, int]]:
    """Give up the epoch before, whatever is known of this one."""
    return [(extent.half_offset(contents.epoch + 1), extent.half_bytes)]


def whole_range(_: Function, extent: JournalRange, contents: Contents) -> list[tuple[int, int]]:
    """Give up the live frames, too."""
    return [(extent.offset, extent.length)]


def show_to_all(_: None, private: Any, *__: object) -> None:
    """Have the changes of a transaction staged in the public tables."""
    private.log.public.staged.changes = private.tables.changes


def forget_data(_: None, recounting: Any) -> None:
    """Take the data of a transaction for durable."""
    recounting._view.changes.ordered = False


def free_data_at_once(_: None, refcounts: Any, *__: object) -> None:
    """Hand out what a staged change freed."""
    freed = refcounts.view.changes.freed_data
    refcounts.space.undo(Undone(list(freed), list(freed)))
    freed.clear()


def free_retired_at_once(_: Function, space: Any, runs: Iterable[Run]) -> None:
    """Hand out what a failed transaction took."""
    space.undo(Undone(list(runs), []))


def count_as_data(_: None, refcounts: Any, run: Run) -> None:
    """Have freed metadata come back as data does."""
    changes = refcounts.view.changes
    changes.freed_data.append(changes.freed_metadata.pop())


def write_late(perform: Function, writes: Any, *arguments: Any) -> None:
    """Write a part, and its new data last, when the operation that maps it has ended."""
    writes.medium.late = []
    try:
        perform(writes, *arguments)
    finally:
        late, writes.medium.late = writes.medium.late, None
    for write in late:
        write()


def put_off(pwrite: Function, medium: Any, data: Any, offset: int) -> None:
    """Write later."""
    medium.late.append(lambda: pwrite(medium, data, offset))


OF_MEDIUM = (
    Mutant(
        "M1-healthy-after-a-failed-barrier",
        restoring(f"{MEDIUM}.barrier", "self.poisoned"),
        trials=seeds("barrier-fails/4096", 2),
    ),
    Mutant(
        "M7-lost-and-still-shown", skipping(f"{MEDIUM}.forget_cached"), trials=seeds("barrier-fails/4096", 4)
    ),
    Mutant(
        "M5-end-within-a-sector",
        skipping(f"{PLANNING}._fill_last_sector"),
        trials=(
            SIMULATION + "512/qemu/0/65536 fua:24576:1 write:27136:651 cut:6:8192 flush write:27136:768",
        ),
    ),
)

OF_JOURNAL = (
    Mutant(
        "J1-frames-side-by-side-in-a-block",
        Number(f"{FRAME}:FRAME_ALIGNMENT", 512),
        trials=("deep:epochs/8192/0",),
    ),
    Mutant(
        "J2-failed-frame-accepted",
        replacing(f"{JOURNAL}.revoke", lambda _, journal: journal._pending and journal.accept()),
        trials=seeds("deep:host-fails/4096", 3),
    ),
    Mutant(
        "J3-sequence-with-gaps",
        with_argument(
            f"{FRAME}:frame_payload", "sequence", lambda sequence: sequence + 1, during=f"{JOURNAL}.append"
        ),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "J4-epoch-without-header",
        replacing(
            f"{LOG}._encode", lambda _, log, changes, *more: frames.encode_operations(changes.operations())
        ),
        trials=("epochs/4096/0",),
    ),
    Mutant(
        "J5-payload-without-bound",
        with_argument(f"{JOURNAL}.has_room", "payload", lambda payload: replace(payload, decoded_length=0)),
        returning(f"{CHANGES}.least_bytes", 0),
        trials=("move/4096/0",),
    ),
    Mutant(
        "J6-failed-frame-left",
        skipping(f"{MEDIUM}.pwrite", during=f"{JOURNAL}.revoke"),
        trials=("commit-fails-first/4096/0",),
    ),
    Mutant(
        "J7-epoch-before-given-up",
        replacing(f"{LOG_MODULE}:dead_parts", whole_other_half),
        trials=(SCENARIO + "lost-frame-on-full-disk",),
    ),
    Mutant(
        "J7-newest-frame-given-up",
        replacing(f"{LOG_MODULE}:dead_parts", whole_range),
        trials=seeds("full-at-opening/4096", 2),
    ),
    Mutant(
        "J7-space-for-closing-given-up",
        Number(f"{JOURNAL_MODULE}:HEADER_FRAME_BYTES", 0),
        trials=(SCENARIO + "recovery-on-full-disk",),
    ),
    Mutant(
        "M7-moved-at-any-price",
        returning(f"{MEDIUM}.can_forget", False),
        trials=(SCENARIO + "recovery-on-full-disk",),
    ),
    Mutant(
        "T8-record-longer-than-a-half",
        returning(f"{FRAME}:EncodedPayload.frame_length", 0, during=f"{JOURNAL}.has_room"),
        trials=("epochs/4096/0",),
    ),
)

OF_CHANGES = (
    Mutant(
        "D1-staged-blocks-home",
        after(
            f"{OPERATION}.__exit__",
            lambda _, operation, *__: write_home(operation._section._medium, operation._tables.changes),
        ),
        trials=("reopened/512/0",),
    ),
    Mutant(
        "D2-older-images-kept", replacing(f"{BLOCKS}.publish", keep_older_images), trials=("reopened/4096/0",)
    ),
    Mutant(
        "D3-failed-operation-kept",
        skipping(f"{TABLES}.undo", during=f"{OPERATION}.__exit__"),
        trials=("host-fails/512/1",),
    ),
    Mutant(
        "D4-new-clusters-not-zeroed",
        with_result(
            f"{CHANGES}.operations",
            lambda operations: [found for found in operations if not isinstance(found, ZeroOperation)],
        ),
        trials=seeds("unpunchable/8192", 2),
    ),
    Mutant(
        "D5-transaction-seen-by-all",
        after(f"{PRIVATE}.__init__", show_to_all),
        trials=("transactions/4096/0",),
    ),
)

OF_SPACE = (
    Mutant(
        "S1-freed-data-reused-at-once",
        after(f"{ALLOCATION}.release", free_data_at_once),
        trials=("host-fails-dirty/4096/0", "transactions-dirty/4096/0"),
    ),
    Mutant(
        "S2-freed-metadata-as-data",
        after(f"{ALLOCATION}.free_as_metadata", count_as_data),
        trials=("reuse-tables/4096/0",),
    ),
    Mutant(
        "S3-unknown-as-zero-safe",
        with_result(f"{SPACE}.take", lambda run: replace(run, zero_safe=True)),
        trials=("unpunchable/4096/0",),
    ),
    Mutant(
        "S4-frontier-before-the-journal",
        restoring(f"{SPACE}.reserve", "self.frontier"),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "S5-failed-transaction-free-at-once",
        replacing(f"{SPACE}.retire", free_retired_at_once, during=f"{PRIVATE}._forget"),
        trials=("deep:commit-fails-first/4096/0",),
    ),
)

OF_REFCOUNTS = (
    Mutant(
        "R1-refcount-not-raised",
        skipping(f"{ALLOCATION}.raise_to_one", during=f"{ALLOCATION}.count_in"),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "R2-any-cluster-is-free",
        replacing(f"{ALLOCATION}._free_runs", lambda _, refcounts, start, stop: [(start, stop)]),
        returning(f"{NATIVE}:refcount_find_used", -1, during=f"{ALLOCATION}.raise_to_one"),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "R3-homes-of-old-not-allocated",
        skipping(f"{MEDIUM}.allocate", during=f"{ALLOCATION}.allocate_homes"),
        trials=(SCENARIO + "checkpoint-on-full-disk",),
    ),
    Mutant(
        "R3-homes-of-new-not-allocated",
        skipping(f"{MEDIUM}.allocate", during=f"{ALLOCATION}._take_home"),
        trials=(SCENARIO + "checkpoint-on-full-disk",),
    ),
    Mutant(
        "R4-packing-after-a-failed-operation",
        restoring(f"{CHANGES}.return_to", "self.packed_end", during=f"{OPERATION}.__exit__"),
        trials=(
            SIMULATION
            + "4096/empty/0/65536 write:0:1 flush fail:allocate:1:EIO:0 packed:32768:1 packed:65536:1",
        ),
    ),
    Mutant(
        "R4-packing-after-a-savepoint",
        restoring(f"{CHANGES}.return_to", "self.packed_end", during=f"{PRIVATE}.return_to"),
        trials=seeds("compressed-undone/4096", 4),
    ),
    Mutant(
        "R4-packing-into-what-a-transaction-frees",
        restoring(f"{PRIVATE}.__init__", "lifecycle.public.changes.packed_end"),
        trials=(
            SIMULATION + "4096/empty/0/65536 write:0:1 packed:4096:1 flush"
            " begin discard:4096:4096 commit packed:8192:1 flush",
        ),
    ),
    Mutant(
        "R4-packing-into-what-is-free",
        skipping(f"{REFCOUNTS_MODULE}:_stop_packing_in"),
        trials=seeds("compressed/4096", 4),
    ),
)

OF_MAPPING_AND_SNAPSHOTS = (
    Mutant(
        "G1-entries-unchecked", skipping(f"{MAPPING}._check_host"), trials=(SCENARIO + "unaligned-entry",)
    ),
    Mutant(
        "G2-metadata-written-in-place",
        skipping(f"{REFCOUNTS}.check_holds_data"),
        trials=(SCENARIO + "entry-into-metadata",),
    ),
    Mutant(
        "G3-shared-table-changed",
        returning(f"{MAPPING_EDITOR}._has_one_owner", True),
        trials=("snapshots/4096/0",),
    ),
    Mutant(
        "H1-tables-not-durable",
        after(f"{PREALLOCATING}._stage", unordered),
        trials=seeds("preallocated/512", 3),
    ),
    Mutant(
        "H1-refcounts-not-written",
        returning(f"{PREALLOCATING}._refcount_blocks", ()),
        trials=seeds("preallocated/512", 3),
    ),
    Mutant(
        "H1-old-blocks-kept",
        skipping(f"{BLOCKS}.forget", during=f"{PREALLOCATING}._stage"),
        trials=(SCENARIO + "growth-behind-a-snapshot-table",),
    ),
    Mutant(
        "H2-old-space",
        replacing(f"{SPACE}.take_at_frontier", take_old_space, during=f"{PREALLOCATING}._plan"),
        trials=seeds("preallocated-old-space/4096", 4),
    ),
    Mutant(
        "N1-data-not-counted",
        skipping(
            f"{ALLOCATION}.share",
            during=f"{SNAPSHOTS}._share",
            only=lambda refcounts, start, count: start not in refcounts.space.metadata,
        ),
        trials=("snapshots/4096/0",),
    ),
    Mutant(
        "N1-tables-not-counted",
        skipping(
            f"{ALLOCATION}.share",
            during=f"{SNAPSHOTS}._share",
            only=lambda refcounts, start, count: start in refcounts.space.metadata,
        ),
        trials=("snapshots/4096/0",),
    ),
    Mutant(
        "N1-deleted-table-still-counted",
        skipping(f"{SNAPSHOTS}._release", during=f"{SNAPSHOTS}.delete"),
        trials=seeds("snapshots/4096", 2),
    ),
    Mutant(
        "N2-flags-left-by-create",
        skipping(f"{MAPPING_EDITOR}.set_copied", during=f"{SNAPSHOTS}.create"),
        trials=("snapshots/4096/0",),
    ),
    Mutant(
        "N2-flags-left-by-delete",
        skipping(f"{SNAPSHOTS}.set_copied_flags", during=f"{SNAPSHOTS}.delete"),
        trials=seeds("snapshots/4096", 2),
    ),
    Mutant(
        "N4-size-left-to-the-header",
        skipping(f"{SNAPSHOTS}.keep_sizes"),
        trials=(SCENARIO + "size-of-an-old-snapshot",),
    ),
)

OF_WRITES = (
    Mutant(
        "W1-in-place-without-the-flag",
        with_argument(f"{PLANNING}.may_overwrite", "copied", lambda _: True),
        trials=(SCENARIO + "two-owners",),
    ),
    Mutant(
        "W1-in-place-where-shared",
        with_result(f"{REFCOUNTS}.data_refcount", lambda _: 1, during=f"{PLANNING}.may_overwrite"),
        trials=(SCENARIO + "stale-copied-flag",),
    ),
    Mutant(
        "W1-in-place-in-a-transaction",
        holding(f"{PLANNING}.may_overwrite", "self.tables.staged.changes.own", None),
        trials=("transactions/4096/0",),
    ),
    Mutant(
        "W2-backing-file-taken-for-zeros",
        returning(f"{READS}.below_reads_as_zeros", True, during=f"{WRITES}._was_zero"),
        trials=("overlay/4096/0", "overlay-reuse/4096/0", "copy-on-read/4096/0"),
    ),
    Mutant(
        "W2-dirty-cluster-unordered",
        with_result(f"{WRITES}._write_fresh", lambda _: False),
        trials=("deep:reuse/4096/0",),
    ),
    Mutant(
        "W2-compressed-data-unordered",
        after(f"{PACKED}._stage", lambda _, packed, *__: setattr(packed.tables.changes, "ordered", False)),
        trials=("compressed-new/4096/0",),
    ),
    Mutant(
        "W3-old-bytes-not-copied",
        skipping(f"{WRITES}._read_old"),
        trials=("snapshots-cow/4096/0",),
    ),
    Mutant(
        "W3-dirty-cluster-written-in-part",
        with_result(f"{WRITES}._write_fresh", lambda _: True),
        with_argument(
            f"{WRITES}._write_fresh",
            "fresh",
            lambda fresh: fresh._replace(run=replace(fresh.run, zero_safe=True)),
        ),
        trials=("unpunchable/4096/0",),
    ),
    Mutant(
        "W4-data-after-its-entry",
        replacing(
            f"{MEDIUM}.pwrite",
            put_off,
            during=f"{WRITES}._run_write",
            only=lambda medium, *_: getattr(medium, "late", None) is not None,
        ),
        replacing(f"{WRITES}.perform", write_late),
        trials=seeds("host-fails-dirty/4096", 4),
    ),
)


def call_hot(_: Any, tracking: Any, *__: Any) -> None:
    """Take regions for hot whose record is not durable."""
    for region in tracking._regions.values():
        region.is_hot = True


def only_in_place(_: Function, writes: Writes, plan: WritePlan, kept: object) -> bool:
    """Take what is new in the mapping for new on the device."""
    return any(piece.in_place for piece in plan.pieces)


OF_BITMAPS = (
    Mutant(
        "B1-data-before-its-bits",
        after(f"{TRACKING}.warm", call_hot),
        skipping(f"{COMMITS}.commit", during=f"{COMMITS}.heat"),
        trials=seeds("bitmaps-noted-in-place/4096", 3),
    ),
    Mutant(
        "B1-no-reason-noted-in-place",
        skipping(f"{TRACKING}._note", during=f"{TRACKING}.will_write"),
        trials=seeds("bitmaps-noted-in-place/4096", 2),
    ),
    Mutant(
        "B2-mapping-without-its-bits",
        skipping(f"{TRACKING}.will_stage"),
        trials=seeds("bitmaps-reopened/4096", 3),
    ),
    Mutant(
        "B1-kept-clusters-are-not-in-place",
        replacing(f"{PLANNING}._changes_in_place", only_in_place),
        trials=seeds("bitmaps-reuse/4096", 4),
    ),
    Mutant(
        "B3-cooled-without-what-was-written",
        with_result(f"{TRACKING_MODULE}:_folded", lambda _: 0),
        trials=seeds("bitmaps-noted-in-place/4096", 2),
    ),
    Mutant(
        "B3-cooled-without-the-bits-before",
        with_argument(
            f"{REGION}.__init__", "before", lambda before: tuple(bytes(len(old)) for old in before)
        ),
        trials=seeds("bitmaps-noted-in-place/4096", 3),
    ),
    Mutant(
        "B4-transaction-finds-regions-warm",
        skipping(f"{COMMITS}.cool"),
        trials=seeds("bitmaps-transactions/4096", 4),
    ),
    Mutant(
        "B4-transaction-stages-no-bits",
        skipping(f"{PRIVATE_MARKS}.will_stage"),
        trials=seeds("bitmaps-transactions/4096", 3),
    ),
    Mutant(
        "B5-table-not-given-up",
        skipping(f"{BITMAPS}._release_table"),
        trials=seeds("bitmaps-noted/4096", 3),
    ),
)

OF_SHARING = (
    Mutant(
        "W5-flag-not-given",
        skipping(f"{MAPPING_EDITOR}.set_entries", during=LEAVE_TO_ONE),
        trials=seeds("shared/4096", 2),
    ),
    Mutant(
        "W5-left-cluster-in-place",
        holding(f"{PLANNING}.may_overwrite", "self.tables.space.left_alone", set()),
        trials=(SCENARIO + "two-owners-without-a-snapshot",),
    ),
)

OF_COMMITS = (
    Mutant("T1-record-before-ordered-data", without_barrier("flush.ordered"), trials=("deep:reuse/4096/0",)),
    Mutant(
        "T1-record-before-data-of-a-transaction",
        holding(
            f"{COMMITS}._write_record",
            "changes.ordered",
            False,
            only=lambda _, changes, *more: changes.is_private,
        ),
        trials=("deep:transactions-new/4096/0",),
    ),
    Mutant("T2-flush-without-barrier", without_barrier("flush.record"), trials=("reopened/4096/0",)),
    Mutant(
        "T3-home-before-its-record",
        after(f"{LOG}.make_room", lambda _, log, changes, *more: write_home(log.medium, changes)),
        trials=seeds("reopened/512", 2),
    ),
    Mutant("T4-epoch-ends-in-the-log", skipping(f"{LOG}.write_homes"), trials=("reopened/4096/0",)),
    Mutant(
        "T5-root-beside-its-copy",
        returning(f"{ROOT}.may_be_rewritten", True),
        trials=("root:half-moved/8192/0",),
    ),
    Mutant(
        "T6-failed-root-left",
        skipping(f"{ROOT}.write", during=f"{ROOT}.put_back"),
        trials=seeds("going-live-fails/4096", 2),
    ),
    Mutant(
        "T7-file-cut-too-short",
        with_result(f"{REFCOUNTS}.used_end", lambda end: end - 1, during=f"{CLOSING}._release_journal"),
        trials=("reopened/4096/0",),
    ),
    Mutant(
        "F1-search-before-repair",
        after(f"{LIFECYCLE}.prepare_to_repair", lambda _, lifecycle, **__: lifecycle.start_search()),
        trials=("repair/4096/0", "repair/4096/1", "repair-snapshots/4096/0"),
    ),
    Mutant(
        "F1-too-low-and-trusted",
        skipping(f"{SPACE}.distrust"),
        trials=(SCENARIO + "refcount-that-is-too-low",),
    ),
    Mutant(
        "F2-uncounted-data-cut-off",
        skipping(f"{LIFECYCLE}._find_uncounted"),
        trials=(SCENARIO + "uncounted-data",),
    ),
    Mutant(
        "F2-cut-off-before-the-first-record",
        skipping(f"{LIFECYCLE}._find_uncounted", during=f"{LIFECYCLE}.recover"),
        trials=(SCENARIO + "uncounted-data",),
    ),
    Mutant(
        "F2-cut-off-with-what-a-crash-left",
        returning(f"{SNAPSHOTS}.data_within", {}, during=f"{CLOSING}._is_unused"),
        trials=(SCENARIO + "uncounted-data",),
    ),
    Mutant(
        "F2-uncounted-data-free",
        after(f"{LIFECYCLE}._find_uncounted", lambda _, lifecycle: lifecycle.start_search()),
        trials=(SCENARIO + "uncounted-data",),
    ),
    Mutant(
        "F3-truncated-file-made-longer",
        skipping(f"{LIFECYCLE}._refuse_truncated"),
        trials=(SCENARIO + "truncated-file",),
    ),
    Mutant(
        "F4-blocks-behind-a-stale-root-copy",
        skipping(f"{CLOSING}._begin_last_epoch"),
        trials=("dropping:stale-root-copy",),
    ),
    Mutant(
        "F4-record-before-the-root",
        without_barrier("live.root"),
        trials=("dropping:stale-root-copy",),
    ),
    Mutant(
        "F4-blocks-below-the-last-epoch",
        skipping(f"{JOURNAL}.drop_epoch_before"),
        trials=("dropping:stale-root-copy",),
    ),
)

OF_UNDO = (
    Mutant(
        "U1-finished-repair-taken-back",
        skipping(f"{UNDO_HEADER}.unpack_mark"),
        trials=("dropping:repair-done",),
    ),
    Mutant(
        "U2-undo-over-another-file",
        returning(f"{UNDO_MODULE}:UndoFile.is_of", True),
        trials=(SCENARIO + "undo-of-another-file",),
    ),
    Mutant(
        "U3-half-taken-back-opened",
        replacing(
            "jqcow.ondisk.root:pack_undo_root", lambda _, header: header.pack().ljust(SECTOR_BYTES, b"\0")
        ),
        trials=("dropping:half-taken-back",),
    ),
)

OF_AMENDMENTS = (
    Mutant(
        "A1-new-refcounts-not-ordered",
        after(f"{RECOUNTING}.stage", forget_data),
        trials=seeds("amend-width/4096", 2),
    ),
    Mutant(
        "A2-old-structure-counted",
        replacing(f"{RECOUNTING}._without_old", lambda _, __, *run: iter([run] if run[-1] else [])),
        trials=("amend-width/4096/0",),
    ),
    Mutant(
        "A3-zero-flags-left",
        skipping(f"{AMENDING}.take_zero_flags"),
        trials=("amend-version-overlay/4096/0",),
    ),
    Mutant(
        "A4-counted-once",
        skipping(f"{ALLOCATION}.correct", during=f"{AMENDING}._replace"),
        trials=seeds("amend-version-snapshots/4096", 2),
    ),
    Mutant(
        "A4-given-up-once",
        with_argument(f"{AMENDING}._give_up", "owners", lambda _: 1),
        trials=seeds("amend-version-snapshots/4096", 2),
    ),
)


def wipe_first(record: Function, slots: Any, header: Any) -> None:
    """Overwrite the key material of a passphrase before the record that takes it away."""
    for number, slot in enumerate(slots.header.slots):
        if slot.is_active and not header.slots[number].is_active:
            slots._wipe(slot)
    record(slots, header)


OF_ENCRYPTION = (
    Mutant(
        "E1-holes-of-an-encrypted-image",
        returning(f"{WRITES}._shows_holes", True),
        trials=seeds("encrypted-reopened/4096", 2),
    ),
    Mutant(
        "E2-sector-in-part",
        skipping(f"{ENCRYPTED_DATA}._read_sectors", during=f"{ENCRYPTED_DATA}._completed"),
        trials=(SCENARIO + "part-of-a-sector",),
    ),
    Mutant(
        "E3-active-before-its-key-material",
        without_barrier("slots.material"),
        trials=("dropping:key-slots",),
    ),
    Mutant(
        "E4-key-material-before-the-record",
        replacing(f"{KEY_SLOTS}._record", wipe_first),
        trials=("dropping:key-slots",),
    ),
    Mutant(
        "N3-luks-header-is-no-metadata",
        returning(f"{SNAPSHOTS}._luks_clusters", ()),
        trials=(SCENARIO + "entry-into-luks-header",),
    ),
)


def forget_no_plan(original: Function, unwritten: Any, cluster: int, part: range) -> Any:
    """Take for unwritten what was written, and given up, since the cluster was taken."""
    before = unwritten._left.get(cluster, 0)
    is_safe = original(unwritten, cluster, part)
    if before:
        unwritten._left[cluster] = before
    return is_safe


def unbounded_place(original: Function, tracking: Any, entry: Any, index: int) -> tuple[int, int, int]:
    """Let a region have bits that the table of a bitmap does not map."""
    start, _, count = original(tracking, entry, index)
    return start, max(1, count >> 3), count


def punch_at_once(_: Any, places: Any, cluster: int, count: int) -> None:
    """Punch what was given up before anything is durable."""
    run = places.run_of(cluster, count)
    data_file, geometry = places.requests.medium.data_file, places.geometry
    data_file.punch(geometry.offset_of(run.start), count * geometry.cluster_bytes)


def cut_early(resizing: Resizing, old_size: int, size_bytes: int, preallocation: str) -> None:
    """Cut the data file before the record of the size is durable."""
    data_file = resizing.requests.medium.data_file
    if data_file is not None:
        data_file.cut(size_bytes)


def forget_promise(_: PrivateChanges, data_file: DataFile) -> None:
    """Believe that a record whose barrier failed is gone."""
    data_file.promised_bytes = 0


OF_DATA_FILES = (
    Mutant(
        "S3-filled-over-old-bytes",
        replacing("jqcow.engine.clusters:UnwrittenParts.plan_to_write", forget_no_plan),
        trials=(*seeds("subclusters-filled/16384", 4),),
    ),
    Mutant(
        "B6-bits-behind-a-table",
        replacing(f"{TRACKING}._place", unbounded_place),
        trials=(SCENARIO + "bytes-behind-a-bitmap-table",),
    ),
    Mutant(
        "X1-record-before-its-data",
        skipping(f"{MEDIUM}.data_barrier"),
        trials=("data-file-reopened/1024/0",),
    ),
    Mutant(
        "X1-image-without-its-data",
        skipping(f"{MEDIUM}._sync_data_file", during=f"{MEDIUM}.barrier"),
        trials=("data-file-in-place/1024/0",),
    ),
    Mutant(
        "X2-old-bytes-beside-new-ones",
        with_result(f"{PLACES}.run_of", lambda run: replace(run, zero_safe=True)),
        trials=("data-file-reuse-dirty/1024/0",),
    ),
    Mutant(
        "X3-written-before-it-is-data",
        skipping(f"{PLACES}.require_data"),
        trials=("data-file-raw-zeros/1024/0",),
    ),
    Mutant(
        "X3-data-over-old-bytes",
        skipping(f"{DATA_FILE}.zero", during=f"{PLACES}.make_data"),
        trials=(SCENARIO + "old-bytes-in-a-raw-file",),
    ),
    Mutant(
        "X3-zeros-in-the-tables-alone",
        skipping(f"{DATA_FILE}.zero", during=f"{WRITES}._run_write"),
        trials=("deep:data-file-raw-reopened/1024/0",),
    ),
    Mutant(
        "X3-discarded-before-it-is-zeros",
        returning("jqcow.engine.datafile:has_fixed_size", False, during=f"{DATA_FILE}.zero"),
        trials=seeds("data-file-raw-device/512", 3),
    ),
    Mutant(
        "X3-old-bytes-behind-the-end",
        skipping(f"{DATA_FILE}.clear"),
        trials=seeds("data-file-raw-device-resizes/512", 3),
    ),
    Mutant(
        "X4-transaction-overwrites",
        skipping(f"{PLACES}.refuse_overwriting"),
        trials=(SCENARIO + "transaction-over-a-data-file",),
    ),
    Mutant(
        "X4-larger-again-over-data",
        holding(f"{RESIZING}._clear_behind", "self.tables.changes.reach_bytes", 0),
        trials=(SCENARIO + "transaction-over-a-data-file",),
    ),
    Mutant(
        "X8-left-long",
        skipping(f"{DATA_FILE}.cut", during=f"{PRIVATE}.give_up"),
        trials=(SCENARIO + "raw-file-of-a-size-given-up",),
    ),
    Mutant(
        "X8-cut-below-a-promise",
        before(f"{PRIVATE}._cut_data_file", forget_promise),
        trials=(SCENARIO + "raw-file-of-a-size-given-up",),
    ),
    Mutant(
        "X5-two-clusters-in-one-place",
        skipping(f"{LIFECYCLE}.require_own_offsets"),
        trials=(SCENARIO + "data-file-out-of-order",),
    ),
    Mutant(
        "X6-cut-before-the-record",
        before(f"{RESIZING}._resize_outside", cut_early),
        trials=seeds("data-file-resizes/1024", 3),
    ),
    Mutant(
        "X7-before-the-record",
        after(f"{PLACES}.vacate", punch_at_once),
        trials=(SCENARIO + "transaction-over-a-data-file",),
    ),
    Mutant(
        "X7-over-new-data",
        skipping(f"{PLACES}.occupy"),
        trials=(SCENARIO + "written-where-a-discard-was", "data-file-reuse/1024/0"),
    ),
    Mutant(
        "X7-under-a-reader",
        with_result(f"{GUARD}.oldest", lambda number: number + 100, during=f"{VACATED}._begin"),
        trials=(SCENARIO + "read-beside-a-commit",),
    ),
    Mutant(
        "X7-beside-a-writer",
        skipping(f"{GUARD}.begin", during=f"{VACATED}._begin"),
        trials=(SCENARIO + "written-while-it-is-punched",),
    ),
    Mutant(
        "B1-new-cluster-over-an-old-one",
        replacing(f"{PLANNING}._changes_in_place", only_in_place),
        trials=seeds("data-file-bitmaps-reuse/1024", 3),
    ),
)

MUTANTS = (
    *OF_MEDIUM,
    *OF_JOURNAL,
    *OF_CHANGES,
    *OF_SPACE,
    *OF_REFCOUNTS,
    *OF_MAPPING_AND_SNAPSHOTS,
    *OF_WRITES,
    *OF_BITMAPS,
    *OF_SHARING,
    *OF_COMMITS,
    *OF_UNDO,
    *OF_AMENDMENTS,
    *OF_ENCRYPTION,
    *OF_DATA_FILES,
    *MUTANTS_OF_DEVICES,
    *MUTANTS_OF_PROTECTION,
    *MUTANTS_OF_SALVAGE,
    *MUTANTS_OF_SMALL_WRITES,
    *MUTANTS_OF_THREADS,
)


TRIALS = sorted(
    {trial for trials in BARRIER_TRIALS.values() for trial in trials}
    | {trial for mutant in MUTANTS for trial in mutant.trials}
)
"""Jqcow as it is must pass them all: ``python -m tests.crash.mutants`` goes through them."""


def mutant_named(name: str) -> Mutant:
    """Return the mutant of a name."""
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    return mutant


def judge_named(name: str, *trials: str) -> tuple[Verdict, str]:
    """Judge the mutant of a name by its own trials, or by those that are given."""
    mutant = mutant_named(name)
    return judge(mutant, map(action_of, trials or mutant.trials))


def main() -> int:
    """Judge the mutant that the command line names, by its own trials or by those named after it.

    Without a name judge jqcow as it is, by the trials of all mutants.
    """
    if not sys.argv[1:]:
        broken = {trial: failure for trial in TRIALS if (failure := judge_trial(trial)) is not None}
        print(f"{len(TRIALS)} trials, {len(broken)} broken")
        print(*(f"{trial}: {text_of(failure)}" for trial, failure in broken.items()), sep="\n")
        return 1 if broken else 0
    verdict, text = judge_named(*sys.argv[1:])
    print(f"{sys.argv[1]} is {verdict.name}: {text}")
    return verdict


if __name__ == "__main__":
    sys.exit(main())
