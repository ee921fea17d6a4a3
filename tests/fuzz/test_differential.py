"""A fixed sample of the differential run, and whether the run would find what it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jqcow.checker.check import Kind
from tests.differential import campaign, categories, damages, evidence, samples
from tests.differential.damages import Case
from tests.differential.evidence import Evidence, Told
from tests.differential.tables import Tables
from tests.support.figures import ROOT

PARTS = 8
IMAGES = 240
"""About a minute on two cores."""


@pytest.mark.parametrize("part", range(PARTS))
def test_a_sample(part: int) -> None:
    size = IMAGES // PARTS
    found = campaign.judge_part(range(1 + part * size, 1 + (part + 1) * size))
    assert not found.failures, "\n".join(found.failures)
    assert found.counts["images"] == size and found.counts["disks read alike"]


def test_the_documents_have_the_table() -> None:
    page = (ROOT / "docs" / "damage.md").read_text(encoding="utf-8")
    assert "\n".join(categories.render()) in page, "put what tests.differential.categories renders into it"


def test_a_number_replays_its_case() -> None:
    samples.made.cache_clear()
    first = [damages.make_case(number) for number in range(5)]
    samples.made.cache_clear()
    assert first == [damages.make_case(number) for number in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that holds what an overlay names."""
    (tmp_path / samples.BASE_NAME).write_bytes(samples.base_content())
    return tmp_path


class TestTheJudge:
    """What a wrong reader or checker would show is a failure, whatever the image."""

    @pytest.fixture
    def seen(self, folder: Path) -> Evidence:
        """Return what both say of a good image with a snapshot."""
        recipe, sample = samples.made()[0]
        seen = evidence.gather(Case(0, sample.content, recipe, live=False, story=()), folder)
        assert seen.checking is not None and seen.checking.our_verdict == "clean"
        assert [reading.same for reading in seen.readings] == [True, True]
        return seen

    def failures(self, seen: Evidence) -> list[str]:
        tables = Tables(seen.content)
        different = list(campaign.differences(seen, tables))
        unexplained = [found.seen for found in different if categories.explain(found) is None]
        return [*campaign.broken_promises(seen, tables), *unexplained]

    @pytest.mark.parametrize("snapshot", [False, True])
    @pytest.mark.parametrize(
        "wrong",
        [
            {"differing": (512,)},
            {"our_bytes": 512},
            {"ours": Told(1, "jqcow: L2 table at 0x600: entry 0x1 is not valid; it maps guest offset 0x0")},
            {"ours": Told(1, "jqcow: cluster at host offset 0x800: it holds data and no table names it")},
            {"ours": Told(None, "no end in sight")},
            {"theirs": Told(1, "qemu-img: error while reading at byte 0: Input/output error")},
            {"theirs": Told(1, "qemu-img: Could not open 'image': Snapshot table too large")},
        ],
    )  # fmt: skip
    def test_of_a_reading(self, seen: Evidence, wrong: dict[str, object], snapshot: bool) -> None:
        seen.readings[snapshot] = replace(seen.readings[snapshot], **wrong)  # type: ignore[arg-type]
        assert self.failures(seen)

    @pytest.mark.parametrize(
        "wrong",
        [{"corruptions": 1}, {"leaks": 1}, {"check_errors": 1}, {"corruptions": None}, {"report": None}],
    )
    def test_of_a_check(self, seen: Evidence, wrong: dict[str, object]) -> None:
        assert seen.checking is not None
        seen.checking = replace(seen.checking, **wrong)  # type: ignore[arg-type]
        assert self.failures(seen)

    @pytest.mark.parametrize("kind", list(Kind))
    def test_of_a_finding_that_is_not_true(self, seen: Evidence, kind: Kind) -> None:
        """Only what QEMU has no notion of is believed."""
        assert seen.checking is not None and seen.checking.report is not None
        report = replace(seen.checking.report, counts={kind: 1})
        status = 3 if report.leaks else 2
        seen.checking = replace(seen.checking, report=report, ours=Told(status))
        believed = {Kind.OVERLAP, Kind.L1_TOO_SMALL, Kind.RESERVED_RANGE, Kind.LEAK_PAST_END}
        assert bool(self.failures(seen)) == (kind not in believed)

    def test_of_data_that_is_missing(self, seen: Evidence, folder: Path) -> None:
        """Both read zeros for what was cut off."""
        seen.content = seen.content[: len(seen.content) // 2]
        assert any("is missing" in failure for failure in self.failures(seen))

    def test_of_an_error_that_is_missed(self, seen: Evidence) -> None:
        assert seen.checking is not None
        seen.checking = replace(seen.checking, corruptions=1, leaks=1)
        assert any("QEMU finds errors" in failure for failure in self.failures(seen))
