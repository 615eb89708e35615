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
from typing import TYPE_CHECKING, Any, TextIO

from engines import Engine, open_engine
from export.cli import Parser, progress, run, say
from export.errors import UserError
from runtime.rounds import PREFILL_CHUNK, Round, check_request
from runtime.sampling import SamplingConfig
from runtime.session import MtpK, Request, Session, most_drafts
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtime.grammar import Grammar

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


def mtp_k(text: str) -> MtpK:
    """--mtp-k's value."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer or auto") from None


def logit_bias(text: str) -> tuple[tuple[int, float], ...]:
    """--logit-bias's value: "ID:BIAS,ID:BIAS"."""
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return tuple((int(token), float(bias)) for token, bias in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ID:BIAS,ID:BIAS") from None


def add_mtp_k(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mtp-k", type=mtp_k, default=2, metavar="K", help="drafts per round, 0: none, or auto (default 2)"
    )


def add_request(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How tokens are found and where an answer ends: --mtp-k, and the flags of `request_of`."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    add_mtp_k(parser)
    kinds = {"int": int, "float": float}
    for field in dataclasses.fields(SamplingConfig):
        flag = "--" + field.name.replace("_", "-")
        if field.type in kinds:
            kind = kinds[str(field.type)]
            parser.add_argument(flag, type=kind, default=field.default, metavar="X", help=f"default {field.default}")
    parser.add_argument("--logit-bias", type=logit_bias, default=(), metavar="ID:BIAS,…", help="added to these logits")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    json_format = parser.add_mutually_exclusive_group()
    json_format.add_argument("--json-object", action="store_true", help="answer with a JSON object")
    json_format.add_argument("--json-schema", type=Path, metavar="FILE", help="answer with JSON of this schema")


def grammar_of(options: argparse.Namespace, engine: Engine) -> Grammar:
    from runtime.grammar import Grammars  # brings a library that other answers do without

    flag, config = "--json-schema" if options.json_schema else "--json-object", engine.manifest.config
    if not (options.engines / "tokenizer.json").is_file():
        raise UserError(f"{flag}: {options.engines} has no tokenizer.json, so there is no text to be JSON")
    try:
        schema = options.json_schema.read_text(encoding="utf-8-sig") if options.json_schema else None
    except UnicodeDecodeError as error:
        raise UserError(f"{options.json_schema}: not UTF-8 text ({error.reason}); convert it") from None
    grammars = Grammars(options.engines, config.vocab_size, config.eos_token_id)
    if schema is None:
        return grammars.json_object()
    try:
        return grammars.json_schema(schema)
    except UserError as error:
        raise UserError(f"{options.json_schema}: {error}") from None


def request_of(options: argparse.Namespace, engine: Engine, **more: Any) -> Request:
    """more: fields of Request."""
    sampling = SamplingConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingConfig)})
    grammar = None
    if options.json_object or options.json_schema:
        grammar = grammar_of(options, engine)
    return Request(sampling, options.max_new_tokens, stop=tuple(options.stop), grammar=grammar, **more)


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m runtime.decode", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", type=Path, metavar="FILE")
    source.add_argument("--token-ids", metavar="IDS", help='the prompt as token ids, "1 2 3"; needs no tokenizer')
    add_request(parser, max_new_tokens=128)
    parser.add_argument("--ignore-eos", action="store_true", help="go on after a stop id")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: of each token, and its N alternatives")
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


def summary(rounds: list[Round], most: int, text: str | None) -> dict[str, Any]:
    """What --json prints. The prefill round emits a token but counts neither as a round nor as decoding time.
    most: drafts of a round."""
    prefill, decode = rounds[0], rounds[1:]
    seconds = sum(r.seconds for r in decode)
    emitted = sum(len(r.tokens) for r in decode)
    result: dict[str, Any] = {
        "token_ids": [token for r in rounds for token in r.tokens],
        "text": text,
        "rounds": len(decode),
        "drafted": sum(len(r.drafts) for r in decode),
        "accepted": sum(r.accepted for r in decode),
        "accepted_per_position": [sum(r.accepted > i for r in decode) for i in range(most)],
        "drafted_per_position": [sum(len(r.drafts) > i for r in decode) for i in range(most)],
        "tokens_per_round": emitted / len(decode) if decode else 0.0,
        "prefill_seconds": prefill.seconds,
        "decode_seconds": seconds,
        "tokens_per_second": emitted / seconds if seconds else 0.0,
    }
    if prefill.logprobs:
        result["logprobs"] = [entry._asdict() for r in rounds for entry in r.logprobs]
    return result


def report(result: dict[str, Any], prompt_tokens: int) -> None:
    pairs = zip(result["accepted_per_position"], result["drafted_per_position"], strict=True)
    rates = [f"{accepted / offered:.0%}" for accepted, offered in pairs if offered]
    say(f"prompt   {prompt_tokens} tokens, {prompt_tokens / result['prefill_seconds']:.0f} tokens/s")
    say(
        f"decode   {len(result['token_ids'])} tokens, {result['tokens_per_second']:.0f} tokens/s, "
        f"{result['tokens_per_round']:.2f} tokens a round"
    )
    if rates:
        say(f"accepted {', '.join(rates)} at draft position {', '.join(str(i + 1) for i in range(len(rates)))}")


def decode(session: Session, prompt: list[int], request: Request, trace: TextIO | None) -> Iterator[tuple[str, Round]]:
    """The text of every round, and the round."""
    long = progress(f"prefill of {len(prompt)} tokens") if len(prompt) > PREFILL_CHUNK else contextlib.nullcontext()
    with long as update:
        pieces = session.answer(prompt, request, update)
        first = next(pieces)
    for piece in itertools.chain([first], pieces):
        if trace and piece is not first:
            keys = ("position", "drafts", "accepted", "tokens")
            print(json.dumps({key: getattr(piece.round, key) for key in keys}), file=trace, flush=True)
        words = "".join(f"{token} " for token in piece.round.tokens)
        yield piece.text if session.tokenizer else words, piece.round


def main() -> None:
    options = parse()
    engine = engine_of(options)
    # With --token-ids a tokenizer is welcome, for the text, and not needed.
    has_tokenizer = options.token_ids is None or (options.engines / "tokenizer.json").is_file()
    tokenizer = Tokenizer(options.engines) if has_tokenizer else None
    if options.stop and not tokenizer:
        raise UserError(f"--stop: {options.engines} has no tokenizer.json, so there is no text to look in")
    prompt = read_prompt(options, tokenizer)
    if options.logprobs is not None and not options.json:
        raise UserError("--logprobs: they are part of what --json prints; add it")
    if options.ignore_eos and (options.json_object or options.json_schema):
        raise UserError("--ignore-eos: after its end an answer is not JSON any more; leave one of them out")
    request = request_of(options, engine, logprobs=options.logprobs, ignore_stop_ids=options.ignore_eos)
    most = most_drafts(engine, options.mtp_k)
    check_request(engine, prompt, options.max_new_tokens, most)
    changes = request.sampling.steers or request.grammar or request.logprobs is not None or options.mtp_k == "auto"
    capacity = len(prompt) + options.max_new_tokens
    session = Session(engine, tokenizer, None, options.mtp_k, capacity, continued=bool(changes))
    trace = open_trace(options) if options.trace else None
    rounds: list[Round] = []
    for text, r in decode(session, prompt, request, trace):
        rounds.append(r)
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    result = summary(rounds, most, session.text if tokenizer else None)
    report(result, len(prompt))
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run(main)
