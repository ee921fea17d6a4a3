"""The private changes of a transaction: savepoints, going back, giving up, and a commit that fails."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest

from jqcow.engine.clusters import ClusterRuns, Run
from jqcow.engine.engine import Engine
from jqcow.engine.transaction import PrivateChanges
from jqcow.errors import PoisonedError
from jqcow.ondisk.l2 import NO_ENTRY
from jqcow.ondisk.layout import ClusterIndex, GuestCluster, HostOffset
from jqcow.testing import Fault, FaultPlan
from tests.unit.engines import (
    changing,
    check,
    device_of,
    engine_on,
    flush,
    map_one,
    new_engine,
)


@pytest.fixture
def engine() -> Engine:
    """Leave one guest cluster mapped, durably."""
    engine = new_engine()
    with changing(engine) as tables:
        map_one(tables)
    flush(engine)
    return engine


@pytest.fixture
def private(engine: Engine) -> PrivateChanges:
    return PrivateChanges(engine.lifecycle)


def map_privately(private: PrivateChanges, guest: int) -> ClusterIndex:
    """Map a guest cluster in an operation of the transaction; return its host cluster."""
    with private.medium.lock, private.tables.operation():
        return map_one(private.tables, guest)


def mapped(private: PrivateChanges, *, outside: bool = False) -> list[int]:
    """Return the guest clusters that are mapped, as the transaction sees it, or everybody else."""
    mapping = private.lifecycle.public.mapping if outside else private.tables.mapping
    return [guest for guest in range(6) if mapping.l2_entry(GuestCluster(guest)) != NO_ENTRY]


def durably_mapped(engine: Engine) -> list[int]:
    """Return the guest clusters that are mapped after a crash, in an image that is sound."""
    again = engine_on(device_of(engine).killed())
    assert check(again).ok
    return [guest for guest in range(6) if again.public.mapping.l2_entry(GuestCluster(guest)) != NO_ENTRY]


class TestBeginning:
    def test_nothing_is_staged(self, engine: Engine) -> None:
        """It lies over what is durable: what is staged would be neither under nor over it."""
        with changing(engine) as tables:
            map_one(tables, 1)
        with pytest.raises(RuntimeError, match="nothing staged"):
            PrivateChanges(engine.lifecycle)
        assert not engine.log.in_transaction

    def test_nobody_packs_on_into_what_it_may_free(self, engine: Engine) -> None:
        """R4: the public changes do not see what the transaction frees."""
        engine.public.changes.packed_end = 100
        PrivateChanges(engine.lifecycle)
        assert engine.public.changes.packed_end == 0

    def test_the_log_knows(self, engine: Engine, private: PrivateChanges) -> None:
        """Meanwhile nothing is committed for being large."""
        assert engine.log.in_transaction


class TestCommit:
    def test_all_is_durable_and_seen(self, engine: Engine, private: PrivateChanges) -> None:
        """D5: not before."""
        for guest in (1, 2):
            map_privately(private, guest)
        assert mapped(private) == [0, 1, 2] and mapped(private, outside=True) == durably_mapped(engine) == [0]
        sequence = private.commit()
        assert sequence == engine.log.require_journal().sequence
        assert mapped(private, outside=True) == durably_mapped(engine) == [0, 1, 2]
        assert not engine.log.in_transaction and check(engine).ok

    def test_its_data_is_durable_before_its_record(self, engine: Engine, private: PrivateChanges) -> None:
        """T1."""
        map_privately(private, 1)
        names: list[str] = []
        device_of(engine).barrier_listeners.append(lambda name, device: names.append(name))
        private.commit()
        assert names == ["flush.ordered", "flush.record"]

    def test_of_nothing(self, engine: Engine, private: PrivateChanges) -> None:
        before = engine.log.require_journal().sequence
        assert private.commit() == before and not engine.log.in_transaction

    @pytest.mark.parametrize("call", ["pwrite", "barrier"])
    def test_failing_it_can_be_given_up(self, engine: Engine, private: PrivateChanges, call: str) -> None:
        """The old disk is there; after a failed write the image goes on."""
        taken = map_privately(private, 1)
        device_of(engine).faults = FaultPlan(Fault(errno.EIO, call=call))
        with pytest.raises(OSError):
            private.commit()
        device_of(engine).faults = None
        assert engine.log.in_transaction and mapped(private) == [0, 1]
        private.give_up()
        assert not engine.log.in_transaction and mapped(private, outside=True) == [0]
        assert engine.space.is_listed(taken) and durably_mapped(engine) == [0]
        if call == "pwrite":
            with changing(engine) as tables:
                map_one(tables, 3)
            flush(engine)
            assert durably_mapped(engine) == [0, 3]

    def test_failing_it_can_be_tried_again(self, engine: Engine, private: PrivateChanges) -> None:
        """What was cut is staged again, in the transaction and not in public."""
        map_privately(private, 1)
        device_of(engine).faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
        with pytest.raises(OSError):
            private.commit()
        device_of(engine).faults = None
        assert engine.public.changes.is_empty
        private.commit()
        assert durably_mapped(engine) == [0, 1] and check(engine).ok


class TestGivingUp:
    def test_nothing_happened(self, engine: Engine, private: PrivateChanges) -> None:
        before = engine.public.view.newest()
        taken = map_privately(private, 1)
        with private.medium.lock, private.tables.operation():
            private.tables.mapping.drop_l2_table(0)
            private.tables.view.set_header(size=512)
        freed = [run.start for run in private.tables.changes.freed_metadata]
        assert freed and all(engine.space.is_listed(cluster) for cluster in freed)
        private.give_up()
        assert private.tables.changes.is_empty and not engine.log.in_transaction
        assert engine.public.view.newest() == before and check(engine).ok
        assert not any(engine.space.is_listed(cluster) for cluster in freed), "they are in use"
        assert engine.space.is_listed(taken)

    def test_what_it_took_waits_for_a_barrier(self, engine: Engine, private: PrivateChanges) -> None:
        """S5: its record may come back to life, and would need it."""
        taken = map_privately(private, 1)
        everything = list(private.tables.changes.taken)
        private.give_up()
        assert set(engine.space._retired) == set(ClusterRuns(everything))
        assert taken not in engine.space.unknown and taken not in engine.space.zero_safe
        engine.medium.barrier("test")
        assert not engine.space._retired and engine.space.is_listed(taken)

    def test_in_doubt_there_is_nothing_to_give_up(self, engine: Engine, private: PrivateChanges) -> None:
        """M6: whoever opens the image next recovers it."""
        map_privately(private, 1)
        engine.medium.leave_in_doubt()
        private.give_up()
        assert engine.log.in_transaction and not private.tables.changes.is_empty


class TestSavepoints:
    def test_returning_undoes_what_came_since(self, engine: Engine, private: PrivateChanges) -> None:
        """D3: as often as one likes."""
        map_privately(private, 1)
        mark = private.savepoint()
        for guest in (2, 3):
            taken = map_privately(private, guest)
            assert mapped(private) == [0, 1, guest]
            private.return_to(mark)
            assert mapped(private) == [0, 1] and taken in engine.space.unknown
        private.commit()
        assert durably_mapped(engine) == [0, 1]

    def test_what_was_freed_since_is_in_use(self, engine: Engine, private: PrivateChanges) -> None:
        mark = private.savepoint()
        host = engine.geometry.cluster_of(private.tables.mapping.l2_entry(GuestCluster(0)).host)
        with private.medium.lock, private.tables.operation():
            private.tables.mapping.drop_l2_table(0)
        assert Run(host, 1) in private.tables.changes.freed_data and engine.space.is_listed(host)
        private.return_to(mark)
        assert not private.tables.changes.freed_data and not engine.space.is_listed(host)

    def test_what_is_own_until_then_is_not_written_over(self, private: PrivateChanges) -> None:
        """W1: the savepoint may need it as it is."""
        before = map_privately(private, 1)
        assert private.tables.changes.may_overwrite(before)
        mark = private.savepoint()
        since = map_privately(private, 2)
        changes = private.tables.changes
        assert not changes.may_overwrite(before) and changes.may_overwrite(since)
        private.return_to(mark)
        assert not changes.may_overwrite(before) and not changes.may_overwrite(since)

    def test_an_older_one_ends_the_newer(self, private: PrivateChanges) -> None:
        older = private.savepoint()
        map_privately(private, 1)
        newer = private.savepoint()
        private.return_to(older)
        with pytest.raises(RuntimeError, match="was released"):
            private.return_to(newer)
        assert private.medium.in_doubt, "it is our own mistake, and not planned for"


class TestWhole:
    def test_all_stays(self, engine: Engine, private: PrivateChanges) -> None:
        with private.whole():
            map_privately(private, 1)
            map_privately(private, 2)
        assert mapped(private) == [0, 1, 2]
        private.commit()
        assert durably_mapped(engine) == [0, 1, 2]

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_or_nothing_did(
        self, engine: Engine, private: PrivateChanges, error: type[BaseException]
    ) -> None:
        """Whatever cuts it off between two operations; what came before it stays."""
        map_privately(private, 1)
        with pytest.raises(error), private.whole():
            map_privately(private, 2)
            raise error
        assert mapped(private) == [0, 1]
        private.commit()
        assert durably_mapped(engine) == [0, 1] and check(engine).ok

    @pytest.mark.parametrize("error", [None, OSError])
    def test_no_mark_is_left(self, private: PrivateChanges, error: type[Exception] | None) -> None:
        """Outside of operations nothing is staged, and nothing is copied for a state of the past."""
        with suppress(OSError), private.whole():
            map_privately(private, 1)
            if error is not None:
                raise error
        with pytest.raises(RuntimeError, match="inside an operation"):
            private.tables.view.set_entry(HostOffset(0), 0, 0)

    def test_an_outer_savepoint_outlives_it(self, private: PrivateChanges) -> None:
        mark = private.savepoint()
        with private.whole():
            map_privately(private, 1)
        with pytest.raises(OSError), private.whole():
            map_privately(private, 2)
            raise OSError
        private.return_to(mark)
        assert mapped(private) == [0]

    def test_half_of_it_is_not_committed(self, engine: Engine, private: PrivateChanges) -> None:
        """Neither within it nor where it was cut off in an operation, so that nobody could undo it."""
        with private.whole():
            map_privately(private, 1)
            with pytest.raises(PoisonedError):
                private.commit()
        with pytest.raises(KeyboardInterrupt), private.whole():
            map_privately(private, 2)
            with private.medium.lock, private.tables.operation():
                raise KeyboardInterrupt
        assert private.medium.in_doubt
        with pytest.raises(PoisonedError, match="half-way"):
            private.commit()
        assert durably_mapped(engine) == [0]
