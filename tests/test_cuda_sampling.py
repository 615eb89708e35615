"""plugins/sampling against runtime/sampling.py, and against plain models of the rest of a round.

pytest tests/test_cuda_sampling.py
"""

from __future__ import annotations

import math
import random
from ctypes import c_int
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from plugins import rms_norm
from plugins.sampling import cuda as sampling_cuda
from plugins.sampling.cuda import CONTROL_WORDS, SOURCE, SamplingKernels, defines, seed_words
from runtime.sampling import Sampler, SamplingConfig, all_gumbel, philox
from tests.backends import BACKENDS, Backend, pointer

HIDDEN = 48  # no multiple of a warp's 256
BIG = 248320  # a vocabulary that the emulator is too slow for
SEEDS = (0, 7, 2**31, 2**32 + 5, 2**64 - 1)


@pytest.fixture(autouse=True)
def fresh_random(fresh_seed: None) -> None:
    random.seed(torch.initial_seed())


both = pytest.mark.parametrize("backend", BACKENDS)


def sizes(*small: int) -> list[Any]:
    """(backend, vocabulary) to run: the big one on the GPU only."""
    values = [(backend, size) for backend in BACKENDS for size in small]
    return [pytest.param(*b.values, v, id=f"{b.id}-{v}", marks=b.marks) for b, v in [*values, (BACKENDS[1], BIG)]]


class Device:
    """One scratch for all launches, as an engine would have it."""

    def __init__(self, backend: Backend, vocab: int, rows: int = 8) -> None:
        self.backend, self.rows = backend, rows
        self.kernels = SamplingKernels(backend.module(SOURCE, defines(HIDDEN)), vocab)
        self.scratch = backend.tensor(torch.zeros(self.kernels.scratch_bytes(rows), dtype=torch.uint8))
        self.error = self.ints(0)

    def ints(self, *values: int) -> Tensor:
        return self.backend.tensor(torch.tensor(values, dtype=torch.int32))

    def sample(self, logits: Tensor, config: SamplingConfig, position: int, offset: int = 1) -> list[int]:
        """position: of row 0."""
        given, seed = self.backend.tensor(logits), self.ints(*seed_words(config.seed))
        base = self.ints(position - offset)
        outputs = [self.backend.empty((len(logits),), torch.int32) for _ in range(3)]
        addresses = (base.data_ptr(), offset, seed.data_ptr(), [t.data_ptr() for t in outputs])
        last = (self.error.data_ptr(), self.scratch.data_ptr(), self.backend.stream)
        self.kernels.sample(given.data_ptr(), len(logits), config, *addresses, *last)
        self.backend.sync()
        assert all(torch.equal(outputs[0], other) for other in outputs[1:])
        return [int(token) for token in outputs[0]]


def acceptable(logits: Tensor, config: SamplingConfig, position: int) -> set[int]:
    """The Sampler's token, and those that rounding may put in its place: masses of top_p (float32 of differences up
    to 34: 4e-6) and logarithms (some 1e-7, rounded with the score) need not agree to the bit."""
    if config.temperature == 0:
        return {Sampler(config).sample(logits.numpy(), position)}
    scaled = (logits.numpy() / np.float32(config.temperature)).astype(np.float32)
    noise, tokens = all_gumbel(config.seed, position, len(scaled)), set()
    shares = {config.top_p} if config.top_p == 1 else {min(1, config.top_p * s) for s in (1 - 1e-5, 1, 1 + 1e-5)}
    for top_p in shares:
        entries = Sampler(replace(config, top_p=top_p))._survivors(scaled)
        score = scaled[entries] + noise[entries]
        tolerance = 1e-6 + 2 * np.spacing(np.abs(score.max()))
        tokens |= set(entries[score >= score.max() - tolerance].tolist())
    return tokens


CONFIGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.3, "top_k": 4},
    {"temperature": 0.9, "top_k": 700},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.95},
    {"temperature": 2.5, "top_k": 3, "top_p": 0.5, "min_p": 0.3},
    {"temperature": 1.7, "top_k": 900, "top_p": 0.9, "min_p": 0.001},
    {"temperature": 1.0, "top_k": 10**9, "top_p": 1e-15},
]


