"""Interrupt a program at every point at which CPython may deliver an exception to it.

A signal handler that raises, such as that of Ctrl-C, does so between two bytecodes; and CPython looks for
signals only when a function is entered, when a call has returned, and when a loop turns back. A trace
function sees all of these. An interrupt raised there is what a signal at that moment would have done.

A trace function could also raise where no signal can, between the end of a ``with`` block and the release of
its lock, say. No code can be written to withstand that, so those points are left out: where the instruction
after a call is covered by other exception handlers than the call itself.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import jqcow

PACKAGE = str(Path(jqcow.__file__).parent)
TRACED = (f"{PACKAGE}/engine", f"{PACKAGE}/device", f"{PACKAGE}/image")
TRACED_TOO = (contextlib.__file__,)

_CALLS = {"CALL", "CALL_FUNCTION_EX", "CALL_KW"}


class Interrupted(BaseException):
    """What is raised; like KeyboardInterrupt it is no `Exception`."""


class Interrupter:
    """Runs a function and counts its points; raises `Interrupted` at point ``at``, from 1 on (0: never)."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.points = 0
        self.where = ""
        self._after_call: dict[FrameType, bool] = {}

    def run(self, function: Callable[[], object]) -> bool:
        """Call ``function``; return True if it ended in `Interrupted`."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            function()
        except Interrupted:
            return True
        finally:
            sys.settrace(before)
            self._after_call.clear()
        return False

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if event == "call":
            if not code.co_filename.startswith(TRACED) and code.co_filename not in TRACED_TOO:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            if _kind(code, frame.f_lasti) == "enter":
                self._point(frame)
        elif event == "opcode":
            after_call = self._after_call.pop(frame, False)
            kind = _kind(code, frame.f_lasti)
            if after_call or kind == "back":
                self._point(frame)
            if kind == "call":
                self._after_call[frame] = True
        else:
            self._after_call.pop(frame, None)
        return self._trace

    def _point(self, frame: FrameType) -> None:
        self.points += 1
        if self.points == self.at:
            code = frame.f_code
            self.where = f"{code.co_qualname} in {Path(code.co_filename).name}, line {frame.f_lineno}"
            raise Interrupted


@cache
def _kinds(code: CodeType) -> dict[int, str]:
    """Return which instructions end in a point (``call``) or are one (``back``, ``enter``), by offset."""
    handlers = dis._parse_exception_table(code)  # type: ignore[attr-defined]

    def covering(offset: int) -> list[int]:
        return [entry.target for entry in handlers if entry.start <= offset < entry.end]

    instructions = list(dis.get_instructions(code))
    kinds = {}
    for instruction, following in zip(instructions, [*instructions[1:], None], strict=True):
        name = instruction.opname
        if (name.startswith("JUMP_BACKWARD") and "NO_INTERRUPT" not in name) or "POP_JUMP_BACKWARD" in name:
            kinds[instruction.offset] = "back"
        elif name == "RESUME":
            # A generator into which an exception is thrown is entered elsewhere, and is no such point.
            kinds[instruction.offset] = "enter"
        elif (
            name in _CALLS
            and following is not None
            and covering(instruction.offset) == covering(following.offset)
        ):
            kinds[instruction.offset] = "call"
    return kinds


def _kind(code: CodeType, offset: int) -> str | None:
    return _kinds(code).get(offset)
