"""QEMU's image fuzzer as a second generator: its images, and every command of jqcow on each.

It is a program of its own, with a licence of its own; whoever has a checkout of QEMU names the directory. Its
package ``qcow2`` takes chance from a module that is replaced here, so that a number replays an image.

An image is handled in a process of its own, whose memory and time are limited.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.measured import peak_bytes

ROOT = Path(__file__).resolve().parents[2]
BACKING = "backing.raw"
BACKING_BYTES = 1 << 20
IMAGES_AT_ONCE = 20
COMMAND_SECONDS_MAX = 5 * 4
"""As in test_bounds: a slow machine gets four times the five seconds that are promised."""
ADDRESS_SPACE_BYTES = 2 << 30
PEAK_BYTES_MAX = 256 << 20

PARTS: tuple[list[list[str]] | None, ...] = (
    None,
    [["l1_table"], ["l2_tables"]],
    [["l2_tables"]],
    [["refcount_table"], ["refcount_blocks"]],
    [["refcount_blocks"], ["l2_tables"]],
    [["feature_name_table"], ["backing_file_format"], ["backing_file_name"]],
)
"""What is damaged, by an image's number: all of it, or what leaves an image that opens."""

COMMANDS = (
    ("jqcow", "info", "IMAGE"),
    ("jqcow", "check", "IMAGE"),
    ("jqcow", "map", "--allow-files", "IMAGE"),
    ("jqcow", "convert", "--allow-files", "-O", "qcow2", "IMAGE", "TARGET"),
    ("jqcow", "convert", "--allow-files", "--salvage", "-O", "raw", "IMAGE", "SALVAGED"),
    ("jqcow-recover", "IMAGE"),
    ("jqcow", "snapshot", "-c", "new", "IMAGE"),
    ("jqcow", "resize", "IMAGE", "+1M"),
    ("jqcow", "check", "-r", "leaks", "IMAGE"),
    ("jqcow", "check", "-r", "all", "IMAGE"),
    ("jqcow", "check", "IMAGE"),
    ("jqcow", "undo", "IMAGE"),
)


class Chance(random.Random):
    """What the generator takes for the module ``random``: of a number, and of nothing else."""

    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        """Draw from sets too, as Python did when the generator was written."""
        known = sorted(population) if isinstance(population, set) else population
        return super().sample(known, k, counts=counts)


def make_image(generator: ModuleType, number: int, folder: Path) -> Path:
    """Have the generator make the image of a number."""
    path, chance = folder / "image.qcow2", Chance(number)
    for part in ("layout", "fuzz"):
        module: Any = sys.modules[f"{generator.__name__}.{part}"]
        module.random = chance
        module.urandom = chance.randbytes
    generator.create_image(str(path), BACKING, "raw", PARTS[number % len(PARTS)])
    return path


def load(directory: Path) -> ModuleType:
    """Return the generator of a directory, ``tests/image-fuzzer`` of QEMU."""
    if not (directory / "qcow2" / "layout.py").is_file():
        raise FileNotFoundError(f"{directory} holds no image fuzzer: qcow2/layout.py is missing")
    sys.path.insert(0, str(directory))
    try:
        return importlib.import_module("qcow2")
    finally:
        sys.path.remove(str(directory))


def handle(path: Path) -> Iterator[tuple[str, int]]:
    """Run every command on an image; yield what came of each, as a name and an exit status.

    Raises:
        AssertionError: a command took longer than it may; whatever else a command lets through.
    """
    from jqcow.cli import main, recover

    for program, *words in COMMANDS:
        names = {"IMAGE": "image.qcow2", "TARGET": "target.qcow2", "SALVAGED": "target.raw"}
        arguments = [str(path.with_name(names[word])) if word in names else word for word in words]
        for name in ("target.qcow2", "target.raw"):
            path.with_name(name).unlink(missing_ok=True)
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            code = (main if program == "jqcow" else recover).main(arguments)
        took = time.process_time() - started
        told = " ".join((program, *words))
        assert took < COMMAND_SECONDS_MAX, f"{told} took {took:.1f} s of CPU time"
        assert "Traceback" not in errors.getvalue(), f"{told}: {errors.getvalue()}"
        yield told, code


def run_some(directory: Path, first: int, count: int) -> dict[str, int]:
    """Handle images by number in this process; return how often each outcome came."""
    outcomes: Counter[str] = Counter()
    generator = load(directory)
    for number in range(first, first + count):
        with tempfile.TemporaryDirectory(prefix="jqcow-images-") as name:
            folder = Path(name)
            (folder / BACKING).write_bytes(random.Random(number).randbytes(BACKING_BYTES))
            path = make_image(generator, number, folder)
            try:
                outcomes.update(f"{told}: exit status {code}" for told, code in handle(path))
            except BaseException as error:
                error.add_note(f"image {number}")
                raise
    return outcomes


def run(directory: Path, seed: int, images: int) -> int:
    """Make and handle so many images, a few in each process; return the exit status."""
    total: Counter[str] = Counter()
    failed, peak = 0, 0
    for first in range(seed, seed + images, IMAGES_AT_ONCE):
        count = min(IMAGES_AT_ONCE, seed + images - first)
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(directory), str(first), str(count)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            failed += 1
            print(f"of the images from {first}: {done.stderr[-3000:]}", flush=True)
            continue
        told = json.loads(done.stdout)
        total.update(told["outcomes"])
        peak = max(peak, told["peak_bytes"])
        print(f"\r{first + count - seed} images", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for outcome, number in sorted(total.items()):
        print(f"{number:8,}  {outcome}")
    print(f"{images:,} images from {seed}, {failed} groups failed, at most {peak >> 20} MiB")
    return 1 if failed or peak > PEAK_BYTES_MAX else 0


def main() -> int:
    """Handle some images in this process, under its limits."""
    directory, first, count = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    outcomes = run_some(Path(directory), int(first), int(count))
    print(json.dumps({"outcomes": outcomes, "peak_bytes": peak_bytes()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
