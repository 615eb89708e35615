"""The cuda target: refusals without a GPU, and with one: lossless, and the text of the cpu target.

Whole models run on the emulator too, but slowly: tests/test_cuda_model.py.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines import open_engine
from engines.build import build
from engines.manifest import Manifest
from runtime.rounds import Decoder, generate
from runtime.sampling import Sampler, SamplingConfig
from runtime.session import MtpK, Request, Session
from runtime.template import ChatTemplate
from runtime.tokenizer import Tokenizer
from tests.checkpoints import random_state, tiny_config, write_checkpoint

ROOT = Path(__file__).parents[1]
PROMPT = ROOT / "demo/prompt.txt"
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
# Prefill multiplies float16 activations: 2^-11 a product, over the layers of the demo.
LOGITS_RTOL = 2e-2


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of the demo checkpoint for both targets."""
    root = tmp_path_factory.mktemp("demo")
    for target in ("cpu", "cuda"):
        build(ROOT / "demo/checkpoint", root / target, target)
    return root


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ".", **environment}
    )


def test_without_a_gpu_it_says_so_in_one_line(demo: Path) -> None:
    assert Manifest.read(demo / "cuda").target == "cuda"
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    for command in (
        ["runtime.decode", "--engines", str(demo / "cuda"), "--prompt", "x = "],
        ["runtime.bench", "--synthetic", "--config", "demo/qwen3.6-35b-a3b.json"],
    ):
        result = run(*command, **hidden)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1 and "NVIDIA GPU" in result.stderr
        assert not result.stdout


def test_gpu_flags_are_refused_by_other_targets(demo: Path) -> None:
    result = run("runtime.decode", "--engines", str(demo / "cpu"), "--prompt", "x", "--draft-vocab", "100")
    assert result.returncode == 2 and "--draft-vocab" in result.stderr


def test_the_benchmark_refuses_flags_of_the_other_target(demo: Path) -> None:
    for arguments, flag in (
        (["--engines", str(demo / "cpu"), "--profile"], "--profile"),
        (["--synthetic", "--repeats", "3"], "--repeats"),
    ):
        result = run("runtime.bench", *arguments)
        assert result.returncode == 2 and not result.stdout
        assert result.stderr.count("\n") == 1 and flag in result.stderr


