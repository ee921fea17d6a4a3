"""What a guest's write may overwrite, and what it takes new clusters for."""

from __future__ import annotations

import pytest

import jqcow
from jqcow.engine.mapping import MappedRun
from jqcow.errors import CorruptionError
from jqcow.ondisk.l2 import data_entry
from jqcow.ondisk.layout import GuestCluster, GuestOffset, HostOffset
from tests.unit.engines import CLUSTER, OLD, changing


def first_run(image: jqcow.Image, offset: int = 0) -> MappedRun:
    with image._lock:
        return image._engine.public.mapping.run(GuestOffset(offset), CLUSTER)


class TestInPlace:
    """W1."""

    def test_it_takes_nothing(self, image: jqcow.Image) -> None:
        space, changes = image._engine.space, image._engine.public.changes
        frontier, before = space.frontier, len(changes.blocks)
        image.pwrite(b"new", 5)
        assert (space.frontier, len(changes.blocks)) == (frontier, before)
        assert image.pread(9, 0) == OLD[:5] + b"new" + OLD[8:9]

    def test_not_where_a_snapshot_has_the_cluster_too(self, image: jqcow.Image) -> None:
        old = first_run(image).host
        snapshot = image.create_snapshot("kept")
        image.pwrite(b"new", 5)
        assert first_run(image).host != old
        with image._lock:
            shared = image._engine.public.mapping.run(GuestOffset(CLUSTER), CLUSTER)
        assert not shared.copied, "what was not written is still shared"
        image.apply_snapshot(snapshot.id)
        assert image.pread(CLUSTER, 0) == OLD[:CLUSTER] and image.check().ok

    def test_not_where_the_copied_flag_is_missing(self, image: jqcow.Image) -> None:
        """Refcount 1 alone does not tell: in other programs' images the flag counts."""
        old = first_run(image).host
        with changing(image._engine) as tables:
            tables.mapping.set_entries(GuestCluster(0), [data_entry(old)._replace(copied=False)])
        image.pwrite(b"new", 5)
        assert first_run(image).host != old and first_run(image).copied
        assert image.pread(9, 0) == OLD[:5] + b"new" + OLD[8:9]

    def test_not_where_a_shared_cluster_has_the_flag(self, image: jqcow.Image) -> None:
        """Neither does the flag alone: the snapshot would change."""
        snapshot = image.create_snapshot("kept")
        with changing(image._engine) as tables:
            entry = tables.mapping.l2_entry(GuestCluster(0))
            tables.mapping.set_entries(GuestCluster(0), [entry._replace(copied=True)])
        image.pwrite(b"new", 5)
        assert first_run(image).host != entry.host
        image.apply_snapshot(snapshot.id)
        assert image.pread(CLUSTER, 0) == OLD[:CLUSTER]

    def test_in_a_transaction_only_what_it_took_since_its_savepoint(self, image: jqcow.Image) -> None:
        def host() -> HostOffset:
            with image._lock:
                return transaction._tables.mapping.run(GuestOffset(0), 1).host

        public = first_run(image).host
        with image.transaction() as transaction:
            transaction.pwrite(b"a", 0)
            first = host()
            transaction.pwrite(b"b", 1)
            assert host() == first != public
            transaction.savepoint()
            transaction.pwrite(b"c", 2)
            assert host() not in (first, public)
        assert image.pread(4, 0) == b"abc" + OLD[3:4] and image.check().ok

    def test_a_run_is_cut_where_it_may_not_be_overwritten(self, image: jqcow.Image) -> None:
        """Clusters that lie side by side, with one flag: the part behind the savepoint stays where it is."""

        def hosts() -> list[HostOffset]:
            with image._lock:
                mapping = transaction._tables.mapping
                return [mapping.l2_entry(GuestCluster(cluster)).host for cluster in (0, 1)]

        with image.transaction() as transaction:
            transaction.pwrite(b"a" * CLUSTER, 0)
            transaction.savepoint()
            transaction.pwrite(b"b" * CLUSTER, CLUSTER)
            before = hosts()
            assert before[1] == before[0] + CLUSTER
            transaction.pwrite(b"n" * 2 * CLUSTER, 0)
            after = hosts()
            assert after[1] == before[1] and after[0] not in before
        assert image.pread(2 * CLUSTER, 0) == b"n" * 2 * CLUSTER and image.check().ok

    def test_never_onto_metadata(self, image: jqcow.Image) -> None:
        """G2."""
        with changing(image._engine) as tables:
            table = tables.mapping.l2_table(0)
            tables.mapping.set_entries(GuestCluster(0), [data_entry(table)])
        with pytest.raises(CorruptionError, match="mapped onto metadata"):
            image.pwrite(b"new", 0)
