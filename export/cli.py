"""What every command shares: errors as one line with status 2, and progress as a bar or as lines.

run(main)        # in a module's `if __name__ == "__main__"`
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from export.errors import UserError


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command: a UserError, or a file that cannot be read or written, is one line and status 2."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        sys.exit(141)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror}; check the path and the space", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def say(line: str) -> None:
    """A line for the person at the terminal; stdout belongs to results."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[float, float], None]]:
    """Yields `update(done, total)`. On a terminal a bar on stderr, elsewhere one line at the end."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        say(f"{label}: done")
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
