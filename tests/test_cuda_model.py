"""The whole model of the cuda target without a GPU: its launches, run by the emulator, against the cpu target.

Rounds run launch by launch here instead of as a CUDA graph; nothing else is different.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines import cuda_memory
from engines.build import build
from engines.cuda import CudaEngine
from engines.cuda_model import CudaModel, Gpu, Options
from engines.cuda_weights import DeviceWeights
from engines.manifest import WEIGHTS, Manifest
from engines.onnxruntime import OnnxRuntimeEngine
from export.checkpoint import load_weights
from export.errors import UserError
from runtime.graph import GraphDecoder, Shape
from runtime.rounds import Decoder
from runtime.sampling import Sampler, SamplingConfig
from runtime.steering import Steering
from tests.checkpoints import random_state, tiny_config, write_checkpoint
from tests.emulator import EmulatedModule

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "vocab_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
DENSE = {"num_experts": 0, "intermediate_size": 128}
# Every token takes all experts where targets are compared: one between two experts may take the other.
ALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4}
# Of the largest value. Decoding: keys and values have 11 bits, the rest more. Prefill: activations have 11 bits too.
LOGITS_RTOL, PREFILL_MEAN = 2e-3, 5e-3


class StepwiseDecoder(GraphDecoder):
    """Without CUDA graphs; each is warmed up where it would be captured."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.warm: set[tuple[Shape, str]] = set()
        super().__init__(*args, **options)

    def launch(self, shape: Shape, part: str, place: int) -> None:
        if (shape, part) not in self.warm:
            self.warm.add((shape, part))
            self.warm_up(shape, part)
        self.enqueue(shape, part, place)

    def wait(self, shape: Shape, part: str, place: int) -> None:
        pass


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda_memory, "DEVICE", "cpu")
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls: Gpu("sm_90", 3, 227 << 10, 1 << 20)))
    monkeypatch.setattr(CudaModel, "module", lambda self, source, macros: EmulatedModule(source, macros))
    yield


Pair = tuple[OnnxRuntimeEngine, CudaEngine]


def engines(root: Path, layout: Any, options: Options | None = None, **overrides: Any) -> Pair:
    config = tiny_config(**{**SIZES, **(DENSE if overrides.pop("dense", False) else MOE), **overrides})
    written: dict[str, Any] = {"dtype": "BF16"} if layout == "float" else {}
    write_checkpoint(root / "checkpoint", config, random_state(config, 0), layout, **written)
    for target in ("cpu", "cuda"):
        build(root / "checkpoint", root / target, target)
    manifest = Manifest.read(root / "cuda")
    weights = DeviceWeights(load_weights(root / "cuda" / WEIGHTS), manifest.formats)
    model = CudaModel(manifest.config, weights, options or Options())
    return OnnxRuntimeEngine(root / "cpu", threads=1), CudaEngine.of(model, manifest)


def assert_close(out: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], rtol: float) -> None:
    difference = np.abs(out - expected)
    assert difference.max() <= rtol * np.abs(expected).max(), (difference.max(), difference.mean())


