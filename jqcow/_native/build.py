"""Compiles the C kernels into the extension module ``jqcow._native._kernels``.

The build hook loads this file by its path, so it imports nothing of jqcow. A developer may run it too:
``python jqcow/_native/build.py`` compiles into the tree.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
MODULE = "jqcow._native._kernels"
OPTIMISED = ("-O3", "-g0")


def kernel_builder(options: Sequence[str] = OPTIMISED) -> FFI:
    """Return the cffi builder of the kernels: API mode, limited ABI; ``options`` of compiler and linker."""
    builder = FFI()
    builder.cdef((HERE / "kernels.h").read_text(encoding="utf-8"))
    builder.set_source(
        MODULE,
        '#include "kernels.c"\n#include "tables.c"',
        include_dirs=[str(HERE)],
        extra_compile_args=list(options),
        extra_link_args=list(options),
        py_limited_api=True,
    )
    return builder


def compile_kernels(target_directory: Path) -> Path:
    """Compile into ``target_directory`` and return the path of the extension module.

    The generated C and the object files never leave a temporary directory. Raises
    ``cffi.VerificationError`` where there is no compiler or no Python.h.
    """
    with tempfile.TemporaryDirectory(prefix="jqcow-build-") as scratch:
        built = Path(kernel_builder().compile(tmpdir=scratch))
        # A rename, not an overwrite: a running process may have the old module mapped.
        incoming = target_directory / f"{built.name}.new"
        shutil.copy2(built, incoming)
        return incoming.rename(target_directory / built.name)


if __name__ == "__main__":
    print(compile_kernels(HERE))
