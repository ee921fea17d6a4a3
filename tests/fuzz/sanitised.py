"""The C kernels under AddressSanitizer and UBSan: inputs of the guided fuzzer, the unit tests of the kernels.

``python -m tests.fuzz.sanitised KERNELS`` is the process that runs them: it must start with ASan's library
loaded before all others, so `run` starts it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "jqcow" / "_native"
MODULE = "jqcow._native._kernels"
SANITISERS = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
EXIT_FOUND = 99
ASAN_OPTIONS = f"detect_leaks=0:exitcode={EXIT_FOUND}"
"""Python never frees everything; what leaks is not asked here, for no kernel allocates."""


def build(folder: Path) -> Path:
    """Compile the kernels with both sanitisers into a folder, and return the module."""
    spec = importlib.util.spec_from_file_location("kernel_build", NATIVE / "build.py")
    assert spec is not None and spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    return Path(builder.kernel_builder(SANITISERS).compile(tmpdir=str(folder)))


def environment() -> dict[str, str]:
    """Return the environment for a process that loads what `build` made."""
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return os.environ | {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": ASAN_OPTIONS,
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={EXIT_FOUND}",
        # Each buffer is one of the C library, so that ASan sees where it ends.
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(ROOT),
    }


def command_of(kernels: Path, *words: str) -> list[str]:
    """Return the command that does something with kernels that `build` made."""
    return [sys.executable, "-m", __name__, str(kernels), *words]


def run() -> int:
    """Build the kernels, and run all inputs over them; return the exit status."""
    with tempfile.TemporaryDirectory(prefix="jqcow-sanitised-") as folder:
        command = command_of(build(Path(folder)), "all")
        return subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode


def install(kernels: Path) -> ModuleType:
    """Load kernels in place of those that are built into the tree; nothing of jqcow is imported yet."""
    spec = importlib.util.spec_from_file_location(MODULE, kernels)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    return module


def main() -> int:
    """Run everything about the kernels in this process, with ``all`` the inputs of all targets too.

    With ``overrun`` make one call that must be found out.
    """
    path, *words = sys.argv[1:]
    # Not for the programs that are started from here.
    del os.environ["LD_PRELOAD"]
    module = install(Path(path))
    import pytest

    from jqcow import _native
    from tests.fuzz import corpora, targets, wholes

    _native.select("c")
    if words == ["overrun"]:
        buffer = wholes.exact(bytes(64))
        module.lib.jqcow_is_zero(module.ffi.from_buffer(buffer), len(buffer) + 1)
        return 0
    chosen = targets.TARGETS if words == ["all"] else ("kernels",)
    inputs = [
        (targets.TARGETS[name], data)
        for name in chosen
        for data in (*targets.TARGETS[name].seeds(), *corpora.read_corpus(name))
    ]
    for target, data in inputs:
        target.run(data)
    print(f"{len(inputs)} inputs under {module.__file__}")
    tests = [str(ROOT / "tests" / "unit" / name) for name in ("test_native.py", "test_native_tables.py")]
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--kernels=c", *tests]))


if __name__ == "__main__":
    sys.exit(main())
