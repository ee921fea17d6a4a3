"""Mutants (`tests.crash.mutants`) without a rule of the small writes that wait in the journal."""

from __future__ import annotations

from typing import Any

from tests.crash.trials import SCENARIO
from tests.support.mutant import (
    COMMITS,
    DESTAGING,
    DESTAGING_MODULE,
    FRAME,
    GUARD,
    PENDING,
    READS,
    REQUESTS,
    SMALL_WRITES,
    TRACKING,
    ZEROING,
    Mutant,
    seeds,
)
from tests.support.patches import after, returning, skipping, with_argument, with_result


def declare_unordered(_: None, destaging: Any) -> None:
    """Let the record that declares intents done land before what they wrote."""
    destaging.public.changes.ordered = False


MUTANTS_OF_SMALL_WRITES = (
    Mutant(
        "I1-read-from-the-tables-alone",
        returning(f"{PENDING}.layers", []),
        trials=("intents-logged/4096/0",),
    ),
    Mutant(
        "I2-done-before-it-is-durable",
        after(f"{DESTAGING}.run", declare_unordered),
        trials=("intents-logged/4096/0", *seeds("intents-over/4096", 3)),
    ),
    Mutant(
        "I3-nothing-is-carried",
        with_result(f"{PENDING}.carried", lambda _: []),
        trials=seeds("intents-killed/4096", 3),
    ),
    Mutant(
        "I4-other-changes-do-not-wait",
        skipping(f"{REQUESTS}.require_settled"),
        trials=seeds("intents-mixed/4096", 3),
    ),
    Mutant(
        "I4-pending-in-a-transaction",
        skipping(f"{COMMITS}.settle", during=f"{COMMITS}.cool"),
        trials=seeds("intents-transactions/4096", 3),
    ),
    Mutant(
        "I5-parts-of-sectors",
        returning(f"{DESTAGING_MODULE}:_are_whole_sectors", True),
        trials=("intents-parts/4096/0",),
    ),
    Mutant(
        "I6-guest-data-like-a-frame",
        returning(f"{FRAME}:may_be_intent", True),
        trials=(SCENARIO + "guest-data-like-a-frame",),
    ),
    Mutant(
        "I7-needs-the-backing-file",
        returning(f"{SMALL_WRITES}._needed", None),
        trials=seeds("intents-mixed-overlay/4096", 3),
    ),
    Mutant(
        "I7-needs-what-does-not-wait",
        returning(f"{PENDING}.covers", True),
        trials=seeds("intents-mixed-overlay/4096", 3),
    ),
    Mutant(
        "I7-two-that-read",
        skipping(f"{GUARD}.require_free", during=f"{SMALL_WRITES}.widened"),
        trials=(SCENARIO + "small-write-beside-one-that-reads",),
    ),
    Mutant(
        "I7-over-one-that-reads",
        skipping(f"{GUARD}.require_free", during=f"{SMALL_WRITES}._may_wait"),
        trials=(SCENARIO + "whole-cluster-beside-one-that-reads",),
    ),
    Mutant(
        "I7-beside-who-makes-it-a-stream",
        skipping(f"{GUARD}.require_free", during=f"{SMALL_WRITES}._may_wait"),
        trials=(SCENARIO + "small-write-beside-a-compressed-one",),
    ),
    Mutant(
        "I7-zeros-for-want-of-an-entry",
        returning(f"{READS}.below_reads_as_zeros", True, during=f"{DESTAGING}.run"),
        trials=(SCENARIO + "unflushed-write-over-a-backing-file",),
    ),
    Mutant(
        "I4-zeroes-do-not-wait-again",
        skipping(f"{REQUESTS}.require_settled", during=f"{ZEROING}._stage"),
        trials=(SCENARIO + "zeroes-after-one-that-reads",),
    ),
    Mutant(
        "I8-pending-before-its-bits",
        skipping(f"{TRACKING}.will_write", during=f"{SMALL_WRITES}.take"),
        trials=seeds("intents-mixed-bitmaps/8192", 4),
    ),
    Mutant(
        "I8-more-is-pending-before-its-bits",
        skipping(f"{TRACKING}.will_write", during=f"{SMALL_WRITES}.widened"),
        trials=seeds("intents-mixed-bitmaps-overlay/8192", 4),
    ),
    Mutant(
        "I9-beside-an-older-write",
        skipping(f"{GUARD}.drain", during=f"{DESTAGING}.run"),
        trials=(SCENARIO + "small-write-over-a-longer-one",),
    ),
    Mutant(
        "I10-declared-done-and-not-written",
        with_argument(f"{PENDING}.begin_round", "newest", lambda newest: newest + 100),
        trials=(SCENARIO + "small-write-during-a-round",),
    ),
)
