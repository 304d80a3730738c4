"""The entry point."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line. A closed pipe (``| head``) ends it quietly, and Ctrl-C without a traceback from the start."""
    # The collector would walk modules, traces and requests again and again, and finds next to nothing. (The processes of a
    # server are started afresh, and keep their own.)
    gc.set_threshold(100_000)
    try:
        # Importing the commands takes longer than anything before it.
        from workbench.cli.app import app

        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
