"""The Gated DeltaNet mixer on a GPU (or emulated) against its reference in float64.

A conversation of rounds: the test writes raw rows into the ring as the projections would, accepts some, goes on. The
ring begins as NaN: what a kernel reads of it must have been written. Tolerance 1e-5 of the largest value, the op's
own: a recurrence in float32 over sums of Dk products. Prefill's y is float16 (2^-11), relative to the norm of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from plugins.gated_delta_net import prefill_reference, verify_reference
from plugins.gated_delta_net.cuda import RING, SOURCE, GatedDeltaNet, Memory, Sizes, Weights
from tests.backends import BACKENDS, Backend

RTOL = 1e-5
EPSILON = 1e-6
UNIT_GATE = 1.2784645427610738  # silu of this is 1

DIMS = [(1, 2, 16, 16), (2, 6, 32, 16), (1, 3, 48, 32), (2, 4, 64, 64)]
REAL = (16, 32, 128, 128)


def cases() -> Iterator[Any]:
    for backend in BACKENDS:
        on_gpu = backend.id == "gpu"
        for dims in [*DIMS, REAL if on_gpu else (1, 1, 128, 128)]:
            name = "x".join(map(str, dims))
            yield pytest.param(*backend.values, Sizes(*dims), id=f"{backend.id}-{name}", marks=backend.marks)


def assert_close(out: torch.Tensor, expected: torch.Tensor, rtol: float = RTOL) -> None:
    error = (out.cpu().double() - expected).abs().max() / expected.abs().max()
    assert error <= rtol, f"max|out - reference| / max|reference| = {error:.3g}"


class Chat:
    """One layer on a device, and beside it the reference's states in float64. Rows before `position` are random."""

    def __init__(self, backend: Backend, sizes: Sizes, position: int = 0) -> None:
        self.backend, self.sizes, self.position, self.pending = backend, sizes, position, 0
        self.mixer = GatedDeltaNet(backend.module(SOURCE, sizes.macros()), sizes)
        self.channels = sizes.z_offset
        heads, k_dim, v_dim = sizes.num_v_heads, sizes.head_k_dim, sizes.head_v_dim
        self.weights = [
            torch.randn(self.channels, 4),
            torch.empty(heads).uniform_(-3, 2.7),  # A up to about 15, as trained
            torch.empty(heads).uniform_(-5, 1),
            torch.randn(v_dim),
        ]
        self.state = torch.randn(heads, k_dim, v_dim).double()
        self.conv_state = torch.zeros(3, self.channels).double()
        self.forget_window()
        self.ring = backend.empty((RING, sizes.row_stride), torch.float32)
        for back in range(1, min(3, position) + 1):
            row = torch.randn(self.channels)
            self.conv_state[3 - back] = row.double()
            self.ring[(position - back) % RING, : self.channels] = row.to(backend.device)
        self.device_weights = [backend.tensor(weight) for weight in self.weights]
        self.device_state = backend.tensor(self.state.float())
        self.state = self.device_state.cpu().double()

    def forget_window(self) -> None:
        sizes = self.sizes
        widths = (self.channels, sizes.key_width, sizes.value_width, sizes.num_v_heads, sizes.num_v_heads)
        self.window: list[torch.Tensor] = [torch.zeros(0, width).double() for width in widths]

    def rows(self, count: int) -> torch.Tensor:
        """Raw rows [count, row_stride], NaN behind the last column; gates now and then far outside the usual."""
        rows = torch.randn(count, self.sizes.row_stride)
        rows[:, : self.channels] *= torch.randn(count, 1).exp()
        gates = rows[:, self.sizes.b_offset :]
        gates *= 1 + 30 * (torch.rand_like(gates) < 0.1)
        rows[:, self.sizes.a_offset + self.sizes.num_v_heads :] = float("nan")
        return rows

    def write(self, rows: torch.Tensor) -> None:
        """The rows into the ring, from `position` on, as the projections would."""
        for i, row in enumerate(rows):
            self.ring[(self.position + i) % RING] = row.to(self.backend.device)

    def scalars(self, position: int, commit: int) -> list[torch.Tensor]:
        return [self.backend.tensor(torch.tensor([value], dtype=torch.int32)) for value in (position, commit)]

    def addresses(self, state: torch.Tensor) -> tuple[Memory, Weights]:
        memory = Memory(self.ring.data_ptr(), state.data_ptr())
        return memory, Weights(*(weight.data_ptr() for weight in self.device_weights))

    def decode(self, count: int, position: int, commit: int, state: torch.Tensor) -> torch.Tensor:
        """y and squares, side by side, of `count` rows of the ring, on the device; writes `state`."""
        y = self.backend.empty((count, self.sizes.value_width), torch.float32)
        squares = self.backend.empty((count, self.sizes.num_v_heads * self.mixer.head_parts), torch.float32)
        at, pending = self.scalars(position, commit)
        memory, weights = self.addresses(state)
        self.mixer.decode(
            *(memory, weights, at.data_ptr(), pending.data_ptr()),
            rows=count,
            y=y.data_ptr(),
            squares=squares.data_ptr(),
            stream=self.backend.stream,
        )
        self.backend.sync()
        return torch.cat([y, squares], dim=1)

    def normed(self, out: torch.Tensor) -> torch.Tensor:
        """What the op gives, from `decode`: the products' kernel divides by the heads' root mean squares."""
        sizes = self.sizes
        y, squares = out.double().split([sizes.value_width, out.shape[1] - sizes.value_width], dim=1)
        mean = squares.unflatten(1, (sizes.num_v_heads, -1)).sum(-1) / sizes.head_v_dim
        return (y.unflatten(1, (sizes.num_v_heads, -1)) * torch.rsqrt(mean + EPSILON)[..., None]).flatten(1)

    def inputs(self, rows: torch.Tensor, plain: bool) -> list[torch.Tensor]:
        """The reference's inputs; plain: norm and gate are the identity, so that y is o, to the bits of float64."""
        sizes = self.sizes
        splits = [self.channels, sizes.value_width, sizes.num_v_heads, sizes.num_v_heads]
        qkv_in, z, b, a = rows[:, : sum(splits)].double().split(splits, dim=1)
        weights = [weight.double() for weight in self.weights]
        if plain:
            z, weights[3] = torch.full_like(z, UNIT_GATE), torch.full_like(weights[3], 2.0**50)
        return [qkv_in, z, b, a, *weights, torch.tensor([self.pending]), self.state, self.conv_state, *self.window]

    def attributes(self, plain: bool) -> dict[str, Any]:
        dims = {name: getattr(self.sizes, name) for name in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")}
        return {**dims, "epsilon": 2.0**100 if plain else EPSILON}

    def verify(self, count: int, accept: int) -> None:
        """A round: `count` rows on top of the pending ones, of which the next round commits `accept`."""
        rows = self.rows(count)
        self.write(rows)
        o = self.decode(count, self.position, self.pending, self.device_state)
        expected, *states = verify_reference(*self.inputs(rows, plain=False), **self.attributes(plain=False))
        self.state, self.conv_state, *self.window = states
        assert_close(self.normed(o), expected)
        assert_close(self.device_state, self.state)
        self.position, self.pending = self.position + accept, accept

    def prefill(self, rows: torch.Tensor, check: bool = True) -> torch.Tensor:
        """y of a chunk."""
        count, backend = len(rows), self.backend
        projections = backend.tensor(rows)
        scratch = backend.empty((self.mixer.scratch_bytes(count) // 4,), torch.float32)
        y = backend.empty((count, self.sizes.value_width), torch.float16)
        position, commit = self.scalars(self.position, self.pending)
        memory, weights = self.addresses(self.device_state)
        self.mixer.prefill(
            projections.data_ptr(),
            memory,
            weights,
            position.data_ptr(),
            commit.data_ptr(),
            rows=count,
            y=y.data_ptr(),
            epsilon=EPSILON,
            scratch=scratch.data_ptr(),
            stream=backend.stream,
        )
        backend.sync()
        if check:
            expected, _, _ = prefill_reference(*self.inputs(rows, plain=False), **self.attributes(plain=False))
            plain, *states = prefill_reference(*self.inputs(rows, plain=True), **self.attributes(plain=True))
            self.state, self.conv_state = states
            values = scratch.cpu()[count * 2 * self.sizes.key_width :][: y.numel()].view(y.shape)
            assert_close(values, plain)
            assert_close(self.device_state, self.state)
            self.check_gate(y, values, rows)
            assert_close(y, expected, 2e-3)
            self.forget_window()
        self.position, self.pending = self.position + count, 0
        return y

    def check_gate(self, y: torch.Tensor, o: torch.Tensor, rows: torch.Tensor) -> None:
        sizes = self.sizes
        heads = o.double().unflatten(1, (sizes.num_v_heads, sizes.head_v_dim))
        normed = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + EPSILON) * self.weights[3].double()
        expected = normed.flatten(1) * silu(rows[:, sizes.z_offset : sizes.b_offset].double())
        assert torch.allclose(y.cpu().double(), expected, rtol=2**-11 + RTOL, atol=1e-7)


@pytest.mark.parametrize("backend, sizes", cases())
@pytest.mark.parametrize("position", [0, 1, 2, 3, 31, 32])
def test_rounds_equal_reference(backend: Backend, sizes: Sizes, position: int) -> None:
    """Rounds of 1..8 rows with random accepted counts, far enough for the ring to wrap."""
    chat = Chat(backend, sizes, position)
    for count in (torch.randperm(8) + 1).tolist():
        chat.verify(count, int(torch.randint(0, count + 1, ())))
    chat.verify(8, accept=8)
    chat.verify(1, accept=0)
    chat.verify(8, accept=0)


@pytest.mark.parametrize("backend, sizes", cases())
def test_prefill_equals_reference(backend: Backend, sizes: Sizes) -> None:
    """Chunks, rounds, a chunk of the next turn on top of pending rows, and rounds again."""
    chat = Chat(backend, sizes)
    chat.prefill(chat.rows(int(torch.randint(1, 4, ()))))
    for turn in [(2, 3, 5), (70,), (1, 33)]:
        for count in turn:
            chat.prefill(chat.rows(count))
        for count in (5, 8, 3):
            chat.verify(count, int(torch.randint(1, count + 1, ())))


@pytest.mark.parametrize("backend, sizes", cases())
def test_chunks_do_not_matter(backend: Backend, sizes: Sizes) -> None:
    """A prompt in one chunk or in several: the same bits."""
    chat = Chat(backend, sizes)
    start, rows, results = chat.device_state, chat.rows(21), []
    for chunks in ([21], [1, 2, 3, 15], [8, 13]):
        chat.position, chat.device_state = 0, backend.tensor(start)
        y = torch.cat([chat.prefill(chunk, check=False) for chunk in rows.split(chunks)])
        results.append((y, chat.device_state))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("backend, sizes", cases())
@pytest.mark.parametrize("commit", [0, 3])
def test_bits_of_a_row(backend: Backend, sizes: Sizes, commit: int) -> None:
    """Row t: the same bits whatever T is, and after the rows before it were committed instead of run on top."""
    chat = Chat(backend, sizes, position=27)
    chat.write(chat.rows(commit + 8))
    position = 27 + commit
    base = chat.device_state.clone()
    committed = backend.tensor(base)
    all_rows = chat.decode(8, position, commit, committed)
    again = backend.tensor(base)
    assert torch.equal(chat.decode(8, position, commit, again), all_rows) and torch.equal(again, committed)
    if not commit:
        assert torch.equal(committed, base)
    for count in range(1, 8):
        assert torch.equal(chat.decode(count, position, commit, backend.tensor(base)), all_rows[:count])
        later = chat.decode(8 - count, position + count, count, backend.tensor(committed))
        assert torch.equal(later, all_rows[count:])


@pytest.mark.parametrize("backend, sizes", cases())
def test_commit_alone(backend: Backend, sizes: Sizes) -> None:
    """T = 0 only commits; in steps or at once, the same bits."""
    chat = Chat(backend, sizes, position=2)
    chat.write(chat.rows(8))
    at_once, in_steps = chat.device_state, backend.tensor(chat.device_state)
    chat.decode(0, 10, 8, at_once)
    for position, commit in [(5, 3), (10, 5), (10, 0)]:
        chat.decode(0, position, commit, in_steps)
    assert torch.equal(at_once, in_steps)