def decode(engine: Any, prompt: list[int], count: int, mtp_k: int, sampling: SamplingConfig) -> list[int]:
    rounds = generate(engine, prompt, count, mtp_k, Sampler(sampling))
    return [token for r in rounds for token in r.tokens]


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.fixture(scope="class")
    def engine(self, demo: Path) -> Any:
        return open_engine(demo / "cuda")

    @pytest.fixture(scope="class")
    def prompt(self, demo: Path) -> list[int]:
        return Tokenizer(demo / "cpu").encode(PROMPT.read_text())

    @pytest.mark.parametrize(
        "sampling",
        [
            SamplingConfig(),
            SamplingConfig(temperature=0.8, seed=3),
            SamplingConfig(temperature=1.0, top_k=20, top_p=0.95, min_p=0.01, seed=2**40 + 1),
        ],
        ids=["greedy", "sampled", "filtered"],
    )
    def test_tokens_do_not_depend_on_drafts(self, engine: Any, prompt: list[int], sampling: SamplingConfig) -> None:
        plain = decode(engine, prompt, 256, 0, sampling)
        for mtp_k in (1, 2, 3, 4, 7):
            assert decode(engine, prompt, 256, mtp_k, sampling) == plain

    def test_a_conversation_does_not_depend_on_drafts(self, engine: Any, demo: Path) -> None:
        seen = []
        for mtp_k in (0, 2, 4):
            request = Request(SamplingConfig(temperature=0.8, seed=3), 60)
            talk = Session(engine, Tokenizer(demo / "cpu"), ChatTemplate(demo / "cpu"), mtp_k, capacity=1024)
            messages: list[dict[str, Any]] = []
            for text in ("Write a function that adds two numbers.", "Now one that multiplies.", "And a class."):
                messages.append({"role": "user", "content": text})
                list(talk.say(messages, request))
                seen.append((talk.tokens, talk.reused))
                messages.append(talk.reply())
            assert talk.reused > 0
        assert seen[:3] == seen[3:6] == seen[6:]

    @pytest.mark.parametrize("kind", ["penalties", "logprobs", "json", "stop"])
    def test_steered_answers_do_not_depend_on_drafts(
        self, engine: Any, demo: Path, prompt: list[int], kind: str
    ) -> None:
        """Through CUDA graphs of changing shapes: K = 0 to 4 and by itself, each K twice."""
        from runtime.grammar import Grammars

        config = engine.manifest.config
        grammars = Grammars(demo / "cpu", config.vocab_size, config.eos_token_id)
        sampling = SamplingConfig(temperature=0.9, seed=6)
        if kind != "logprobs":
            sampling = dataclasses.replace(
                sampling, repetition_penalty=1.1, frequency_penalty=0.4, presence_penalty=0.2, logit_bias=((10, 1.0),)
            )
        request = Request(
            sampling,
            max_new_tokens=100,
            stop=("return", ") + ") if kind == "stop" else (),
            logprobs=3 if kind == "logprobs" else None,
            grammar=grammars.json_object() if kind == "json" else None,
        )
        session = Session(engine, Tokenizer(demo / "cpu"), None, mtp_k="auto", capacity=512)
        seen: list[Any] = []
        accepted = 0
        choices: tuple[MtpK, ...] = (0, 2, 4, "auto", 1, 3, 0, 2, 4, "auto")
        for mtp_k in choices:
            pieces = list(session.answer(prompt, dataclasses.replace(request, mtp_k=mtp_k), reuse=False))
            accepted += sum(piece.round.accepted for piece in pieces)
            found = [entry for piece in pieces for entry in piece.logprobs]
            assert [entry.token for entry in found] == (session.tokens[len(prompt) :] if kind == "logprobs" else [])
            seen.append((session.text, session.tokens, session.finish_reason, [entry.logprob for entry in found]))
        assert accepted, "no draft was accepted: the test shows nothing"
        for other in seen[1:]:
            assert other == seen[0]  # the bits of a row do not depend on the rows beside it

    def test_steered_text_is_that_of_the_cpu_target(self, engine: Any, demo: Path, prompt: list[int]) -> None:
        """As far as their logits tell the same story: they differ in rounding, and a token near a tie may differ."""
        sampling = SamplingConfig(repetition_penalty=1.2, frequency_penalty=0.3, logit_bias=((64, -5.0),))
        tokens = []
        for opened in (engine, open_engine(demo / "cpu")):
            session = Session(opened, Tokenizer(demo / "cpu"), None, mtp_k=2, capacity=512)
            list(session.answer(prompt, Request(sampling, 60)))
            tokens.append(session.tokens[len(prompt) :])
        same = next((i for i, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b), len(tokens[0]))
        assert same > 10, f"tokens differ from the {same}th on"

    def test_greedy_text_is_that_of_the_cpu_target(self, engine: Any, demo: Path, prompt: list[int]) -> None:
        cpu = open_engine(demo / "cpu")
        here, there = (decode(e, prompt, 256, 2, SamplingConfig()) for e in (engine, cpu))
        if here == there:
            return
        first = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
        cpu.start(1024, 1)
        logits = None
        for at in range(0, len(prompt) + first, 128):
            tokens = np.asarray([*prompt, *there[:first]][at : at + 128], np.int64)
            _, logits = cpu.prefill(tokens, at, 0)
        assert logits is not None
        gap = logits[0, there[first]] - logits[0, here[first]]
        assert 0 <= gap <= LOGITS_RTOL * np.abs(logits).max(), f"token {first} differs, and not at a near-tie: {gap}"

    def test_a_graph_does_what_the_eager_loop_does(self, engine: Any, prompt: list[int]) -> None:
        sampler = Sampler(SamplingConfig(temperature=0.7, seed=11))
        tokens = decode(engine, prompt, 64, 2, sampler.config)
        decoder = Decoder(engine, len(prompt) + 64, 2, sampler)
        eager = [decoder.prefill(prompt)]
        while len(eager) < 64:
            eager += decoder.round(2)[1]
        assert eager[:64] == tokens

    def test_rows_have_the_same_bits_in_calls_of_any_size(self, engine: Any, prompt: list[int]) -> None:
        def logits(splits: list[int]) -> np.ndarray[Any, Any]:
            engine.start(512, 8)
            at, accepted, out = 0, 0, []
            for rows in splits:
                out.append(engine.verify(np.asarray(prompt[at : at + rows], np.int64), at, accepted)[1])
                at, accepted = at + rows, rows
            return np.concatenate(out)

        alone = logits([1] * 20)
        for splits in ([2] * 10, [5, 3, 8, 4], [5, 3, 8, 4], [1, 7, 6, 6]):
            assert np.array_equal(logits(splits), alone)

    def test_draft_options_leave_the_text_alone(self, engine: Any, demo: Path, prompt: list[int]) -> None:
        plain = decode(engine, prompt, 128, 0, SamplingConfig())
        for options in ({"draft_vocab": 500}, {"draft_vocab": 4096}):
            assert decode(open_engine(demo / "cuda", **options), prompt, 128, 3, SamplingConfig()) == plain
        eight_bits = open_engine(demo / "cuda", fp8_cache=True)
        assert decode(eight_bits, prompt, 128, 3, SamplingConfig()) == decode(
            eight_bits, prompt, 128, 0, SamplingConfig()
        )

    @pytest.mark.parametrize("layout", ["modelopt_mixed", "float"])
    def test_two_thousand_tokens_of_a_random_model(self, tmp_path: Path, layout: Any) -> None:
        """Mid-size, with a bfloat16 or an NVFP4 head, across chunks of a long prompt."""
        config = tiny_config(
            hidden_size=256,
            num_hidden_layers=8,
            vocab_size=512,
            num_experts=32,
            num_experts_per_tok=8,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=64,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            max_position_embeddings=8192,
        )
        write_checkpoint(tmp_path / "checkpoint", config, random_state(config, 0), layout)
        build(tmp_path / "checkpoint", tmp_path / "cuda", "cuda")
        engine = open_engine(tmp_path / "cuda")
        prompt = torch.randint(0, 512, (2500,)).tolist()
        for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0, seed=9)):
            plain = decode(engine, prompt, 2000, 0, sampling)
            assert len(set(plain)) > 3
            for mtp_k in (1, 2, 3, 4):
                assert decode(engine, prompt, 2000, mtp_k, sampling) == plain