def assert_close_on_average(out: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    difference = np.abs(out - expected)
    assert difference.mean() <= PREFILL_MEAN * np.abs(expected).max(), (difference.max(), difference.mean())


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ("modelopt_mixed", {}),
        ("float", {}),
        ("modelopt_mixed", {"dense": True}),
        ("float", {"tie_word_embeddings": True}),
    ],
    ids=["mixed", "bfloat16", "dense", "tied"],
)
def test_calls_equal_those_of_the_cpu_target(on_cpu: None, tmp_path: Path, layout: Any, overrides: Any) -> None:
    experts: dict[str, Any] = {} if overrides.get("dense") else ALL_EXPERTS
    cpu, gpu = engines(tmp_path, layout, **experts, **overrides)
    for engine in (cpu, gpu):
        engine.start(128, 8)
    tokens = torch.randint(0, 24, (40,)).numpy()
    at = accepted = 0
    for rows, then in ((3, 2), (1, 1), (8, 5), (2, 2), (5, 1)):
        hidden, logits = cpu.verify(tokens[at : at + rows], at, accepted)
        found_hidden, found = gpu.verify(tokens[at : at + rows], at, accepted)
        assert_close(found_hidden, hidden, LOGITS_RTOL)
        assert_close(found, logits, LOGITS_RTOL)
        following = tokens[at + 1 : at + 1 + rows]
        expected = cpu.draft(following, hidden, at, then)
        head_hidden, draft_logits = gpu.draft(following, hidden, at, then)
        assert_close(head_hidden, expected[0], LOGITS_RTOL)
        if layout != "float":  # else drafts come from an NVFP4 copy of a bfloat16 head
            assert_close(draft_logits, expected[1], LOGITS_RTOL)
        at, accepted = at + then, then
    # A chat's next turn: prefill with rows pending, then a verify on top.
    hidden, logits = cpu.prefill(tokens[at : at + 9], at, accepted)
    found_hidden, found = gpu.prefill(tokens[at : at + 9], at, accepted)
    assert_close_on_average(found_hidden, hidden)
    assert_close_on_average(found, logits)
    after = [engine.verify(tokens[30:32], at + 9, 0)[1] for engine in (gpu, cpu)]
    assert_close_on_average(*after)


def decode(decoder: Any, prompt: list[int], count: int, mtp_k: int) -> tuple[list[int], int]:
    """Tokens, and how many of them were drafted."""
    tokens, accepted = [decoder.prefill(prompt)], 0
    while len(tokens) < count:
        emitted = decoder.round(mtp_k)[1]
        tokens += emitted
        accepted += len(emitted) - 1
    return tokens[:count], accepted


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(), SamplingConfig(temperature=1.0, top_k=12, top_p=0.9, seed=7)],
    ids=["greedy", "sampled"],
)
def test_rounds_are_lossless(on_cpu: None, tmp_path: Path, sampling: SamplingConfig) -> None:
    _, gpu = engines(tmp_path, "modelopt_mixed", Options(draft_vocab=16))
    sampler, drafted = Sampler(sampling), 0
    for _ in range(5):  # prompts, until a draft was accepted
        prompt = torch.randint(0, 24, (11,)).tolist()
        plain, _ = decode(StepwiseDecoder(gpu, 128, 0, sampler), prompt, 24, 0)
        for mtp_k in (1, 2, 4):
            tokens, accepted = decode(StepwiseDecoder(gpu, 128, mtp_k, sampler), prompt, 24, mtp_k)
            assert tokens == plain
            drafted += accepted
        if drafted:
            break
    assert drafted, "no draft was accepted: the test shows nothing"
    assert decode(Decoder(gpu, 128, 2, sampler), prompt, 24, 2)[0] == plain


def two_turns(decoder: Any, prompts: list[list[int]], count: int) -> tuple[list[int], list[list[int]], int]:
    """Two prompts, each with `count` tokens after it, to which the last round is cut -> the tokens, the drafts, and how
    many tokens were cut."""
    tokens: list[int] = []
    drafts, dropped = [], 0
    for prompt in prompts:
        end = len(tokens) + count
        tokens.append(decoder.prefill(prompt))
        while len(tokens) < end:
            drafted, emitted = decoder.round(decoder.mtp_k)
            kept = min(end - len(tokens), len(emitted))
            decoder.cut(kept)
            tokens += emitted[:kept]
            drafts.append(drafted)
            dropped += len(emitted) - kept
    assert decoder.position == sum(map(len, prompts)) + 2 * (count - 1)
    return tokens, drafts, dropped


