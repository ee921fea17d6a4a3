"""Mutants: jqcow with one barrier or one rule taken away, and the trial that must then break a promise.

A trial is a workload of the campaign, cut in every interval (``deep:``: with more states of each; ``root:``:
where sector 0 is in flight, with garbage in its block), a program of the simulation, or a scenario. Run as a
module it judges the jqcow that it imports, so that a patched copy can be judged in a process of its own::

    python -m tests.support.mutants TRIAL...

It exits with 1 and says what broke, or with 0 if every promise held.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

from jqcow.testing import (
    SECTOR_BYTES,
    CrashFailure,
    CrashState,
    LabOptions,
    Laboratory,
    SimulatedDevice,
    Workload,
    Write,
    enumerate_states,
)
from jqcow.testing.crash import GARBAGE_BLOCK_BYTES
from tests.support import sources
from tests.support.expectation import Expectation
from tests.support.judge import Judge
from tests.support.scenarios import DROPPING_SCENARIOS, SCENARIOS
from tests.support.simulation import Program
from tests.support.simulation import run as run_program
from tests.support.workloads import workload_named

SCENARIO = "scenario:"
DROPPING = "dropping:"
ROOT = "root:"
DEEP = "deep:"
SIMULATION = "simulation:"
BUDGET = 16
DEEP_BUDGET = 64
ROOT_BUDGET = 32
RED, GREEN = 1, 0


@dataclass(frozen=True)
class Mutant:
    """A rule, the module that keeps it, what to replace there, and the trials of which one must break.

    Each fragment of ``changes`` must stand in the module exactly once.
    """

    rule: str
    module: str
    changes: tuple[tuple[str, str], ...]
    trials: tuple[str, ...]


BARRIER_TRIALS: dict[str, tuple[str, ...]] = {
    "create.blank": ("fresh/4096/0",),
    "live.prepare": ("reopened/4096/0",),
    "live.autoclear": ("autoclear/4096/0",),
    "root.settle": ("root:root-write-fails/8192/0",),
    "flush.data": ("in-place/4096/0",),
    "flush.ordered": ("reuse/4096/0",),
    "flush.record": ("reopened/4096/0",),
    "checkpoint.homes": ("epochs/4096/0",),
    "move.range": ("move/4096/0",),
    "move.root": tuple(f"barrier-fails/4096/{seed}" for seed in (7, 3, 1)),
    "recover.settle": tuple(f"root:move-killed/8192/{seed}" for seed in range(4)),
    "recover.root": ("root:killed/8192/0",),
    "close.data": ("in-place/4096/0",),
    "close.clear": ("reopened/4096/0",),
    "close.release": ("reopened/4096/0",),
    "commit.base": ("dropping:commit",),
}

MEDIUM, JOURNAL, METADATA, SPACE, REFCOUNTS, MAPPING, STORE, DATAPATH, TURN, SNAPSHOTS = (
    f"jqcow/engine/{name}.py"
    for name in (
        "medium", "journal", "metadata", "space", "refcounts", "mapping", "store", "datapath", "turn",
        "snapshots",
    )
)  # fmt: skip

MUTANTS = (
    Mutant(
        "M1",
        MEDIUM,
        (("                self.poisoned = True\n                raise\n", "                raise\n"),),
        ("barrier-fails/4096/0", "barrier-fails/4096/1"),
    ),
    Mutant(
        "M2",
        MEDIUM,
        (
            (
                "        self.high_water = max(self.high_water, end)\n",
                "        self.high_water = self.size()\n",
            ),
        ),
        (DEEP + "move-fails-first/4096/0",),
    ),
    Mutant(
        "M3",
        SPACE,
        (("if started_before < number]", "if True]"),),
        ("overlapping/4096/0",),
    ),
    Mutant(
        "M4",
        MEDIUM,
        (("        with self._syncing:\n            self.require_healthy()\n", "        if True:\n"),),
        (SCENARIO + "flush-beside-a-failed-barrier",),
    ),
    Mutant(
        "M5",
        MEDIUM,
        (("        if padding and offset + len(buffer) > self.device.size():\n", "        if False:\n"),),
        (SIMULATION + "512/qemu/0/65536 fua:24576:1 write:27136:651 cut:6:8192 flush write:27136:768",),
    ),
    Mutant(
        "J1",
        "jqcow/ondisk/frame.py",
        (("FRAME_ALIGNMENT = 4096", "FRAME_ALIGNMENT = 512"),),
        ("epochs/8192/0",),
    ),
    Mutant(
        "J2",
        STORE,
        (
            (
                "                self.journal.revoke(self.journal.pending)\n",
                "                self.journal.accept(self.journal.pending)\n",
            ),
        ),
        ("host-fails/4096/0", "host-fails/4096/1", "host-fails/4096/2"),
    ),
    Mutant(
        "J3",
        JOURNAL,
        (
            (
                "self.extent.salt, self.epoch, self.sequence + 1)",
                "self.extent.salt, self.epoch, self.sequence + 2)",
            ),
        ),
        ("reopened/4096/0",),
    ),
    Mutant(
        "J4",
        STORE,
        (
            (
                "return [HeaderOperation(self.metadata.committed_area.data), *operations]",
                "return operations",
            ),
        ),
        ("epochs/4096/0",),
    ),
    Mutant(
        "J5",
        JOURNAL,
        (("            and payload.decoded_length <= half_bytes\n", ""),),
        ("move/4096/0",),
    ),
    Mutant(
        "J6",
        JOURNAL,
        (
            (
                "                self.medium.pwrite(bytes(FRAME_ALIGNMENT), append.offset)\n",
                "                pass\n",
            ),
        ),
        ("commit-fails-first/4096/0",),
    ),
    Mutant(
        "D1",
        METADATA,
        (
            (
                "        self._in_flight, self._staged = self._staged, Layer()\n",
                "        for offset, block in self._staged.blocks.items():\n"
                "            self.medium.pwrite(bytes(block), offset)\n"
                "        self._in_flight, self._staged = self._staged, Layer()\n",
            ),
        ),
        ("reopened/512/0",),
    ),
    Mutant(
        "D2",
        METADATA,
        (
            (
                "self.images[offset] = bytes(data)",
                "self.images.setdefault(offset, bytes(data))",
            ),
        ),
        ("reopened/4096/0",),
    ),
    Mutant(
        "D3",
        STORE,
        (("            self.metadata.roll_back()\n", "            self.metadata.finish()\n"),),
        ("host-fails/4096/0",),
    ),
    Mutant(
        "D5",
        METADATA,
        (
            (
                "return self._private if self._private is not None and self._sees_private else self._newest",
                "return self._newest",
            ),
        ),
        ("transactions/4096/0",),
    ),
    Mutant(
        "D4",
        METADATA,
        (("return [*header, *zeros, *blocks]", "return [*header, *blocks]"),),
        ("unpunchable/8192/0", "unpunchable/8192/1"),
    ),
    Mutant(
        "S1",
        SPACE,
        (("        self._staged.data.add(start, count)\n", "        self.unknown.add(start, count)\n"),),
        ("host-fails-dirty/4096/0", "transactions-dirty/4096/0"),
    ),
    Mutant(
        "S2",
        SPACE,
        (
            (
                "        waiting = [(epoch, frees.metadata)] if frees.metadata else []\n",
                "        waiting = []\n        released += list(frees.metadata)\n",
            ),
        ),
        ("reuse-tables/512/2", "reuse-tables/512/3"),
    ),
    Mutant(
        "S3",
        SPACE,
        (
            (
                "Run(*self.unknown.take(count), zero_safe=False)",
                "Run(*self.unknown.take(count), zero_safe=True)",
            ),
        ),
        ("unpunchable/4096/0",),
    ),
    Mutant(
        "S4",
        SPACE,
        (
            (
                "self.reserved.append((start, end))\n        self.frontier = max(self.frontier, end)",
                "self.reserved.append((start, end))",
            ),
        ),
        ("reopened/4096/0",),
    ),
    Mutant(
        "S5",
        SPACE,
        (
            (
                "        self._retired, self._staged = retired, Frees()\n",
                "        for run in self._transaction:\n            self.unknown.add(run.start, run.count)\n"
                "        self._staged = Frees()\n",
            ),
        ),
        ("commit-fails-first/4096/0",),
    ),
    Mutant(
        "R1",
        REFCOUNTS,
        (
            (
                "range(run.start, run.start + run.count))\n        self._raise(run.start, run.count)",
                "range(run.start, run.start + run.count))",
            ),
        ),
        ("reopened/4096/0",),
    ),
    Mutant(
        "R2",
        REFCOUNTS,
        (
            ("            if used >= 0:\n", "            if False:\n"),
            (
                "            free = _native.refcount_find_zero(data, order, position, limit)\n",
                "            free = position\n",
            ),
            (
                "            used = _native.refcount_find_used(data, order, free, limit)\n",
                "            used = -1\n",
            ),
        ),
        ("reopened/4096/0",),
    ),
    Mutant(
        "R3",
        REFCOUNTS,
        (
            (
                "            self.metadata.medium.allocate(start * cluster_bytes, count * cluster_bytes)\n",
                "            pass\n",
            ),
        ),
        (SCENARIO + "checkpoint-on-full-disk",),
    ),
    Mutant(
        "R3",
        REFCOUNTS,
        (("        self.metadata.medium.allocate(offset, run.count * cluster_bytes)\n", ""),),
        (SCENARIO + "checkpoint-on-full-disk",),
    ),
    Mutant(
        "R4",
        STORE,
        (
            (
                "            self.refcounts.stop_packing()\n            self.metadata.roll_back()\n",
                "            self.metadata.roll_back()\n",
            ),
        ),
        (
            SIMULATION
            + "4096/empty/0/65536 write:0:1 flush fail:pwrite:1:EIO:0 packed:32768:1 packed:65536:1",
        ),
    ),
    Mutant(
        "R4",
        STORE,
        (
            (
                "        self.refcounts.stop_packing()\n        self.metadata.return_to(mark[0])\n",
                "        self.metadata.return_to(mark[0])\n",
            ),
        ),
        tuple(f"compressed-undone/4096/{seed}" for seed in range(4)),
    ),
    Mutant(
        "R4",
        STORE,
        (
            (
                "        if self.metadata.in_transaction:\n            self.refcounts.stop_packing()\n",
                "",
            ),
        ),
        tuple(f"compressed-undone/4096/{seed}" for seed in range(4)),
    ),
    Mutant(
        "R4",
        REFCOUNTS,
        (("                self.stop_packing()\n", "                pass\n"),),
        tuple(f"compressed/4096/{seed}" for seed in range(4)),
    ),
    Mutant(
        "N1",
        SNAPSHOTS,
        (("                self.refcounts.share(start, count)\n", "                pass\n"),),
        ("snapshots/4096/0",),
    ),
    Mutant(
        "N1",
        SNAPSHOTS,
        (("            self.refcounts.share(table // self.geometry.cluster_bytes, 1)\n", ""),),
        ("snapshots/4096/0",),
    ),
    Mutant(
        "N1",
        SNAPSHOTS,
        (("        self._release(self.l1_of(snapshot))\n", ""),),
        ("snapshots/4096/0", "snapshots/4096/1"),
    ),
    Mutant(
        "N2",
        SNAPSHOTS,
        (
            (
                "        self._share(active)\n        self.set_copied_flags()\n",
                "        self._share(active)\n",
            ),
        ),
        ("snapshots/4096/0",),
    ),
    Mutant(
        "N2",
        SNAPSHOTS,
        (
            (
                "        self._release(self.l1_of(snapshot))\n        self.set_copied_flags()\n",
                "        self._release(self.l1_of(snapshot))\n",
            ),
        ),
        ("snapshots/4096/0", "snapshots/4096/1"),
    ),
    Mutant(
        "G1",
        MAPPING,
        (("if host % self._cluster_bytes or host < self._cluster_bytes:", "if False:"),),
        (SCENARIO + "unaligned-entry",),
    ),
    Mutant(
        "G2",
        REFCOUNTS,
        (("if cluster in self.metadata_clusters:", "if False:"),),
        (SCENARIO + "entry-into-metadata",),
    ),
    Mutant(
        "G3",
        MAPPING,
        (("if shared and refcounts.get(shared // self._cluster_bytes) == 1:", "if shared:"),),
        ("snapshots/4096/0",),
    ),
    Mutant(
        "W1",
        DATAPATH,
        (("return copied and not is_shared and (", "return not is_shared and ("),),
        (SCENARIO + "two-owners",),
    ),
    Mutant(
        "W1",
        DATAPATH,
        (("return copied and not is_shared and (", "return copied and ("),),
        (SCENARIO + "stale-copied-flag",),
    ),
    Mutant(
        "W1",
        DATAPATH,
        ((" and (fresh is None or cluster in fresh)", ""),),
        ("transactions/4096/0",),
    ),
    Mutant(
        "F1",
        STORE,
        (
            (
                "            self.refcounts.metadata_clusters = set(self.snapshots.find_metadata())\n"
                "            self._find_frontier()\n",
                "            self.refcounts.metadata_clusters = set(self.snapshots.find_metadata())\n"
                "            self._find_frontier()\n"
                "            self.refcounts.start_search(self.space.frontier)\n",
            ),
        ),
        ("repair/4096/0", "repair/4096/1", "repair-snapshots/4096/0"),
    ),
    Mutant(
        "W2",
        DATAPATH,
        (
            (
                "            return self._backing_reads_as_zeros(guest_end - guest_start, guest_start)\n",
                "            return True\n",
            ),
        ),
        ("overlay/4096/0", "overlay-reuse/4096/0", "copy-on-read/4096/0"),
    ),
    Mutant(
        "W2",
        DATAPATH,
        (("        self.store.metadata.require_order()\n        whole", "        whole"),),
        ("reuse/4096/0",),
    ),
    Mutant(
        "W2",
        DATAPATH,
        (
            (
                "            self.store.metadata.require_order()\n            host = ",
                "            host = ",
            ),
        ),
        ("compressed-new/4096/0",),
    ),
    Mutant(
        "W3",
        DATAPATH,
        (
            (
                "self.read_into(memoryview(whole)[edge - guest_start : edge_end - guest_start], edge)",
                "pass",
            ),
        ),
        ("snapshots-cow/4096/0",),
    ),
    Mutant(
        "W3",
        DATAPATH,
        (
            (
                "self.medium.pwrite(whole, host_start)",
                "self.medium.pwrite(part, host_start + start - guest_start)",
            ),
        ),
        ("unpunchable/4096/0",),
    ),
    Mutant(
        "W4",
        DATAPATH,
        (
            (
                "            self._write_run(piece, data, cluster, run)\n            self._map_run",
                "            self._late.append((piece, data, cluster, run))\n            self._map_run",
            ),
            (
                "        with self.store.operation():\n            self._write_pieces(pieces, data, offset)",
                "        self._late = []\n"
                "        with self.store.operation():\n            self._write_pieces(pieces, data, offset)\n"
                "        with self.store.operation():\n"
                "            for late in self._late:\n                self._write_run(*late)",
            ),
        ),
        tuple(f"host-fails-dirty/4096/{seed}" for seed in range(4)),
    ),
    Mutant("T1", STORE, (("        if layer.ordered:\n", "        if False:\n"),), ("reuse/4096/0",)),
    Mutant(
        "T1",
        STORE,
        (("        commit.layer.ordered |= commit.of_transaction\n", ""),),
        ("transactions-new/4096/0",),
    ),
    Mutant(
        "T2",
        STORE,
        (('self.medium.barrier("flush.record", unlocked=True)', "pass"),),
        ("reopened/4096/0",),
    ),
    Mutant(
        "T3",
        STORE,
        (
            (
                "        commit.layer = self.metadata.cut()\n",
                "        commit.layer = self.metadata.cut()\n"
                "        for offset, block in commit.layer.blocks.items():\n"
                "            self.medium.pwrite(bytes(block), offset)\n",
            ),
        ),
        ("reopened/512/0", "reopened/512/1"),
    ),
    Mutant("T4", STORE, (("        self._write_homes()\n", ""),), ("reopened/4096/0",)),
    Mutant(
        "T5",
        STORE,
        (("if self._root_copy_serves(scan.extent):", "if True:"),),
        ("root:half-moved/8192/0",),
    ),
    Mutant(
        "T6",
        STORE,
        (("                self._write_root(before)\n", "                pass\n"),),
        ("going-live-fails/4096/0", "going-live-fails/4096/1"),
    ),
    Mutant(
        "T7",
        STORE,
        (("self.medium.shrink(used_bytes)", "self.medium.shrink(extent.offset)"),),
        ("reopened/4096/0",),
    ),
    Mutant(
        "C1",
        TURN,
        (
            ("        self.taken = threading.RLock()\n", "        self.taken = contextlib.nullcontext()\n"),
            ("import threading\n", "import contextlib\nimport threading\n"),
        ),
        (SCENARIO + "checkpoint-while-flushing",),
    ),
    Mutant(
        "C2",
        STORE,
        (("            ticket = self.turn.changes\n", "            ticket = 0\n"),),
        ("reopened/4096/0",),
    ),
    Mutant(
        "T8",
        JOURNAL,
        (
            (
                "self.position + payload.frame_length <= half_bytes",
                "self.position + payload.frame_length <= self.extent.length",
            ),
        ),
        ("epochs/4096/0",),
    ),
)


@dataclass(frozen=True)
class _Garbled:
    """A crash state with garbage in the block of sector 0."""

    state: CrashState

    def content(self) -> bytes:
        return (
            Random(self.state.spec).randbytes(GARBAGE_BLOCK_BYTES)
            + self.state.content()[GARBAGE_BLOCK_BYTES:]
        )

    def data_sectors(self) -> set[int]:
        return self.state.data_sectors() | set(range(GARBAGE_BLOCK_BYTES // SECTOR_BYTES))


def garble_sector_0(workload: Workload[Expectation], drop_barriers: tuple[str, ...] = ()) -> None:
    """Cut a workload wherever sector 0 is in flight: every state of all else, with garbage in its block."""
    device, expectation = workload.make_device(), workload.make_model()
    device.drop_barriers.update(drop_barriers)
    judge = Judge()
    failures: list[Exception] = []

    def cut(name: str, device: SimulatedDevice) -> None:
        if failures or not any(isinstance(change, Write) and not change.offset for change in device.changes):
            return
        for state in enumerate_states(device, budget=ROOT_BUDGET):
            try:
                judge(device.crash(_Garbled(state)), expectation.copy(), state)
            except Exception as error:
                # Kept back: within a barrier the engine would take it for an error of the host.
                failures.append(error)
                return

    device.barrier_listeners.append(cut)
    workload.run(device, expectation)
    if failures:
        raise failures[0]


def judge_trial(trial: str, drop_barriers: tuple[str, ...] = ()) -> str | None:
    """Run a trial. Returns what broke, None if every promise held."""
    if trial.startswith(DROPPING):
        scenario = DROPPING_SCENARIOS[trial.removeprefix(DROPPING)]

        def action() -> None:
            scenario(drop_barriers)

    elif trial.startswith(SCENARIO):
        action = SCENARIOS[trial.removeprefix(SCENARIO)]
    elif trial.startswith(SIMULATION):
        program = Program.parse(trial.removeprefix(SIMULATION))

        def action() -> None:
            run_program(program)

    elif trial.startswith(ROOT):
        workload = workload_named(trial.removeprefix(ROOT))

        def action() -> None:
            garble_sector_0(workload, drop_barriers)

    else:
        budget = DEEP_BUDGET if trial.startswith(DEEP) else BUDGET
        laboratory = Laboratory(Judge(), options=LabOptions(budget=budget, seed=1))
        workload = workload_named(trial.removeprefix(DEEP))

        def action() -> None:
            laboratory.run(workload, drop_barriers=drop_barriers)

    try:
        action()
    except CrashFailure as failure:
        return str(failure)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def patched_copy(mutant: Mutant, folder: Path) -> None:
    """Copy jqcow into a folder, with the mutant's changes."""
    shutil.copytree(sources.PACKAGE, folder / "jqcow", ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / mutant.module
    text = module.read_text(encoding="utf-8")
    for fragment, replacement in mutant.changes:
        assert text.count(fragment) == 1, f"{mutant.module} must hold once:\n{fragment}"
        text = text.replace(fragment, replacement)
    module.write_text(text, encoding="utf-8")


def main() -> int:
    """Judge the trials named on the command line."""
    for trial in sys.argv[1:]:
        broken = judge_trial(trial)
        if broken is not None:
            print(f"{trial}: {broken}")
            return RED
    return GREEN


if __name__ == "__main__":
    sys.exit(main())
