"""What drafting is worth here: tokens per second against K, acceptance, and transformers on the same weights.

    python -m runtime.bench --engines build/demo/cpu --model demo/checkpoint

Every repeat runs every K on a prompt, then on the next, so that a noisy machine touches all of them; figures are
medians over the repeats. Decoding only: prefill is timed apart. The last line of stdout is one JSON document; `--out
FILE` keeps it, for `python -m runtime.report`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engines.manifest import NAME, WEIGHTS, Manifest
from engines.onnxruntime import OnnxRuntimeEngine
from export.cli import Parser, run, say
from export.config import read_json
from export.errors import UserError
from runtime.auto import AutoK
from runtime.bench_kinds import kinds
from runtime.decode import DEMO, summary
from runtime.rounds import Decoder, answer
from runtime.sampling import Sampler, SamplingConfig
from runtime.session import MtpK, most_drafts
from runtime.template import ChatTemplate
from runtime.tokenizer import Tokenizer

PROMPTS = Path("demo/prompts.json")
GREEDY = SamplingConfig()
# Python's standard library, which is not among the demo's data.
HELD_OUT = ("argparse", "ast", "calendar", "configparser", "csv", "queue", "textwrap", "zipfile")


def load_prompts(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    texts = _texts(path, "completions")
    if not texts:
        raise UserError(f"{path}: `completions` is empty or missing; give at least one text")
    return [tokenizer.encode(text) for text in texts]


def load_chats(path: Path, tokenizer: Tokenizer, template: ChatTemplate) -> list[list[int]]:
    """The file's `chats`, perhaps none, each as the first message of a conversation."""
    messages = [[{"role": "user", "content": text}] for text in _texts(path, "chats")]
    return [tokenizer.encode(template.render(message)) for message in messages]


