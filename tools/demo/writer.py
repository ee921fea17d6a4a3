"""The writer, as a process of its own: a line on its standard output when it begins, and for each step."""

from __future__ import annotations

import sys
from pathlib import Path

import jqcow
from demo.steps import load_steps, write_steps


def main(arguments: list[str]) -> None:
    """Make the steps of the file STEPS on the disk of IMAGE, beginning with step FIRST."""
    image_path, steps_path, first = arguments
    steps = load_steps(Path(steps_path))[int(first) :]
    with jqcow.open(image_path, "r+") as image:
        print("begun", flush=True)
        write_steps(image, steps, lambda: print("acknowledged", flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
