"""What every command shares: errors as one line with status 2, and progress as a bar or as lines.

run(main)        # in a module's `if __name__ == "__main__"`
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from export.errors import UserError


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a UserError, like everything else that the user can mend."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the arguments")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command: a UserError, or a file that cannot be read or written, is one line and status 2."""
    try:
        if sys.stdout is None:
            raise UserError("stdout is closed; send it to a file or to /dev/null")
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
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
    except MemoryError as error:
        print(f"error: not enough memory ({error}); ask for fewer tokens", file=sys.stderr)
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
