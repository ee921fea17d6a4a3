"""The kept corpora and all past findings of the guided fuzzer, run again: no atheris is needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jqcow import _native
from tests.fuzz import corpora
from tests.fuzz.corpora import findings_of, read_corpus, write_corpus
from tests.fuzz.drawn import Drawn
from tests.fuzz.handling import time_bound
from tests.fuzz.targets import TARGETS

CORPORA_BYTES_MAX = 512 << 10
SECONDS_MAX = 60

every_target = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture(params=["c", "python"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _native.active()
    _native.select(request.param)
    yield
    _native.select(before)


@every_target
@pytest.mark.usefixtures("kernels")
def test_kept_corpus(target: str) -> None:
    seeds = TARGETS[target].seeds()
    assert seeds, "a target without a good input to start from"
    for data in (*seeds, *read_corpus(target)):
        try:
            with time_bound(SECONDS_MAX):
                TARGETS[target].run(data)
        except BaseException as error:
            error.add_note(f"input {corpora.name_of(data)}: {data[:100].hex()}")
            raise


@every_target
@pytest.mark.usefixtures("kernels")
def test_past_findings(target: str) -> None:
    for name, data in findings_of(target).items():
        try:
            with time_bound(SECONDS_MAX):
                TARGETS[target].run(data)
        except BaseException as error:
            error.add_note(f"finding {name}")
            raise


def test_corpora_are_small() -> None:
    files = [path for path in corpora.HERE.rglob("*") if path.parent.parent == corpora.FINDINGS]
    files += corpora.CORPORA.iterdir()
    assert sum(path.stat().st_size for path in files) <= CORPORA_BYTES_MAX


def test_a_corpus_is_kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "CORPORA", tmp_path_factory.mktemp("kept") / "corpora")
    inputs = [bytes([number]) * number for number in range(200)]
    assert write_corpus("header", inputs) == inputs[: corpora.INPUTS_MAX]
    first = corpora.corpus_path("header").read_bytes()
    assert sorted(read_corpus("header")) == sorted(inputs[: corpora.INPUTS_MAX])
    write_corpus("header", reversed(inputs[: corpora.INPUTS_MAX]))
    assert corpora.corpus_path("header").read_bytes() == first


def test_chance_comes_from_the_input() -> None:
    one, other = Drawn(b"\x03" * 40), Drawn(b"\x03" * 40)
    assert [one.randrange(1000) for _ in range(50)] == [other.randrange(1000) for _ in range(50)]
    assert Drawn(b"\x00\x07").getrandbits(16) == 7
    assert 0 <= Drawn(b"\xff" * 8).random() < 1
