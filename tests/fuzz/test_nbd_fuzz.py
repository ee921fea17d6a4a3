"""Clients that break the NBD protocol: a sample of `tests.fuzz.nbd`."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import nbd


def test_no_client_harms_a_server(tmp_path: Path) -> None:
    nbd.run(tmp_path, seed=1, clients=300)