@pytest.mark.parametrize(("backend", "vocab"), sizes(5, 33, 1000, 4096))
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_tokens_are_the_samplers(backend: Backend, vocab: int, options: dict[str, float]) -> None:
    device, unique = Device(backend, vocab), 0
    cases = [(1.0, 0.0), (3.0, 0.0), (3.0, 0.5), (0.3, 1e-3)]  # spread, step: of equal logits
    for spread, step in cases:
        config = SamplingConfig(**options, seed=random.choice(SEEDS))  # type: ignore[arg-type]
        position, logits = random.randrange(2**30), torch.randn(3, vocab) * spread
        logits = (logits / step).round() * step if step else logits
        for t, token in enumerate(device.sample(logits, config, position)):
            allowed = acceptable(logits[t], config, position + t)
            assert token in allowed, (spread, step, position, config.seed)
            unique += len(allowed) == 1
    assert unique >= 10  # of 12: the test has teeth
    assert int(device.error) == 0


@pytest.mark.parametrize(("backend", "vocab"), sizes(7, 100, 3000))
def test_random_settings(backend: Backend, vocab: int) -> None:
    device = Device(backend, vocab)
    for _ in range(4 if vocab == BIG else 50):
        config = SamplingConfig(
            temperature=random.choice([0.3, 0.7, 1.0, 4.0, 50.0]),
            top_k=random.choice([0, 1, 2, 20, random.randrange(vocab)]),
            top_p=random.choice([1.0, 0.999999, 0.95, 0.5, 0.1]),
            min_p=random.choice([0, 0.01, 0.3, 1]),
            seed=random.randrange(2**64),
        )
        step = random.choice([0, 0.1, 0.5])
        logits = torch.randn(2, vocab) * random.choice([0.01, 0.5, 3.0, 20.0]) + random.choice([0, -30, 100])
        logits = (logits / step).round() * step if step else logits
        position = random.randrange(2**30)
        for t, token in enumerate(device.sample(logits, config, position)):
            assert token in acceptable(logits[t], config, position + t), (config, step, position)


@both
def test_what_passes_the_filters(backend: Backend) -> None:
    """Few entries, so that many draws show every one that passes and none that does not."""
    device = Device(backend, 24)
    every: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.4}]
    for options in [*every, {"top_k": 9, "top_p": 0.6, "min_p": 0.1}]:
        config = SamplingConfig(temperature=1.5, seed=3, **options)
        logits = (torch.randn(24) * 2).round() / 2  # with ties
        drawn = [token for i in range(15) for token in device.sample(logits.expand(8, 24), config, 8 * i)]
        for position, token in enumerate(drawn):
            assert token in acceptable(logits, config, position)


@both
@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_k": 3}, {"top_k": 3, "top_p": 0.5}], ids=str)
def test_equal_logits_pass_from_the_lowest_index_on(backend: Backend, options: dict[str, float]) -> None:
    config = SamplingConfig(temperature=1.0, seed=5, **options)  # type: ignore[arg-type]
    for logits in (torch.zeros(8), torch.tensor([0.0, -0.0, -1.0, -0.0, 0.0, -2.0, 0.0, -0.0])):
        expected = [Sampler(config).sample(logits.numpy(), position) for position in range(16)]
        device = Device(backend, 8)
        assert [token for i in (0, 8) for token in device.sample(logits.expand(8, 8), config, i)] == expected


