"""Talk to a checkpoint, through its own chat template.

    python -m runtime.chat --engines build/demo/cpu

A line is a message. Ctrl-C stops an answer; an empty line, Ctrl-D or Ctrl-C instead of a message ends. Text goes to
stdout, all else to stderr; messages may come from a pipe. A message that cannot be answered is one line on stderr, and
at the end exit status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from export.cli import Parser, progress, run, say
from export.errors import UserError
from runtime.decode import add_engine, add_request, engine_of, request_of
from runtime.rounds import PREFILL_CHUNK, Round
from runtime.session import Request, Session
from runtime.template import ChatTemplate
from runtime.tokenizer import Tokenizer


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m runtime.chat", description=__doc__.split("\n")[0])
    add_engine(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the first one")
    thinking = parser.add_mutually_exclusive_group()
    thinking.add_argument("--think", action="store_true", default=None, dest="thinking", help="answer after thinking")
    thinking.add_argument("--no-think", action="store_false", default=None, dest="thinking", help="answer at once")
    parser.add_argument(
        "--capacity", type=int, default=0, metavar="N", help="positions of the conversation (default: the engines')"
    )
    add_request(parser, max_new_tokens=1024)
    return parser.parse_args()


class Interrupt:
    """Ctrl-C while an answer is on its way: `pressed`, to be looked at between rounds; a second time as ever."""

    def __enter__(self) -> Interrupt:
        self.pressed = False
        self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _press(self, number: int, frame: object) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def check(self) -> None:
        if self.pressed:
            raise KeyboardInterrupt


def lines() -> Iterator[str]:
    """What is typed, or comes through a pipe, up to an empty line or the end."""
    if sys.stdin is None:
        raise UserError("stdin is closed; send messages through it, one a line")
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    prompt = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  # editing, and earlier lines

        prompt = "> "
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            if prompt:
                say("")
            return
        if not line.strip():
            return
        yield line.rstrip("\r")


def reply_to(session: Session, messages: list[dict[str, Any]], request: Request) -> bool:
    """Print the answer as it comes, with Ctrl-C as much of it as was said -> whether anything was. Raises UserError as
    Session.say."""
    rounds: list[Round] = []
    with Interrupt() as interrupt, contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as bar:
        updates: list[Callable[[float, float], None]] = []

        def update(done: float, total: float) -> None:
            interrupt.check()
            if total > PREFILL_CHUNK and not updates and done < total:
                updates.append(bar.enter_context(progress(f"prefill of {total:.0f} tokens")))
            for show in updates:
                show(done, total)

        for piece in session.say(messages, request, update):
            bar.close()
            rounds.append(piece.round)
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            interrupt.check()
    if not rounds:
        say("interrupted before the answer began: the message is dropped")
        return False
    sys.stdout.write("\n")
    sys.stdout.flush()
    say(statistics(session, rounds))
    return True


def statistics(session: Session, rounds: list[Round]) -> str:
    prefill, decode = rounds[0], rounds[1:]
    seconds, tokens = sum(r.seconds for r in decode), sum(len(r.tokens) for r in decode)
    count, new = len(session.prompt), len(session.prompt) - session.reused
    history = f"{count} tokens, {new} new" if session.reused else f"{count} tokens"
    if session.again:
        history += ", all prefilled again: they do not go on from the turn before"
    rate = f", {tokens / seconds:.0f} tokens/s, {tokens / len(decode):.2f} a round" if decode else ""
    return f"[prompt {history}, {prefill.seconds:.2f} s; answer {len(session.tokens) - count} tokens{rate}]"


def main() -> None:
    options = parse()
    engine = engine_of(options)
    tokenizer, template = Tokenizer(options.engines), ChatTemplate(options.engines)
    request = request_of(options, engine)
    session = Session(engine, tokenizer, template, options.mtp_k, options.capacity, options.thinking)
    messages: list[dict[str, Any]] = []
    if options.system is not None:
        messages.append({"role": "system", "content": options.system})
    session.encode([*messages, {"role": "user", "content": "hello"}])  # what is wrong with the template shows now
    refused = False
    for line in lines():
        asked = [*messages, {"role": "user", "content": line}]
        try:
            if reply_to(session, asked, request):
                messages = [*asked, session.reply()]
        except UserError as error:
            say(f"error: {error}")
            refused = True
    if refused:
        sys.exit(2)


if __name__ == "__main__":
    run(main)
