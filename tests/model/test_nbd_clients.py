"""Several clients and kills of the server against a byte array: a sample of `tests.model.clients`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model import clients


@pytest.mark.parametrize("seed", [1, 2])
def test_clients_find_what_they_wrote_and_kills_lose_nothing(tmp_path: Path, seed: int) -> None:
    played = clients.play(tmp_path, seed=seed, rounds=3, clients=4, requests=300)
    assert played.requests > 100


def test_a_flush_that_is_not_one_is_found() -> None:
    """The model can fail: what a flush acknowledged, and the image does not have, is wrong."""
    sectors = clients.Sectors()
    sectors.write(1, b"a" * 512)
    sectors.write(1, b"b" * 512)
    sectors.flushed({1: sectors.number})
    with pytest.raises(clients.Wrong):
        sectors.check(1, b"a" * 512)
    sectors.write(1, b"c" * 512)
    sectors.check(1, b"b" * 512)