@pytest.mark.parametrize(("backend", "vocab"), sizes(4096))
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("equal", {"top_p": 0.9}),
        ("equal", {"top_k": 3000, "top_p": 0.6}),
        ("near", {"top_p": 0.7}),  # all in one bin, no two equal
        ("near", {"top_k": 2500}),
        ("near", {"top_k": 3500, "top_p": 0.8, "min_p": 0.999}),
        ("two", {"top_k": 2048}),  # the threshold falls into many equal ones
        ("tiny", {"top_k": 1, "top_p": 0.95, "temperature": 50.0}),  # of both signs
        ("steep", {"top_k": 30}),  # all but a few beyond the bins
        ("steep", {"top_p": 0.999999}),
        ("holes", {"top_k": 100, "top_p": 0.9}),  # -infinity here and there
        ("holes", {"temperature": 0.0}),
        ("holes", {}),
    ],
    ids=str,
)
def test_awkward_distributions(backend: Backend, vocab: int, shape: str, options: dict[str, float]) -> None:
    logits = {
        "equal": torch.full((2, vocab), 3.25),
        "near": 1000 + torch.rand(2, vocab) * 1e-2,
        "two": (torch.rand(2, vocab) > 0.1).float() * 1.5,
        "tiny": torch.randn(2, vocab) * 0.01,
        "steep": torch.randn(2, vocab) * 60,
        "holes": torch.randn(2, vocab).masked_fill(torch.rand(2, vocab) < 0.5, -math.inf),
    }[shape]
    config = SamplingConfig(**({"temperature": 0.8, "seed": 9} | options))  # type: ignore[arg-type]
    device = Device(backend, vocab)
    for t, token in enumerate(device.sample(logits, config, 77)):
        assert token in acceptable(logits[t], config, 77 + t)
    assert int(device.error) == 0


@pytest.mark.parametrize(("backend", "vocab"), sizes(1000))
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(backend: Backend, vocab: int, options: dict[str, float]) -> None:
    config, logits = SamplingConfig(**options, seed=11), torch.randn(8, vocab) * 2  # type: ignore[arg-type]
    device = Device(backend, vocab)
    together = device.sample(logits, config, 40)
    assert [device.sample(logits[t : t + 1], config, 40 + t, offset=t)[0] for t in range(8)] == together
    assert device.sample(logits[2:5], config, 42) == together[2:5]


@both
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_a_row_that_is_not_finite_is_reported(backend: Backend, options: dict[str, float]) -> None:
    config = SamplingConfig(**options, seed=2)  # type: ignore[arg-type]
    device = Device(backend, 600)
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        logits = torch.randn(3, 600)
        logits[1, slice(None) if bad == -math.inf else 555] = bad
        device.error.zero_()
        tokens = device.sample(logits, config, 5)
        assert int(device.error) != 0 and tokens[1] == 0
        for t in (0, 2):  # and nothing is left behind for the launches after
            assert tokens[t] in acceptable(logits[t], config, 5 + t)


@both
def test_noise(backend: Backend) -> None:
    vocab = 777
    kernel = backend.module(SOURCE, defines(HIDDEN)).kernel("noise_values")
    for seed in SEEDS:
        position = random.randrange(2**30)
        base = backend.tensor(torch.tensor([position], dtype=torch.int32))
        words = backend.tensor(torch.tensor(seed_words(seed), dtype=torch.int32))
        uniform, gumbel = (backend.empty((vocab,), torch.float32) for _ in range(2))
        args = [c_int(vocab), pointer(base), c_int(3), *map(pointer, (words, uniform, gumbel))]
        kernel.launch((2, 1, 1), (256, 1, 1), args, backend.stream)
        backend.sync()
        expected = uniforms(seed, position + 3, 0, vocab)
        np.testing.assert_array_equal(uniform.cpu().numpy(), expected)
        # A few ulp of each logarithm; the inner one's become absolute errors.
        exact = -np.log(-np.log(expected.astype(np.float64)))
        np.testing.assert_allclose(gumbel.cpu().numpy(), exact, rtol=3e-7, atol=3e-7)


