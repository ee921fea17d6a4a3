"""No kernel reads or writes past its buffer, or does what C does not define: ASan and UBSan see all calls."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuzz import sanitised


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sanitised.build(tmp_path_factory.mktemp("sanitised"))


def run(kernels: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        sanitised.command_of(kernels, *words),
        cwd=sanitised.ROOT, env=sanitised.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_kernels_keep_to_their_buffers(kernels: Path) -> None:
    done = run(kernels)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert str(kernels) in done.stdout, "other kernels were run"


def test_one_byte_too_far_is_found(kernels: Path) -> None:
    done = run(kernels, "overrun")
    assert done.returncode == sanitised.EXIT_FOUND
    assert "heap-buffer-overflow" in done.stderr
