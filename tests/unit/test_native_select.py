"""Does the switch between C kernels and twins reach callers that hold the package?"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

import pytest

from jqcow import _native
from jqcow._native import twins


@pytest.fixture(autouse=True)
def same_kernels_afterwards() -> Iterator[None]:
    before = _native.active()
    yield
    _native.select(before)


@pytest.fixture
def no_c_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as it is where no compiler was."""
    monkeypatch.setitem(sys.modules, "jqcow._native.bindings", None)
    monkeypatch.delattr(_native, "bindings", raising=False)


def test_python_takes_every_kernel_from_the_twins() -> None:
    _native.select("python")
    assert _native.active() == "python"
    assert _native.build_info() == "Python twins"
    assert all(getattr(_native, name) is getattr(twins, name) for name in _native.KERNELS)


def test_c_takes_every_kernel_from_the_bindings() -> None:
    bindings = pytest.importorskip("jqcow._native.bindings", reason="the C kernels were not built")
    _native.select("c")
    assert _native.active() == "c"
    assert _native.build_info() == "C kernels (abi3)"
    assert all(getattr(_native, name) is getattr(bindings, name) for name in _native.KERNELS)


def test_signatures_agree() -> None:
    bindings = pytest.importorskip("jqcow._native.bindings", reason="the C kernels were not built")
    for name in _native.KERNELS:
        assert inspect.signature(getattr(bindings, name)) == inspect.signature(getattr(twins, name))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="fortran"):
        _native.select("fortran")  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_c_kernels")
def test_twins_serve_where_no_kernels_were_built() -> None:
    _native.select("auto")
    assert _native.active() == "python"
    with pytest.raises(ImportError, match="not built"):
        _native.select("c")
    assert _native.active() == "python"