def uniforms(seed: int, position: int, word: int, count: int) -> NDArray[np.float32]:
    counter = np.zeros((4, -(-count // 4)), np.uint64)
    counter[0], counter[1], counter[2] = np.arange(counter.shape[1]), position, word
    bits = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).T.ravel()[:count]
    return ((bits >> np.uint64(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)


@both
def test_acceptance(backend: Backend) -> None:
    device = Device(backend, 100)
    for case in range(60):
        count, simulate = case % 9, random.choice([None, None, 0.0, 0.4, 0.8, 1.0])
        seed, position = random.choice(SEEDS), random.randrange(2**30)
        sampled, drafts = ([random.randrange(2) for _ in range(count + 1)] for _ in range(2))
        if case % 2:
            drafts = sampled[: random.randrange(count + 1)] + drafts
        control = device.ints(*([position] + [99] * 4 + [0] * (CONTROL_WORDS - 5)))
        words, ins, drawn = device.ints(*seed_words(seed)), device.ints(*sampled), device.ints(*drafts)
        verify = device.ints(*[-7] * (count + 1))
        head, out = (backend.empty((count + 1,), torch.int32) for _ in range(2))
        a, b, c, d, e, f, g = (t.data_ptr() for t in (ins, drawn, words, control, verify, head, out))
        device.kernels.accept(a, b, count, c, d, e, f, g, backend.stream, simulate)
        backend.sync()

        chances = [uniforms(seed, position + 1 + i, 1, 1)[0] for i in range(count)]
        agree = [a == b for a, b in zip(sampled, drafts, strict=False)][:count]
        if simulate is not None:
            agree = [bool(chance < np.float32(simulate)) for chance in chances]
        n = [*agree, False].index(False)
        rest = count - n
        assert out.tolist() == sampled[: n + 1] + [-1] * rest
        assert head.tolist() == sampled[: n + 1] + [sampled[n]] * rest
        assert verify.tolist() == [sampled[n]] + [-7] * count
        expected = dict.fromkeys(range(CONTROL_WORDS), 0)
        expected |= dict.fromkeys((sampling_cuda.COMMIT, sampling_cuda.HEAD_ROWS, sampling_cuda.COUNT), n + 1)
        expected |= {sampling_cuda.POSITION: position + n + 1, sampling_cuda.HEAD_POSITION: position}
        expected[sampling_cuda.HEAD_LAST] = n
        assert control.tolist() == list(expected.values())


@both
@pytest.mark.parametrize("hidden", [8, HIDDEN, 2064])  # one vector, less than a block, more than a block
def test_embedding_and_head_inputs(backend: Backend, hidden: int) -> None:
    kernels = SamplingKernels(backend.module(SOURCE, defines(hidden)), 50)
    table = (torch.randn(50, hidden) * 3).bfloat16()
    tokens, states = torch.randint(50, (8,), dtype=torch.int32), torch.randn(8, hidden) * 5
    norms = torch.randn(2, hidden)
    given = [backend.tensor(tensor) for tensor in (tokens, table, norms[0], states, norms[1])]

    def run(first: int, rows: int) -> tuple[Tensor, Tensor]:
        token, embedding, one, state, two = given
        x, out = (backend.empty((rows, hidden * n), torch.float32) for n in (1, 2))
        token, state = token[first:], state[first:]
        kernels.embed(token.data_ptr(), embedding.data_ptr(), x.data_ptr(), rows, backend.stream)
        a, b, c, d, e, f = (t.data_ptr() for t in (token, embedding, one, state, two, out))
        kernels.mtp_inputs(a, b, c, d, e, f, rows, 1e-6, backend.stream)
        backend.sync()
        return x.cpu(), out.cpu()

    x, out = run(0, 8)
    torch.testing.assert_close(x, table.float()[tokens.long()], rtol=0, atol=0)
    halves = [table.double()[tokens.long()], states.double()]
    expected = [
        half * torch.rsqrt(half.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + norm.double())
        for half, norm in zip(halves, norms, strict=True)
    ]
    # rsqrt and four roundings; 1 + weight may cancel, hence atol.
    torch.testing.assert_close(out.double(), torch.cat(expected, -1), rtol=1e-6, atol=1e-6)
    reference = rms_norm.reference(states, norms[1], epsilon=1e-6)
    torch.testing.assert_close(out[:, hidden:], reference, rtol=1e-6, atol=1e-6)
    for t in range(8):
        for one, all_rows in zip(run(t, 1), (x, out), strict=True):
            assert torch.equal(one[0], all_rows[t])
