"""A crash laboratory for storage code: what would a power cut, here, have left?

Put your code on a :class:`SimulatedDevice` instead of a file. Tell a model, such as a :class:`SectorModel`,
what was asked for and what was promised. The :class:`Laboratory` then cuts the power in every barrier
interval and has your judge look at each outcome. See docs/crash-laboratory.md.
"""

from jqcow.testing.changes import Allocate, Change, InFlight, Punch, Truncate, Write
from jqcow.testing.crash import (
    CrashSpace,
    CrashState,
    GarbageRule,
    content_digest,
    enumerate_states,
)
from jqcow.testing.device import SECTOR_BYTES, SimulatedDevice
from jqcow.testing.faults import EVERYTHING, Fault, FaultPlan
from jqcow.testing.faulty import FaultyDevice
from jqcow.testing.lab import CrashFailure, LabOptions, Laboratory, Workload
from jqcow.testing.model import FlushMark, Operation, SectorModel, Violation
from jqcow.testing.report import IntervalRow, LabReport, Ledger, WorkloadRow

__all__ = [
    "EVERYTHING",
    "SECTOR_BYTES",
    "Allocate",
    "Change",
    "CrashFailure",
    "CrashSpace",
    "CrashState",
    "Fault",
    "FaultPlan",
    "FaultyDevice",
    "FlushMark",
    "GarbageRule",
    "InFlight",
    "IntervalRow",
    "LabOptions",
    "LabReport",
    "Laboratory",
    "Ledger",
    "Operation",
    "Punch",
    "SectorModel",
    "SimulatedDevice",
    "Truncate",
    "Violation",
    "Workload",
    "WorkloadRow",
    "Write",
    "content_digest",
    "enumerate_states",
]
