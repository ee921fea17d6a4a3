"""``python -m jqcow``: the same as ``jqcow``."""

import sys

from jqcow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