def _texts(path: Path, field: str) -> list[str]:
    texts = read_json(path).get(field, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: `{field}`: expected a list of texts")
    return texts


class Bench:
    def __init__(self, engine: OnnxRuntimeEngine, prompts: list[list[int]], count: int) -> None:
        self.engine, self.prompts, self.count = engine, prompts, count
        self.stop_ids = engine.manifest.config.eos_token_id

    def decode(self, mtp_k: int, sampling: SamplingConfig, drafting: SamplingConfig | None = None) -> dict[str, Any]:
        """All prompts once: see `total`."""
        decoder = self.decoder(mtp_k, sampling, drafting)
        return self.total([self.answer(decoder, prompt, mtp_k) for prompt in self.prompts])

    def decoder(self, most: int, sampling: SamplingConfig, drafting: SamplingConfig | None = None) -> Decoder:
        """most: drafts of a round. All have the same capacity, so that the engine keeps what it has made ready."""
        drafter = Sampler(drafting) if drafting else None
        return Decoder(self.engine, max(map(len, self.prompts)) + self.count, most, Sampler(sampling), drafter)

    def answer(self, decoder: Decoder, prompt: list[int], mtp_k: int | AutoK) -> dict[str, Any]:
        """As runtime.decode's --json has it."""
        decoder.reset()
        return summary(list(answer(decoder, prompt, self.count, self.stop_ids, mtp_k=mtp_k)), decoder.mtp_k, None)

    def total(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Of an answer to each prompt: tokens/s, tokens a round, share of drafts accepted per position, the tokens."""
        emitted = sum(len(r["token_ids"]) - 1 for r in results)
        names = ("accepted_per_position", "drafted_per_position")
        counts = zip(*([map(sum, zip(*(r[name] for r in results), strict=True)) for name in names]), strict=True)
        return {
            "tokens_per_second": emitted / sum(r["decode_seconds"] for r in results),
            "tokens_per_round": emitted / sum(r["rounds"] for r in results),
            "acceptance": [accepted / drafted for accepted, drafted in counts if drafted],
            "prefill_tokens_per_second": sum(map(len, self.prompts)) / sum(r["prefill_seconds"] for r in results),
            "token_ids": [r["token_ids"] for r in results],
        }

    def text_as_context(self, modules: tuple[str, ...], mtp_k: int = 2, count: int = 300) -> list[float]:
        """`as_context` of the modules' source."""
        return self.as_context([inspect.getsource(importlib.import_module(name)) for name in modules], mtp_k, count)

    def as_context(self, texts: list[str], mtp_k: int, count: int = 300) -> list[float]:
        """Share of positions at which the first i drafts all are the main model's greedy choice, over `count` tokens
        from the middle of each of the texts.

        Every round starts from the text, so that greedy decoding's loops, easy to draft, do not flatter the head."""
        tokenizer = Tokenizer(self.engine.directory)
        shares = []
        for text in texts:
            tokens = tokenizer.encode(text)
            middle = len(tokens) // 2
            shares.append(self._follow(tokens[middle : middle + count], mtp_k))
        return [statistics.mean(column) for column in zip(*shares, strict=True)]

    def _follow(self, tokens: list[int], mtp_k: int) -> list[float]:
        decoder = Decoder(self.engine, len(tokens) + mtp_k, mtp_k, Sampler(GREEDY))
        decoder.prefill(tokens[:1])
        right = [0] * mtp_k
        for position in range(1, len(tokens)):
            # Take the text's token in place of what the last round chose; of its rows only the first is true.
            decoder.position, decoder.last, decoder.accepted = position, tokens[position], min(decoder.accepted, 1)
            decoder.head_hidden, decoder.head_tokens = decoder.head_hidden[:1], [tokens[position]]
            _, chosen = decoder.round(mtp_k)
            right = [count + (len(chosen) > i + 1) for i, count in enumerate(right)]
        return [count / (len(tokens) - 1) for count in right]


class Transformers:
    """`transformers.generate`, greedy, on the same weights in float32."""

    def __init__(self, model_directory: Path, engine: OnnxRuntimeEngine, threads: int) -> None:
        import torch
        import transformers

        from export.dequantize import dequantize

        if engine.manifest.config.model_type == "qwen3_next":
            raise UserError(f"{model_directory}: the comparison reads Qwen3.5 and Qwen3.6 only; leave --model out")
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        self.torch = torch
        config = transformers.AutoConfig.from_pretrained(model_directory).get_text_config()
        self.model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        state = dequantize(engine.directory / WEIGHTS, engine.manifest.formats)
        main = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
        missing, unexpected = self.model.load_state_dict(main, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self.model.tie_weights()

    def decode(self, prompts: list[list[int]], count: int, stop_ids: tuple[int, ...]) -> tuple[float, list[list[int]]]:
        """tokens per second without the prefill, and the tokens."""
        emitted, seconds, tokens = 0, 0.0, []
        for prompt in prompts:
            ids = self.torch.tensor([prompt])
            options = {"do_sample": False, "eos_token_id": list(stop_ids) or None, "pad_token_id": 0}
            start = time.perf_counter()
            self.model.generate(ids, max_new_tokens=1, **options)
            middle = time.perf_counter()
            out = self.model.generate(ids, max_new_tokens=count, **options)[0, len(prompt) :].tolist()
            seconds += time.perf_counter() - middle - (middle - start)
            emitted += len(out) - 1
            tokens.append(out)
        return emitted / seconds, tokens


def measure(bench: Bench, chats: list[list[int]], other: Transformers | None, repeats: int) -> dict[str, Any]:
    """chats: further prompts, of which only the acceptance is measured."""
    most = most_drafts(bench.engine, "auto")
    fixed = range(most + 1)
    ks: list[MtpK] = list(fixed)
    if bench.engine.manifest.has_mtp:
        ks.append("auto")
    runs: dict[MtpK, list[dict[str, Any]]] = {k: [] for k in ks}
    others: list[float] = []
    other_tokens: list[list[int]] = []
    some = slice(0, 4)  # transformers is slow: four prompts of each repeat
    drafting, plain_decoding = bench.decoder(most, GREEDY), bench.decoder(0, GREEDY)
    for count in fixed:  # warm up
        bench.answer(drafting, bench.prompts[0], count)
    for repeat in range(repeats):
        auto = AutoK(most)  # with nothing known
        answers: dict[MtpK, list[dict[str, Any]]] = {k: [] for k in ks}
        for prompt, k in itertools.product(bench.prompts, ks):
            answers[k].append(bench.answer(drafting if k else plain_decoding, prompt, auto if k == "auto" else k))
        for k in ks:
            runs[k].append(bench.total(answers[k]))
        if other:
            speed, other_tokens = other.decode(bench.prompts[some], bench.count, bench.stop_ids)
            others.append(speed)
        say(f"repeat {repeat + 1} of {repeats}")
    plain = runs[0][0]["token_ids"]
    assert all(r["token_ids"] == plain for k in ks for r in runs[k]), "drafts changed the text"
    result: dict[str, Any] = {"greedy": {}}
    for k in ks:
        speed = statistics.median(r["tokens_per_second"] for r in runs[k])
        ratio = statistics.median(
            r["tokens_per_second"] / z["tokens_per_second"] for r, z in zip(runs[k], runs[0], strict=True)
        )
        result["greedy"][k] = {
            "tokens_per_second": speed,
            "times_plain": ratio,
            "tokens_per_round": runs[k][0]["tokens_per_round"],
            "acceptance": runs[k][0]["acceptance"],
        }
    if "auto" in ks:
        best = max(fixed, key=lambda count: float(result["greedy"][count]["tokens_per_second"]))
        speeds = zip(runs["auto"], runs[best], strict=True)
        times_best = statistics.median(r["tokens_per_second"] / b["tokens_per_second"] for r, b in speeds)
        result["greedy"]["auto"] |= {"best_k": best, "times_best": times_best}
    result["prefill_tokens_per_second"] = statistics.median(r["prefill_tokens_per_second"] for r in runs[0])
    result["kinds"] = kinds(bench, chats, HELD_OUT) if bench.engine.manifest.has_mtp else []
    if other:
        result["transformers_tokens_per_second"] = statistics.median(others)
        result["same_text_as_transformers"] = sum(a == b for a, b in zip(plain[some], other_tokens, strict=True))
        for k in ks:
            pairs = zip(runs[k], others, strict=True)
            result["greedy"][k]["times_transformers"] = statistics.median(r["tokens_per_second"] / o for r, o in pairs)
    return result


def table(result: dict[str, Any]) -> None:
    print(f"{'K':>4} {'tokens/s':>9} {'x plain':>8} {'x transformers':>15} {'tokens/round':>13}  accepted by position")
    for k, row in result["greedy"].items():
        times = f"{row['times_transformers']:.2f}" if "times_transformers" in row else "-"
        rates = " ".join(f"{rate:.0%}" for rate in row["acceptance"]) or "-"
        print(
            f"{k:>4} {row['tokens_per_second']:>9.0f} {row['times_plain']:>8.2f} {times:>15} "
            f"{row['tokens_per_round']:>13.2f}  {rates}"
        )
    if "auto" in result["greedy"]:
        row = result["greedy"]["auto"]
        print(f"auto: {row['times_best']:.2f} times K = {row['best_k']}, the best fixed one")
    if "transformers_tokens_per_second" in result:
        print(f"transformers.generate: {result['transformers_tokens_per_second']:.0f} tokens/s")
    if "build_seconds" in result:
        print(f"export and build: {result['build_seconds']:.0f} s")
    for kind in result["kinds"]:
        print(f"{kind['kind']:<40} {' '.join(f'{rate:.0%}' for rate in kind['acceptance'])} accepted by position")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


OF_CPU = ("model", "prompts", "max_new_tokens", "repeats", "threads")
OF_GPU = ("config", "simulate_acceptance", "contexts", "profile", "draft_vocab", "fp8_cache")


def bench_cuda(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from engines.cuda_model import Gpu, Options
    from runtime import bench_cuda as cuda

    Gpu.current()
    if not 0 <= options.simulate_acceptance <= 1:
        raise UserError(f"--simulate-acceptance {options.simulate_acceptance}: expected a number from 0 to 1")
    if wrong := [context for context in options.contexts or () if context < 1]:
        raise UserError(f"--contexts {wrong[0]}: expected at least 1")
    settings = Options(fp8_cache=options.fp8_cache, draft_vocab=options.draft_vocab)
    if options.synthetic and options.config is None:
        raise UserError("--synthetic: name the config.json whose shapes to take with --config")
    try:
        if options.synthetic:
            engine = cuda.synthetic_engine(options.config, settings)
        else:
            engine = cuda.CudaEngine(options.engines, options=settings)
        return cuda.measure(engine, options.simulate_acceptance, options.contexts, options.profile)
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory does not hold the weights and the benchmark's copies") from None


def bench_cpu(options: argparse.Namespace) -> dict[str, Any]:
    for flag, value, least in (("--repeats", options.repeats, 1), ("--max-new-tokens", options.max_new_tokens, 2)):
        if value < least:
            raise UserError(f"{flag} {value}: expected at least {least}")
    engine = OnnxRuntimeEngine(options.engines, threads=options.threads)
    tokenizer, chats = Tokenizer(options.engines), []
    prompts = load_prompts(options.prompts, tokenizer)
    try:
        template = ChatTemplate(options.engines)
    except UserError as error:
        say(f"no chats among the kinds of text: {error}")
    else:
        chats = load_chats(options.prompts, tokenizer, template)
    other = Transformers(options.model, engine, options.threads) if options.model else None
    result = measure(Bench(engine, prompts, options.max_new_tokens), chats, other, options.repeats)
    if options.model:
        from engines.build import build

        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            build(options.model, Path(directory) / "engines", engine.manifest.target)
            result["build_seconds"] = time.perf_counter() - start
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "torch", "transformers")}
    result |= {"prompts": len(prompts), "max_new_tokens": options.max_new_tokens, "repeats": options.repeats}
    result |= {"hardware": f"{processor()}, {options.threads} threads", "versions": versions}
    table(result)
    return result


def write(document: dict[str, Any], path: Path) -> None:
    """As JSON, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        fresh = Path(directory) / path.name
        fresh.write_text(json.dumps(document, indent=1) + "\n")
        fresh.replace(path)


def main() -> None:
    parser = Parser(prog="python -m runtime.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--engines", type=Path, default=DEMO, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the JSON document there, for runtime.report")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="its checkpoint: also times transformers and the build"
    )
    parser.add_argument(
        "--prompts", type=Path, default=PROMPTS, metavar="FILE", help="JSON: `completions`, a list of texts"
    )
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="of both sides")
    gpu = parser.add_argument_group("on a GPU: engines of the cuda target, or --synthetic")
    gpu.add_argument("--synthetic", action="store_true", help="random weights of --config's shapes, made on the GPU")
    gpu.add_argument("--config", type=Path, metavar="FILE", help="config.json of a checkpoint, for --synthetic")
    gpu.add_argument("--simulate-acceptance", type=float, default=0.7, metavar="P", help="of each draft (default 0.7)")
    gpu.add_argument("--contexts", type=int, nargs="+", metavar="N", help="default 128 4096 32768")
    gpu.add_argument("--profile", action="store_true", help="also time every kind of launch by itself")
    gpu.add_argument("--draft-vocab", type=int, default=0, metavar="N", help="draft from the first N entries only")
    gpu.add_argument("--fp8-cache", action="store_true", help="keys and values in eight bits")
    options = parser.parse_args()
    on_gpu = options.synthetic or (
        (options.engines / NAME).is_file() and Manifest.read(options.engines).target == "cuda"
    )
    for name in OF_CPU if on_gpu else OF_GPU:
        if getattr(options, name) != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: only for a benchmark of the {'cpu' if on_gpu else 'cuda'} target; leave it out")
    if options.out:  # what cannot be written is better known before than after
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.out.is_dir():
            raise UserError(f"--out {options.out}: a directory; name a file")
    result = bench_cuda(options) if on_gpu else bench_cpu(options)
    result["command"] = shlex.join(["python", "-m", "runtime.bench", *sys.argv[1:]])
    if options.out:
        write(result, options.out)
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
