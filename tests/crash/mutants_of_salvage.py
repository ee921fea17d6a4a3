"""Mutants of rules of salvage: each has something be certain that is not. Others have unit tests alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jqcow import _native
from jqcow.salvage.evidence import Certainty, Placement
from jqcow.salvage.guestmap import TABLE, Piece
from jqcow.salvage.survey import Survey
from jqcow.salvage.tables import INVALID, LONGEST_BYTES
from tests.crash.anchored import CLUSTER_BYTES
from tests.support.mutant import Mutant
from tests.support.patches import Function, before, holding, replacing, returning, skipping, with_argument


def take_once_for_all(
    _: Function, disk: Any, guest_offset: int, length: int, host_offset: int, sure: Certainty
) -> Iterator[Piece]:
    """Ask for no other use of a cluster."""
    yield Piece(guest_offset, length, "data", host_offset, 0, sure, TABLE)


def judge_for_any_file(_: Function, tables: Any, table: bytes, marks: Any = None) -> tuple[int, ...]:
    """Take whatever a table names for data, where the file ends or not."""
    codec, shape = tables.shape.codec, tables.shape
    how = codec.entry_bytes, shape.geometry.cluster_bits, shape.reserved
    return _native.l2_judge(table, *how, LONGEST_BYTES)


def one_entry_tells_of_all(_: Function, structures: Any, table: bytes, cluster_bits: int) -> bool | None:
    """Take a table for one of the other kind where one entry is wrong for this one."""
    plain, extended = (
        structures.judge(table, cluster_bits, extended=kind)[INVALID] for kind in (False, True)
    )
    return None if bool(plain) == bool(extended) else bool(plain)


def as_sure_as_ever(original: Function, patient: Any, snapshot: str | None = None) -> Survey:
    """Believe the tables, whatever became of the journal."""
    found: Survey = original(patient, snapshot)
    found.ceiling = Certainty.CERTAIN
    return found


def forget_other_places(anchors: Any, placement: Placement, most: Certainty = Certainty.CERTAIN) -> None:
    """Have the last word on a cluster be the only one."""
    host = placement.host_offset - placement.host_offset % CLUSTER_BYTES
    anchors._claims[host].clear()


def the_last_in_the_file(_: Function, anchors: Any, hosts: list[tuple[int, Any]]) -> tuple[int, Any]:
    """Take the cluster that lies furthest out for the newest."""
    return max(hosts, key=lambda pair: pair[0])


def lost_is_zeros(original: Function, disk: Any, offset: int, length: int) -> bytes:
    """Read zeros where nothing was placed."""
    found: bytes | None = original(disk, offset, length)
    return bytes(length) if found is None else found


MUTANTS_OF_SALVAGE = (
    Mutant(
        "EV2-lost-is-zeros",
        replacing("jqcow.salvage.reading:MappedDisk.read", lost_is_zeros),
        trials=("scenario:what-nobody-placed",),
    ),
    Mutant(
        "AN1-the-last-word-counts",
        before("jqcow.salvage.anchoring:Anchors.add", forget_other_places),
        trials=("scenario:a-cluster-for-two-places",),
    ),
    Mutant(
        "AN2-the-last-cluster-counts",
        replacing("jqcow.salvage.anchoring:Anchors._newest", the_last_in_the_file),
        trials=("scenario:two-clusters-for-a-place",),
    ),
    Mutant(
        "AN3-a-part-tells-of-all",
        holding("jqcow.salvage.anchoring:Anchors.add", "self._are_current", True),
        trials=("scenario:a-part-of-a-cluster",),
    ),
    Mutant(
        "FI1-what-is-expected-is-certain",
        with_argument("jqcow.salvage.filling:Filling._put", "certainty", lambda _: Certainty.CERTAIN),
        trials=("scenario:a-file-that-is-expected",),
    ),
    Mutant(
        "GM1-zeros-in-tables-are-holes",
        returning("jqcow.salvage.tables:DiskTables.holes", []),
        trials=("scenario:sectors-of-zeros-in-tables",),
    ),
    Mutant(
        "GM2-other-uses-do-not-count",
        replacing("jqcow.salvage.guestmap:GuestMap._data", take_once_for_all),
        trials=("scenario:one-cluster-for-two",),
    ),
    Mutant(
        "TB2-behind-the-end-are-zeros",
        replacing("jqcow.salvage.tables:_judge", judge_for_any_file),
        trials=("scenario:end-that-is-cut-off",),
    ),
    Mutant(
        "HD1-one-entry-tells-of-all",
        replacing("jqcow.salvage.inference:Structures._has_pairs", one_entry_tells_of_all),
        trials=("scenario:end-behind-an-odd-entry",),
    ),
    Mutant(
        "RD1-zeros-are-believed",
        returning("jqcow.salvage.ranges:Ranges.overlaps", False),
        trials=("scenario:sectors-that-the-host-cannot-read",),
    ),
    Mutant(
        "SV1-data-of-snapshots-has-no-name",
        skipping("jqcow.salvage.orphans:Unnamed.leave_out"),
        trials=("scenario:data-of-a-snapshot",),
    ),
    Mutant(
        "SV2-a-lost-journal-is-no-matter",
        replacing("jqcow.offline.salvaging.patient:Patient.survey", as_sure_as_ever),
        trials=("scenario:journal-that-is-lost",),
    ),
)
