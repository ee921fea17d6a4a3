"""All tables through one set of changes: operations that are whole or did not happen."""

from __future__ import annotations

from contextlib import suppress

import pytest

from jqcow.engine.engine import Engine
from jqcow.engine.tables import Tables
from jqcow.errors import JqcowError, PoisonedError
from jqcow.ondisk.layout import GuestCluster, HostOffset
from tests.unit.engines import changing, check, flush, map_one, new_engine


@pytest.fixture
def engine() -> Engine:
    return new_engine()


class TestOperation:
    def test_it_stays(self, engine: Engine) -> None:
        with changing(engine) as tables:
            map_one(tables)
        assert not engine.public.changes.is_empty and not engine.medium.in_doubt
        assert check(engine).ok

    @pytest.mark.parametrize("error", [OSError, JqcowError])
    def test_what_is_expected_undoes_it(self, engine: Engine, error: type[Exception]) -> None:
        """D3: what it took is unknown, what it freed is in use, and the next one may follow."""
        with changing(engine) as tables:
            first = map_one(tables)
        blocks = {offset: bytes(block) for offset, block in engine.public.changes.blocks.items()}
        with pytest.raises(error), changing(engine) as tables:
            taken = map_one(tables, 1)
            tables.refcounts.release(first)
            tables.view.set_header(size=1024)
            raise error
        assert engine.public.changes.blocks == blocks
        assert taken in engine.space.unknown and not engine.space.is_listed(first)
        assert not engine.medium.in_doubt and check(engine).ok

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_anything_else_leaves_the_image_in_doubt(
        self, engine: Engine, error: type[BaseException]
    ) -> None:
        """M6: nothing is undone, and nothing follows."""
        with pytest.raises(error), changing(engine) as tables:
            map_one(tables)
            raise error
        assert engine.medium.in_doubt and not engine.public.changes.is_empty
        with pytest.raises(PoisonedError), changing(engine):
            pytest.fail("nobody knows what is staged")

    @pytest.mark.parametrize("error", [None, OSError])
    def test_it_leaves_no_mark_behind(self, engine: Engine, error: type[Exception] | None) -> None:
        """Outside an operation nothing is staged, and nothing is copied for a mark of the past."""
        with suppress(OSError), changing(engine):
            if error is not None:
                raise error
        with pytest.raises(RuntimeError, match="inside an operation"):
            engine.public.view.set_entry(HostOffset(0), 0, 0)


class TestViews:
    def test_a_transaction_sees_the_public_changes_only_once_they_are_durable(self, engine: Engine) -> None:
        """D5, the other way round: it lies over what is durable."""
        private = Tables(engine.blocks, engine.space, engine.public.changes.next_set())
        with changing(engine) as tables:
            map_one(tables)
        assert private.mapping.l2_table(0) == 0 != engine.public.mapping.l2_table(0)
        flush(engine)
        assert private.mapping.l2_table(0) == engine.public.mapping.l2_table(0)

    def test_what_is_at_hand_sees_the_same_changes(self, engine: Engine) -> None:
        with changing(engine) as tables:
            cluster = map_one(tables)
        assert tables.mapping_at_hand.l2_entry(GuestCluster(0)) == tables.mapping.l2_entry(GuestCluster(0))
        assert tables.refcounts_at_hand.get(cluster) == 1
