"""plugins/sampling against runtime/sampling.py, and against plain models of the rest of a round.

pytest tests/test_cuda_sampling.py
"""

from __future__ import annotations

import math
import random
from ctypes import c_int
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from plugins import rms_norm
from plugins.sampling import cuda as sampling_cuda
from plugins.sampling.cuda import CONTROL_WORDS, SOURCE, SamplingKernels, SteeringArguments, defines, seed_words
from runtime import steering
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

    def steer(self, logits: Tensor, case: Steered, first: int = 0) -> Tensor:
        move, out = self.backend.tensor, self.backend.empty(logits.shape, torch.float32)
        before, tokens = move(logits), self.ints(*case.tokens)
        tensors = [move(torch.from_numpy(array)) for array in case.packed()]
        *addresses, allowed = [t.data_ptr() for t in tensors]
        masked = case.allowed is not None
        by = SteeringArguments(*addresses, allowed if masked else 0, tensors[-1].shape[-1] if masked else 0)
        head = (before.data_ptr(), len(logits), tokens.data_ptr(), first, by)
        self.kernels.steer(*head, out.data_ptr(), self.backend.stream)
        self.backend.sync()
        assert torch.equal(before.cpu().view(torch.int32), logits.view(torch.int32))
        return out.cpu()


@dataclass
class Steered:
    """A request between two rounds. tokens: of a verify; the first is the answer's last. More may follow."""

    prompt: list[int]
    answer: list[int]
    tokens: list[int]
    penalties: tuple[float, float, float]  # repetition, presence, frequency
    bias: NDArray[np.float32]  # [V]
    allowed: NDArray[np.bool_] | None = None  # [T, V]

    def counts(self, tokens: list[int]) -> NDArray[np.int64]:
        return np.bincount(np.array(tokens, np.int64), minlength=len(self.bias))

    def packed(self) -> list[NDArray[Any]]:
        """occurrences, params, bias, allowed, as the kernel reads them."""
        occurrences = 2 * self.counts(self.answer) + (self.counts(self.prompt) > 0)
        bits = np.packbits(np.zeros((1, 1), bool) if self.allowed is None else self.allowed, axis=1, bitorder="little")
        words = np.pad(bits, ((0, 0), (0, 4 - bits.shape[1] % 4))).view("<i4")
        return [occurrences.astype(np.int32), np.array(self.penalties, np.float32), self.bias, words]

    def expected(self, logits: Tensor, first: int = 0) -> Tensor:
        """logits float32 [T, V] or of the first entries, each step rounded to float32."""
        rows, size = [], logits.shape[1]
        repetition, presence, frequency = map(np.float32, self.penalties)
        for t, row in enumerate(logits.numpy().copy()):
            count = self.counts(self.answer + self.tokens[1 : 1 + first + t])[:size]
            seen, answered = np.flatnonzero(count + self.counts(self.prompt)[:size]), np.flatnonzero(count)
            row[seen] = np.where(row[seen] > 0, row[seen] / repetition, row[seen] * repetition)
            row[answered] -= frequency * count[answered].astype(np.float32)
            row[answered] -= presence
            row += self.bias[:size]
            if self.allowed is not None:
                row[~self.allowed[t, :size]] = -1e30
            rows.append(row)
        return torch.from_numpy(np.stack(rows))


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


