"""The errors of the test cluster, and how a command of it ends on one.

Why it exists: whoever runs `make demo` or `make test` on a machine that lacks something must read
one sentence that says what is missing and what to do, not a traceback. It must not hide anything
else: an error that is not one of these keeps its traceback, because then the harness itself is
wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class ClusterError(Exception):
    """Something of the test cluster failed; the text says what, and what to do. Exit code 1."""

    exit_code = 1


class MissingError(ClusterError):
    """This machine lacks something that the harness cannot install by itself. Exit code 2."""

    exit_code = 2


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and leave with its exit code; a ClusterError becomes one message.

    An interrupt from the keyboard ends with 130, as shells expect.
    """
    try:
        code = main() or 0
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
