"""A file system of this machine, and a history of changes to it: each leaves a file system that is whole."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from demo.steps import BLOCK_BYTES, STEP_COUNT, Step, save_steps

MIB = 1 << 20
FILE_BYTES_MAX = MIB
SOURCES = (Path(sysconfig.get_path("stdlib")), Path("/usr/share/doc"), Path("/usr/share/perl"))
SKIPPED_DIRECTORIES = {"__pycache__", "site-packages", "dist-packages"}
# Names that debugfs takes as they are, in a list of commands.
PLAIN_NAME = re.compile(r"[\w.+-]+(/[\w.+-]+)*")

FileHashes = dict[str, str]
"""The SHA-256 of every file, by its path in the file system."""


class ToolError(Exception):
    """A tool of the machine did not do what it was asked."""


@dataclass(frozen=True)
class History:
    """A file system as it was made, on a raw disk, and the steps that change it, in a file.

    ``digests`` are those of the whole disk: entry n after n steps. ``last_hashes`` are the files at the end.
    """

    first_path: Path
    steps_path: Path
    digests: tuple[bytes, ...]
    file_count: int
    file_bytes: int
    removed_count: int
    added_count: int
    block_count: int
    last_hashes: FileHashes


def run_tool(
    *command: str | Path, accept: tuple[int, ...] = (0,), directory: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end and return what it said; any other exit status than ``accept`` raises."""
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, cwd=directory
    )
    if result.returncode not in accept:
        raise ToolError(f"{' '.join(map(str, command))}: status {result.returncode}\n{result.stderr.strip()}")
    return result


def is_clean(disk_path: Path) -> bool:
    """Return True if e2fsck, which changes nothing here, finds nothing to mend."""
    return run_tool("e2fsck", "-fn", disk_path, accept=tuple(range(256))).returncode == 0


def disk_digest(disk: bytes) -> bytes:
    """Return what tells the states of a disk apart."""
    return hashlib.sha256(disk).digest()


def make_history(directory: Path, disk_bytes: int, seed: int) -> History:
    """Make a file system that fills half the disk, and steps that replace an eighth of the disk."""
    random = Random(f"{seed}/files")
    tree, additions = directory / "tree", directory / "additions"
    sources = _source_files()
    file_bytes = _copy_files(sources, tree, disk_bytes // 2)
    if file_bytes < disk_bytes // 8 or not _copy_files(sources, additions, disk_bytes // 8):
        raise ToolError(f"{', '.join(map(str, SOURCES))}: too few files for a disk of this size")
    hashes, added_hashes = hash_tree(tree), hash_tree(additions)
    removed = random.sample(sorted(hashes), len(hashes) // 8)
    added = sorted(added_hashes)
    first_path, disk_path = directory / "first.raw", directory / "changing.raw"
    _make_ext4(tree, first_path, disk_bytes, random)
    shutil.copyfile(first_path, disk_path)
    digests = [_digest_of_clean(disk_path)]
    steps = []
    for number in range(STEP_COUNT):
        before = disk_path.read_bytes()
        _change_files(disk_path, removed[number::STEP_COUNT], additions, added[number::STEP_COUNT])
        digests.append(_digest_of_clean(disk_path))
        steps.append(Step.between(before, disk_path.read_bytes(), random))
    steps_path = directory / "steps"
    save_steps(steps, steps_path)
    last_hashes = {path: value for path, value in hashes.items() if path not in set(removed)}
    last_hashes |= {f"added/{path}": value for path, value in added_hashes.items()}
    return History(
        first_path=first_path,
        steps_path=steps_path,
        digests=tuple(digests),
        file_count=len(hashes),
        file_bytes=file_bytes,
        removed_count=len(removed),
        added_count=len(added),
        block_count=sum(len(step.blocks) for step in steps),
        last_hashes=last_hashes,
    )


def _digest_of_clean(disk_path: Path) -> bytes:
    if not is_clean(disk_path):
        raise ToolError("debugfs left a file system that e2fsck finds fault with")
    return disk_digest(disk_path.read_bytes())


def _source_files() -> Iterator[tuple[Path, str]]:
    """Yield files of the machine with the path that each gets, in an order that does not change."""
    for source in SOURCES:
        for folder, names, files in os.walk(source):
            names[:] = sorted(set(names) - SKIPPED_DIRECTORIES)
            for name in sorted(files):
                path = Path(folder, name)
                target = str(Path(source.name) / path.relative_to(source))
                if PLAIN_NAME.fullmatch(target) and _is_suitable(path):
                    yield path, target


def _is_suitable(path: Path) -> bool:
    return not path.is_symlink() and os.access(path, os.R_OK) and 0 < path.stat().st_size <= FILE_BYTES_MAX


def _copy_files(sources: Iterator[tuple[Path, str]], target: Path, limit_bytes: int) -> int:
    """Copy files until they fill ``limit_bytes``; return how many bytes they have."""
    total = filled = 0
    for path, name in sources:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        total += copy.stat().st_size
        filled += -(-copy.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES
        if filled >= limit_bytes:
            break
    return total


def _make_ext4(tree: Path, disk_path: Path, disk_bytes: int, random: Random) -> None:
    identity = f"{random.getrandbits(128):032x}"
    uuid = "-".join((identity[:8], identity[8:12], identity[12:16], identity[16:20], identity[20:]))
    options = f"hash_seed={uuid},lazy_itable_init=0,lazy_journal_init=0"
    run_tool(
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK_BYTES), "-i", "8192", "-U", uuid,
        "-E", options, "-d", tree, disk_path, f"{disk_bytes // 1024}k",
    )  # fmt: skip


def _change_files(disk_path: Path, removed: list[str], additions: Path, added: list[str]) -> None:
    """Remove and add files in a file system, without mounting it."""
    commands = [f"rm /{path}" for path in removed]
    folders = sorted({str(parent) for path in added for parent in Path(path).parents} - {"."})
    # A directory that an earlier step has made is there already: debugfs says so, and goes on.
    commands += ["mkdir /added", *(f"mkdir /added/{folder}" for folder in folders)]
    for path in added:
        folder, name = os.path.split(path)
        commands += [f"cd /added/{folder}", f"write {additions / path} {name}"]
    script = disk_path.with_suffix(".debugfs")
    script.write_text("\n".join(commands) + "\n")
    run_tool("debugfs", "-w", "-f", script, disk_path)


def hash_tree(tree: Path) -> FileHashes:
    """Return the SHA-256 of every file below a directory."""
    return {
        str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(tree.rglob("*"))
        if path.is_file()
    }


def hash_disk_files(disk_path: Path, scratch: Path) -> FileHashes:
    """Take every file out of the file system on a raw disk, and return its SHA-256."""
    scratch.mkdir()
    # The owner of a file may not be ours to set: debugfs then complains, and the content is what counts.
    run_tool("debugfs", "-R", f"rdump / {scratch}", disk_path)
    hashes = hash_tree(scratch)
    shutil.rmtree(scratch)
    return hashes
