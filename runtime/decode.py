"""Decode text: the head drafts K tokens, the main model verifies them, the text is that of plain decoding.

    python -m runtime.decode --prompt "def main():" --mtp-k 2

The text streams to stdout, statistics go to stderr. `--json` ends stdout with one JSON object; `--trace FILE` writes
one JSON line per round. Without --engines, the demo's engines are used (`make demo` builds them).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from engines import Engine, open_engine
from export.bindings import GRAPHS
from export.cli import Parser, progress, run, say
from export.errors import UserError
from runtime.rounds import PREFILL_CHUNK, Round, check_request, generate
from runtime.sampling import Sampler, SamplingConfig
from runtime.tokenizer import Tokenizer

DEMO = Path("build/demo/cpu")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The flags of `engine_of`."""
    parser.add_argument("--engines", type=Path, default=DEMO, metavar="DIR", help=f"engine directory (default {DEMO})")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: one per core)")
    parser.add_argument(
        "--draft-vocab", type=int, default=0, metavar="N", help="GPU: draft from the first N entries only"
    )
    parser.add_argument("--fp8-cache", action="store_true", help="GPU: keys and values in eight bits")


def engine_of(options: argparse.Namespace) -> Engine:
    if options.engines == DEMO and not DEMO.exists():
        raise UserError(f"{DEMO}: the demo's engines are not built; run `make demo`, or name others with --engines")
    return open_engine(options.engines, options.threads, draft_vocab=options.draft_vocab, fp8_cache=options.fp8_cache)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are found: --mtp-k, and the flags of `sampler_of`."""
    parser.add_argument("--mtp-k", type=int, default=2, metavar="K", help="drafts per round, 0: none (default 2)")
    for field in dataclasses.fields(SamplingConfig):
        kind = int if field.type == "int" else float
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=field.default, metavar="X", help=f"default {field.default}")


def sampler_of(options: argparse.Namespace) -> Sampler:
    return Sampler(SamplingConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingConfig)}))


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m runtime.decode", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", type=Path, metavar="FILE")
    source.add_argument("--token-ids", metavar="IDS", help='the prompt as token ids, "1 2 3"; needs no tokenizer')
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    add_sampling(parser)
    parser.add_argument("--ignore-eos", action="store_true", help="go on after a stop id")
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write one JSON line per round")
    return parser.parse_args()


def read_prompt(options: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    if options.token_ids is not None:
        words = options.token_ids.replace(",", " ").split()
        if wrong := [word for word in words if not re.fullmatch(r"-?[0-9]{1,18}", word)]:
            raise UserError(f"--token-ids: {wrong[0]!r} is no token id; expected integers")
        return [int(word) for word in words]
    text = options.prompt
    if text is None:
        try:
            text = options.prompt_file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{options.prompt_file}: not UTF-8 text ({error.reason}); convert it") from None
    assert tokenizer is not None
    return tokenizer.encode(text)


def open_trace(options: argparse.Namespace) -> TextIO:
    """The trace file, opened before anything is decoded; never one of the files that are read."""
    path = options.trace.resolve()
    if path.is_relative_to(options.engines.resolve()) or (
        options.prompt_file and path == options.prompt_file.resolve()
    ):
        raise UserError(f"--trace {options.trace}: would overwrite what is read; choose another file")
    return options.trace.open("w")


def summary(rounds: list[Round], mtp_k: int, text: str | None) -> dict[str, Any]:
    """What --json prints. The prefill round emits a token but counts neither as a round nor as decoding time."""
    prefill, decode = rounds[0], rounds[1:]
    seconds = sum(r.seconds for r in decode)
    emitted = sum(len(r.tokens) for r in decode)
    return {
        "token_ids": [token for r in rounds for token in r.tokens],
        "text": text,
        "rounds": len(decode),
        "drafted": sum(len(r.drafts) for r in decode),
        "accepted": sum(r.accepted for r in decode),
        "accepted_per_position": [sum(r.accepted > i for r in decode) for i in range(mtp_k)],
        "tokens_per_round": emitted / len(decode) if decode else 0.0,
        "prefill_seconds": prefill.seconds,
        "decode_seconds": seconds,
        "tokens_per_second": emitted / seconds if seconds else 0.0,
    }


def report(result: dict[str, Any], prompt_tokens: int, rounds: list[Round]) -> None:
    drafted = [sum(len(r.drafts) > i for r in rounds) for i in range(len(result["accepted_per_position"]))]
    pairs = zip(result["accepted_per_position"], drafted, strict=True)
    rates = [f"{accepted / offered:.0%}" for accepted, offered in pairs if offered]
    say(f"prompt   {prompt_tokens} tokens, {prompt_tokens / result['prefill_seconds']:.0f} tokens/s")
    say(
        f"decode   {len(result['token_ids'])} tokens, {result['tokens_per_second']:.0f} tokens/s, "
        f"{result['tokens_per_round']:.2f} tokens a round"
    )
    if rates:
        say(f"accepted {', '.join(rates)} at draft position {', '.join(str(i + 1) for i in range(len(rates)))}")


def main() -> None:
    options = parse()
    sampler, engine = sampler_of(options), engine_of(options)
    # With --token-ids a tokenizer is welcome, for the text, and not needed.
    has_tokenizer = options.token_ids is None or (options.engines / "tokenizer.json").is_file()
    tokenizer = Tokenizer(options.engines) if has_tokenizer else None
    prompt = read_prompt(options, tokenizer)
    check_request(engine, prompt, options.max_new_tokens, options.mtp_k)
    engine.load(*GRAPHS[: 4 if options.mtp_k else 2])
    config = engine.manifest.config
    stop_ids = () if options.ignore_eos else config.eos_token_id
    rounds: list[Round] = []
    trace = open_trace(options) if options.trace else None

    def tokens(update: Any) -> Iterator[int]:
        for r in generate(engine, prompt, options.max_new_tokens, options.mtp_k, sampler, stop_ids, update):
            rounds.append(r)
            if trace and len(rounds) > 1:
                keys = ("position", "drafts", "accepted", "tokens")
                print(json.dumps({key: getattr(r, key) for key in keys}), file=trace, flush=True)
            yield from r.tokens

    long = progress(f"prefill of {len(prompt)} tokens") if len(prompt) > PREFILL_CHUNK else contextlib.nullcontext()
    with long as update:
        stream = tokens(update)
        first = next(stream)
    stream = itertools.chain([first], stream)
    pieces: list[str] = []
    for piece in tokenizer.stream(prompt, stream) if tokenizer else (f"{token} " for token in stream):
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    result = summary(rounds, options.mtp_k, "".join(pieces) if tokenizer else None)
    report(result, len(prompt), rounds)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run(main)