def test_a_further_prompt_is_exact(on_cpu: None, tmp_path: Path) -> None:
    """The second turn's tokens do not depend on drafts, and its drafts are those of runtime.rounds.Decoder, so the head
    misses no row. After a reset, all of it again."""
    _, gpu = engines(tmp_path, "modelopt_mixed")
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=5))
    for _ in range(6):  # prompts, until a round went too far
        prompts = [torch.randint(0, 24, (9,)).tolist(), torch.randint(0, 24, (3,)).tolist()]
        plain, _, _ = two_turns(StepwiseDecoder(gpu, 128, 0, sampler, in_flight=1), prompts, 9)
        tokens, drafts, dropped = two_turns(Decoder(gpu, 128, 3, sampler), prompts, 9)
        decoder = StepwiseDecoder(gpu, 128, 3, sampler, in_flight=1)
        assert two_turns(decoder, prompts, 9) == (tokens, drafts, dropped) and tokens == plain
        if dropped:
            break
    assert dropped, "nothing was cut: the test shows less than it says"
    decoder.reset()
    assert two_turns(decoder, prompts, 9) == (tokens, drafts, dropped)


class NoRepeats:
    """A grammar in which no two tokens in a row leave the same rest by 3; token 0 ends it."""

    def __init__(self, rest: int = 0, is_over: bool = False) -> None:
        self.rest, self.is_over = rest, is_over

    def start(self) -> NoRepeats:
        return self.copy()

    def copy(self) -> NoRepeats:
        return NoRepeats(self.rest, self.is_over)

    def allowed(self) -> Any:
        bits = sum(1 << v for v in range(24) if v % 3 != self.rest)
        return None if self.is_over else np.asarray([bits], np.uint32)

    def push(self, token: int) -> bool:
        if not self.is_over and token % 3 == self.rest:
            return False
        self.rest, self.is_over = token % 3, self.is_over or token == 0
        return True


STEERED = SamplingConfig(
    temperature=1.0, seed=3, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, logit_bias=((5, 2.0),)
)


@pytest.mark.parametrize("grammar", [None, NoRepeats()], ids=["penalties", "grammar"])
def test_steered_rounds_are_lossless(on_cpu: None, tmp_path: Path, grammar: Any) -> None:
    """Penalties by the kernels and masks between graphs give the tokens of runtime.rounds.Decoder; so do the logprobs.
    The number of drafts changes from round to round."""
    _, gpu = engines(tmp_path, "modelopt_mixed")
    prompt = torch.randint(0, 24, (9,)).tolist()
    sampler, accepted = Sampler(STEERED), 0
    seen = []
    for kind, most, counts in (
        (Decoder, 0, [0]),
        (Decoder, 3, [3]),
        (StepwiseDecoder, 0, [0]),
        (StepwiseDecoder, 3, [3]),
        (StepwiseDecoder, 4, [0, 2, 0, 0, 4, 1]),
    ):
        options: dict[str, Any] = {"in_flight": 1} if kind is StepwiseDecoder else {}
        decoder: Any = kind(gpu, 128, most, sampler, **options)
        for _ in range(2):  # again, after a reset
            decoder.reset()
            decoder.ask(sampler, Steering(STEERED, 24, prompt, grammar), logprobs=2)
            tokens, logprobs = [decoder.prefill(prompt)], list(decoder.logprobs)
            for i in range(100):
                drafts, emitted = decoder.round(counts[i % len(counts)])
                assert len(drafts) == counts[i % len(counts)]
                tokens += emitted
                logprobs += decoder.logprobs
                accepted += len(emitted) - 1
                if len(tokens) > 20:
                    break
            assert [found.token for found in logprobs] == tokens
            seen.append((tokens[:20], logprobs[:20]))
    for tokens, logprobs in seen[1:]:
        assert tokens == seen[0][0]
        np.testing.assert_allclose([e.logprob for e in logprobs], [e.logprob for e in seen[0][1]], atol=1e-5)
    assert accepted, "no draft was accepted: the test shows nothing"
    if grammar:
        tokens = seen[0][0][: seen[0][0].index(0)] if 0 in seen[0][0] else seen[0][0]
        assert all(a % 3 != b % 3 for a, b in itertools.pairwise(tokens))


