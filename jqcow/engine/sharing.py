"""Host clusters that several guest clusters have, though no snapshot shares them.

A double allocation that was repaired leaves them, here as in QEMU. A write copies, as it does below a
snapshot; what then remains is one owner without a COPIED flag, which a check calls an error. Who that is only
a walk of all tables tells: one in a session, and only where there is such a cluster. It is not written in
place: a crash before the record is durable brings the first owner back.

W5. A host cluster that a guest cluster leaves to one other, without a snapshot, gets the COPIED flag in the
    same record; its session never writes there in place.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress

from jqcow.engine.tables import Tables
from jqcow.errors import CorruptionError
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER
from jqcow.ondisk.layout import ClusterIndex, GuestCluster

MAX_SHARERS = 1 << 20
"""So many guest clusters are kept in mind: it bounds memory. The flags of others stay as they are."""


def leave_to_one(tables: Tables, clusters: Sequence[ClusterIndex]) -> None:
    """Give the COPIED flag to the only guest cluster that each of these is left to (W5); in an operation.

    With snapshots the one that is left is a snapshot's; deleting the snapshot sets the flags (N2).
    """
    if tables.view.header.nb_snapshots or not clusters:
        return
    space, mapping = tables.space, tables.mapping
    space.left_alone.update(clusters)
    if space.sharers is None:
        space.sharers = _find_sharers(tables, sorted(clusters))
    for cluster in clusters:
        host = tables.geometry.offset_of(cluster)
        for guest in space.sharers.get(cluster, ()):
            entry = mapping.l2_entry(guest)
            if entry.host == host and entry.kind != COMPRESSED_CLUSTER and not entry.copied:
                mapping.set_entries(guest, [entry._replace(copied=True)])


def _find_sharers(tables: Tables, left: Sequence[ClusterIndex]) -> dict[ClusterIndex, list[GuestCluster]]:
    """Return the guest clusters that have a host cluster with more owners, or one of those just left."""
    found: dict[ClusterIndex, list[GuestCluster]] = {}
    # Behind a damaged entry flags stay as they are: no reason to refuse a write elsewhere.
    with suppress(CorruptionError):
        for count, (cluster, guest) in enumerate(_sharers(tables, left)):
            if count == MAX_SHARERS:
                break
            found.setdefault(cluster, []).append(guest)
    return found


def _sharers(tables: Tables, left: Sequence[ClusterIndex]) -> Iterator[tuple[ClusterIndex, GuestCluster]]:
    mapping = tables.mapping
    for l1_index, table in mapping.l2_tables(0):
        first = l1_index * mapping.codec.per_table
        for run in mapping.all_runs(table):
            if run.compressed:
                continue
            guest_of = first + run.position - run.cluster
            end = run.cluster + run.cluster_count
            for start, count, refcount in tables.refcounts.runs(run.cluster, run.cluster_count):
                if refcount > 1:
                    for cluster in range(start, start + count):
                        yield ClusterIndex(cluster), GuestCluster(guest_of + cluster)
            for cluster in left[bisect_left(left, run.cluster) : bisect_left(left, end)]:
                yield cluster, GuestCluster(guest_of + cluster)
