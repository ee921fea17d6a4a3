"""What every test run shares: which kernels serve, how Hypothesis behaves, and that CI skips nothing."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Generator
from typing import TypeVar

import pytest
from hypothesis import settings

from jqcow import _native
from tests.support.loops import has_device_mapper

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

REAL_STDERR = pytest.StashKey[int]()
IN_CI = os.environ.get("CI") == "true"

# The longest test takes about a minute on a busy machine. One that hangs is ended, with every thread's stack:
# its worker is lost, the test fails, the others go on.
HANGING_SECONDS = 900

# No deadline: how long an example takes says more about the machine than about the code.
settings.register_profile("jqcow", deadline=None, print_blob=True)
settings.load_profile("jqcow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        choices=("auto", "c", "python"),
        default="auto",
        help="which kernels serve: C, their Python twins, or C where it was built (auto)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before pytest captures what goes to the standard error.
    config.stash[REAL_STDERR] = os.dup(sys.__stderr__.fileno()) if sys.__stderr__ is not None else -1
    try:
        _native.select(config.getoption("--kernels"))
    except ImportError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    stderr = item.config.stash[REAL_STDERR]
    if stderr >= 0:
        faulthandler.dump_traceback_later(HANGING_SECONDS, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_report_header() -> list[str]:
    missing = [] if has_device_mapper() else ["NO DM TARGET TESTED: this kernel has no device mapper"]
    return [f"kernels: {_native.build_info()}", *missing]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return fail_if_skipped((yield))


def fail_if_skipped(report: Report) -> Report:
    """In CI a skipped test proves nothing and would go unseen. An expected failure is no skip."""
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {reason}"
    return report
