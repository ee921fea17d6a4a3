"""The hatchling hook that compiles the C kernels when a wheel is built or an editable install is made.

Where they cannot be compiled (no compiler, no Python.h) the build goes on without them: the wheel is then
pure Python, and the twins serve. A wheel also gets the man pages and the completion, made of the parsers.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from cffi import VerificationError
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE_DIRECTORY = "jqcow/_native"
NOTICE = (
    "The C kernels were not built: jqcow works with its Python twins, more slowly. "
    "They need a C compiler and Python.h."
)


class KernelsHook(BuildHookInterface[Any]):
    """Puts the compiled kernels into the wheel, or into the tree for an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell hatchling what the wheel holds and which platforms it fits."""
        package_directory = Path(self.root, PACKAGE_DIRECTORY)
        if version == "editable":
            remove_stale_kernels(package_directory)
            target_directory = package_directory
        else:
            self.scratch = tempfile.TemporaryDirectory(prefix="jqcow-wheel-")
            target_directory = Path(self.scratch.name)
            build_data["shared_data"].update(manual_files(Path(self.root), target_directory / "share"))
        try:
            built = load_builder(package_directory).compile_kernels(target_directory)
        except VerificationError as error:
            self.app.display_warning(f"{NOTICE}\n{error}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = wheel_tag(built)
        if version != "editable":
            build_data["force_include"][str(built)] = f"{PACKAGE_DIRECTORY}/{built.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the scratch directory of a wheel build."""
        if version != "editable":
            self.scratch.cleanup()


def manual_files(root: Path, directory: Path) -> dict[str, str]:
    """Write man pages and completion below a directory; return them with their places in an installation."""
    # In a process of its own: it imports jqcow as it is in the tree.
    command = [sys.executable, "-m", "jqcow.cli.manual", str(directory)]
    subprocess.run(command, cwd=root, check=True)
    made = (path for path in directory.rglob("*") if path.is_file())
    return {str(path): f"share/{path.relative_to(directory)}" for path in made}


def load_builder(package_directory: Path) -> ModuleType:
    """Load build.py by its path: importing it as part of jqcow would need jqcow's dependencies."""
    spec = importlib.util.spec_from_file_location("jqcow_kernel_build", package_directory / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def remove_stale_kernels(package_directory: Path) -> None:
    """Kernels of an earlier build must not serve when this build fails."""
    for stale in package_directory.glob("_kernels*.so"):
        stale.unlink()


def wheel_tag(built: Path) -> str:
    """Return the wheel tag that is true for the module ``built``."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if built.name.endswith(".abi3.so"):
        return f"cp311-abi3-{platform}"
    # A free-threaded Python has no limited ABI: the module fits this interpreter alone.
    python = f"cp{sysconfig.get_config_var('py_version_nodot')}"
    return f"{python}-{python}{sysconfig.get_config_var('abiflags') or ''}-{platform}"
