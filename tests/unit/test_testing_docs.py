"""The example in the laboratory's documentation works as it says."""

import re
from pathlib import Path
from typing import Any

import pytest

import jqcow.testing

PAGE = Path(__file__).parents[2] / "docs" / "crash-laboratory.md"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    return names


def test_example_passes_with_its_barrier_and_counts_states(example: dict[str, Any]) -> None:
    report = example["laboratory"].report()
    assert report.distinct_states > 300
    assert "recovery: tail -> end" in {row.name for row in report.intervals}


def test_example_fails_without_its_barrier_and_replays(example: dict[str, Any]) -> None:
    with pytest.raises(jqcow.testing.CrashFailure, match="is lost or wrong"):
        example["laboratory"].replay(example["workload"], example["line"], drop_barriers={"sync"})


def test_example_of_faults_leaves_a_consistent_image(example: dict[str, Any]) -> None:
    assert example["found"] == [b"kept", bytes(4), bytes(4), b"last"]
    assert example["consistent"]


def test_every_public_name_is_documented() -> None:
    text = PAGE.read_text()
    missing = [
        name
        for name in jqcow.testing.__all__
        if not re.search(rf"\b{name}\b", text) and name not in NAMED_BY_THEIR_OWNERS
    ]
    assert missing == []


NAMED_BY_THEIR_OWNERS = {
    "Change": "the union of Write, Punch, Truncate and Allocate",
    "FlushMark": "what flush_begin returns",
    "GarbageRule": "the type of garbage_allowed",
    "InFlight": "what in_flight returns",
    "IntervalRow": "a row of LabReport",
    "Operation": "what write returns",
    "SECTOR_BYTES": "the default of sector_bytes",
    "WorkloadRow": "a row of LabReport",
}