def some_case(vocab: int, rows: int, kept: float | None = None) -> Steered:
    """kept: the share of entries that the mask allows; None: no mask."""
    prompt, answer, tokens = ([random.randrange(vocab) for _ in range(n)] for n in (vocab // 4, vocab // 3, rows + 3))
    tokens[2:4] = tokens[1:2] * 2
    bias = np.where(np.random.default_rng(vocab).random(vocab) < 0.1, 2.5, 0).astype(np.float32)
    allowed = None if kept is None else (torch.rand(rows, vocab) < kept).numpy()
    return Steered(prompt, answer, tokens, (1.3, 0.4, 0.25), bias, allowed)


@pytest.mark.parametrize(("backend", "vocab"), sizes(24, 1001, 4096))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_steered_logits(backend: Backend, vocab: int, data: st.DataObject) -> None:
    """To the bit, also of a draft vocabulary, whose kernels read the first entries of what the model's read."""
    full = vocab + data.draw(st.sampled_from([0, 8, 45]), "entries beyond the vocabulary")
    rows, first = data.draw(st.integers(1, 5), "rows"), data.draw(st.integers(0, 3), "first")
    token = st.integers(0, full - 1) | st.integers(0, 5)
    some = st.lists(token, max_size=12)
    tokens = data.draw(st.lists(token, min_size=first + rows, max_size=first + rows + 2), "tokens")
    repetition = st.just(1.0) | st.floats(0.125, 8, width=32)
    penalty, bias = (st.just(0.0) | st.floats(-bound, bound, width=32) for bound in (2, 100))
    penalties = data.draw(st.tuples(repetition, penalty, penalty), "penalties")
    case = Steered(data.draw(some, "prompt"), data.draw(some, "answer"), tokens, penalties, np.zeros(full, np.float32))
    for entry, value in data.draw(st.dictionaries(token, bias, max_size=8), "bias").items():
        case.bias[entry] = value
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    logits, shares = torch.randn(rows, vocab, generator=generator) * 8, torch.rand(rows, full, generator=generator)
    logits[:, ::7] = logits[:, ::7].round()  # with zeros of both signs
    share = data.draw(st.sampled_from([None, 0.0, 0.1, 0.9]), "allowed")
    case.allowed = None if share is None else (shares < share).numpy()
    found, expected = Device(backend, vocab, rows=1).steer(logits, case, first), case.expected(logits, first)
    np.testing.assert_array_equal(found.numpy().view(np.int32), expected.numpy().view(np.int32))


@pytest.mark.parametrize(("backend", "vocab"), sizes(24, 1001, 4096))
@pytest.mark.parametrize("first", [0, 2])
def test_a_steered_row_does_not_depend_on_its_neighbours(backend: Backend, vocab: int, first: int) -> None:
    case, logits = some_case(vocab, 5, kept=0.5), torch.randn(5, vocab) * 3
    assert case.allowed is not None
    device = Device(backend, vocab, rows=1)
    together = device.steer(logits, case, first)
    for t in range(5):
        alone = replace(case, allowed=case.allowed[t : t + 1])
        assert torch.equal(device.steer(logits[t : t + 1], alone, first + t)[0], together[t])


@pytest.mark.parametrize(("backend", "vocab"), sizes(24, 1001))
def test_steered_logits_are_the_hosts(backend: Backend, vocab: int) -> None:
    case, logits = some_case(vocab, 5), torch.randn(5, vocab) * 3
    repetition, presence, frequency = case.penalties
    config = SamplingConfig(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple((entry, float(case.bias[entry])) for entry in case.bias.nonzero()[0].tolist()),
    )
    host = steering.Steering(config, vocab, case.prompt)
    for token in case.answer:
        host.push(token)
    np.testing.assert_array_equal(case.packed()[0], host.occurrences)
    for row, before, token in zip(Device(backend, vocab).steer(logits, case), logits, case.tokens[1:], strict=False):
        np.testing.assert_array_equal(row.numpy().view(np.int32), host.apply(before.numpy()).view(np.int32))
        host.push(token)


@both
def test_settings_that_are_off_change_nothing(backend: Backend) -> None:
    logits = torch.randn(3, 1001) * torch.logspace(-38, 37, 1001) + 0.0  # no -0.0
    case = replace(some_case(1001, 3), penalties=(1.0, 0.0, 0.0), bias=np.zeros(1001, np.float32))
    assert torch.equal(Device(backend, 1001).steer(logits, case).view(torch.int32), logits.view(torch.int32))


@pytest.mark.parametrize(("backend", "vocab"), sizes(24, 1001))
@pytest.mark.parametrize("kept", [None, 0.3, 0.01])
@pytest.mark.parametrize("options", [*CONFIGS, {"temperature": 1e-6}, {"temperature": 1e-6, "top_k": 9}], ids=str)
def test_steered_tokens_are_the_samplers(
    backend: Backend, vocab: int, kept: float | None, options: dict[str, float]
) -> None:
    """With a mask that leaves fewer entries than top_k, too."""
    config = SamplingConfig(**options, seed=random.choice(SEEDS))  # type: ignore[arg-type]
    device, case = Device(backend, vocab), some_case(vocab, 3, kept)
    if case.allowed is not None:
        case.allowed[range(3), torch.randint(vocab, (3,)).numpy()] = True
    logits, position = torch.randn(3, vocab) * 2, random.randrange(2**30)
    adjusted = case.expected(logits)
    for t, token in enumerate(device.sample(device.steer(logits, case), config, position)):
        assert token in acceptable(adjusted[t], config, position + t), (position, config.seed)
        assert case.allowed is None or case.allowed[t, token]
    assert int(device.error) == 0


@both
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_what_is_not_finite_is_reported_through_steering(backend: Backend, options: dict[str, float]) -> None:
    config = SamplingConfig(**options, seed=4)  # type: ignore[arg-type]
    device, case = Device(backend, 600), some_case(600, 3, kept=0.5)
    assert case.allowed is not None
    case.answer, case.bias[555] = [*case.answer, 555], -100
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        for allowed in (True, False):
            logits = torch.randn(3, 600)
            case.allowed[:, 555], case.allowed[:, 7] = allowed, True
            logits[1, case.allowed[1].tolist() if bad == -math.inf else 555] = bad
            steered = device.steer(logits, case)
            device.error.zero_()
            tokens = device.sample(steered, config, 5)
            is_error = allowed and bad != -math.inf  # beside -infinity the masked entries are finite
            assert (int(device.error) != 0) == is_error and (tokens[1] == 0 or not is_error)
            assert bad != -math.inf or bool((steered[1][case.allowed[1]] == bad).all())


@both
def test_tokens_of_rounds_are_counted(backend: Backend) -> None:
    device, expected = Device(backend, 30), np.arange(30) % 2
    occurrences = device.ints(*expected)
    for count in (1, 4, 32, 3, 0):
        tokens = [random.randrange(6) for _ in range(count)]
        control = device.ints(*[9] * sampling_cuda.COUNT, count, *[9] * (CONTROL_WORDS - 1 - sampling_cuda.COUNT))
        out = device.ints(*tokens, *[-1] * (32 - count))
        a, b, c = (t.data_ptr() for t in (out, control, occurrences))
        device.kernels.count(a, b, c, backend.stream)
        backend.sync()
        expected = expected + 2 * np.bincount(np.array(tokens, np.int64), minlength=30)
        assert occurrences.tolist() == expected.tolist()