def test_rows_that_wait_for_the_head(on_cpu: None, tmp_path: Path) -> None:
    """Rounds with and without drafts in turn, cuts, a further prompt: the tokens and the head's cache are those of
    runtime.rounds.Decoder, so it misses no row. Some rows went another way into it, through prefill's float16."""
    _, gpu = engines(tmp_path, "modelopt_mixed")
    sampler = Sampler(SamplingConfig(temperature=1.0, seed=8))
    prompts = [torch.randint(0, 24, (length,)).tolist() for length in (7, 4)]
    seen = []
    for kind in (Decoder, StepwiseDecoder):
        options: dict[str, Any] = {"in_flight": 1} if kind is StepwiseDecoder else {}
        decoder: Any = kind(gpu, 128, 3, sampler, **options)
        if options:
            gpu.prefilled.buffers.rows = 4  # so that rows are run before drafts ask for them
        tokens: list[int] = []
        for prompt in prompts:
            tokens.append(decoder.prefill(prompt))
            for count in (0, 2, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0, 2, 3):
                tokens += decoder.round(count)[1][:1]
                decoder.cut(1)
        assert decoder.position == sum(map(len, prompts)) + 28
        seen.append((tokens, gpu.state()["mtp.layers.0.kv_cache"][:, :, : decoder.position - 1]))
    assert seen[0][0] == seen[1][0]
    assert (np.abs(seen[0][1]).max(axis=(0, 1, 3)) > 0).all()
    assert_close(seen[1][1], seen[0][1], 1e-2)


def test_an_eight_bit_cache_is_lossless_too(on_cpu: None, tmp_path: Path) -> None:
    _, gpu = engines(tmp_path, "modelopt_mixed", Options(fp8_cache=True))
    prompt = torch.randint(0, 24, (7,)).tolist()
    sampler = Sampler(SamplingConfig())
    plain, _ = decode(StepwiseDecoder(gpu, 128, 0, sampler), prompt, 12, 0)
    assert decode(StepwiseDecoder(gpu, 128, 3, sampler), prompt, 12, 3)[0] == plain


def test_sizes_that_kernels_cannot_take_are_refused(on_cpu: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"moe_intermediate_size: 48.*use cpu"):
        engines(tmp_path, "modelopt_mixed", moe_intermediate_size=48)


def test_rows_are_limited_by_shared_memory(on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of small blocks takes fewer drafts, says how many, and gives the same logits."""
    large = engines(tmp_path / "large", "modelopt_mixed")[1]
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls: Gpu("sm_86", 3, 42 << 10, 1 << 20)))
    small = engines(tmp_path / "small", "modelopt_mixed")[1]
    assert 1 <= small.max_rows < large.max_rows
    with pytest.raises(UserError, match=f"--mtp-k {small.max_rows}.*0 to {small.max_rows - 1}"):
        small.start(64, small.max_rows + 1)
    tokens, found = np.arange(small.max_rows), []
    for engine in (large, small):
        engine.start(64, small.max_rows)
        found.append(engine.verify(tokens, 0, 0)[1])
    assert np.array_equal(found[0], found[1])


def test_too_many_drafts_are_refused(on_cpu: None, tmp_path: Path) -> None:
    _, gpu = engines(tmp_path, "modelopt_mixed")
    with pytest.raises(UserError, match=r"--mtp-k 8.*0 to 7"):
        gpu.start(64, 9)


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_two_rooms_fit_on_a_multiprocessor_and_two_large_ones_do_not(kilobytes: int) -> None:
    """Each block takes 1 KB more than it asks for."""
    total, rooms = (kilobytes + 1) << 10, Gpu("sm_90", 3, kilobytes << 10, 1 << 20).rooms
    assert sum(rooms) + 2048 < total < 2 * (max(rooms) + 1024)
    assert max(rooms) <= kilobytes << 10
