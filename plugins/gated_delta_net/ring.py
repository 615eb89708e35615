"""The Gated DeltaNet mixer whose rows stay in a ring: what graphs for GPUs take instead of the windows.

The math is that of plugins/gated_delta_net. Instead of a conv state and pending windows a layer keeps the raw
projections of its last rows in a ring: the row of absolute position p, [qkv_in | z | b | a | zeros], in slot p % 32.
The pending rows are the `accepted` rows before `position`, the convolution's history the three before any row. They are
found by position alone, so nothing moves, and rejected rows are overwritten. Both states begin as zeros.

`GatedDeltaNetRing` commits the pending rows, runs its own on top, and returns the state without its own;
`GatedDeltaNetRingPrefill` commits its own too. Either puts its own rows into the ring, as many as it holds.

Shapes: qkv_in, z, b, a and the weights as in plugins/gated_delta_net, with a kernel of 4; position and accepted (0 to
8, and no more than position) int64 or int32 [1]; recurrent_state float32 [Hv, Dk, Dv]; ring float32 [32, row_stride],
see cuda.Sizes. T is at most 8 for GatedDeltaNetRing.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from plugins.gated_delta_net import (
    ATTRIBUTES,
    INPUTS,
    convolution_body,
    gated_norm_body,
    gates_body,
    heads_body,
    linear_attention,
    mix,
    random_inputs,
)
from plugins.gated_delta_net.cuda import MAX_ROWS, RING, Sizes
from plugins.gated_delta_net.launch import RING_LAUNCH, RING_PREFILL_LAUNCH
from plugins.launch import Launch
from plugins.op import Attributes, Case, Op, ints

HISTORY = 3  # raw rows that the convolution reads before a row: its kernel less one
STATES = ("recurrent_state", "ring")
PROJECTIONS, WEIGHTS = INPUTS[:4], INPUTS[4:8]
RING_INPUTS = (*PROJECTIONS, *WEIGHTS, "position", "accepted", *STATES)
LAST = 2**31 - 1  # end of a slice to the end


def row_parts(sizes: Sizes) -> list[int]:
    """Widths of qkv_in, z, b, a and, unless it is none, the padding of a row of the ring."""
    heads = sizes.num_v_heads
    padding = sizes.row_stride - sizes.a_offset - heads
    return [sizes.z_offset, sizes.value_width, heads, heads, *[padding] * (padding > 0)]


def reference(inputs: tuple[torch.Tensor, ...], attributes: Attributes, prefill: bool) -> tuple[torch.Tensor, ...]:
    own, weights, (position, accepted, recurrent_state, ring) = inputs[:4], inputs[4:8], inputs[8:]
    sizes, start, end = Sizes.of(attributes), int(position), int(position) + len(own[0])
    past = ring[torch.arange(start - int(accepted) - HISTORY, start) % RING]
    tail, pending = past[:, : sizes.z_offset], past[HISTORY:].split(row_parts(sizes), dim=-1)[:4]
    if int(accepted):
        _, recurrent_state, _ = mix((*pending, *weights), recurrent_state, tail[:HISTORY], **attributes)
    y, state, _ = mix((*own, *weights), recurrent_state, tail[-HISTORY:], **attributes)
    rows = torch.cat(own, dim=-1)[-RING:]
    next_ring = ring.clone()
    next_ring[torch.arange(end - len(rows), end) % RING, : rows.shape[1]] = rows
    return y, state if prefill else recurrent_state, next_ring


def infer(*inputs: torch.Tensor, **_: Any) -> list[tuple[torch.dtype, list[Any]]]:
    return [(torch.float32, list(tensor.shape)) for tensor in (inputs[1], *inputs[-len(STATES) :])]


def body(attributes: Attributes, prefill: bool) -> str:
    """Pending candidates are the 8 rows before `position`; those that are not accepted get g = 0 and beta = 0. They go
    through convolution, norms and gates together with the call's own rows."""
    sizes = Sizes.of(attributes)
    parts = row_parts(sizes)
    candidate = ", ".join(("candidate_qkv", "candidate_z", "candidate_b", "candidate_a", "padding")[: len(parts)])
    committed, final = ("state", "next_recurrent_state") if prefill else ("next_recurrent_state", "unused_state")
    return f"""
        {ints("zero", 0)}
        {ints("kernel_axis", 1)}
        {ints("minus_one", -1)}
        {ints("slots", RING)}
        start = Cast <to = 7> (position)
        pending = Cast <to = 7> (accepted)
        rows = Shape <end = 1> (qkv_in)
        {ints("back", *range(-HISTORY - MAX_ROWS, 0))}
        past_positions = Add (start, back)
        past_slots = Mod (past_positions, slots)
        past = Gather <axis = 0> (ring, past_slots)
        {ints("past_parts", HISTORY, MAX_ROWS)}
        history, candidates = Split <axis = 0> (past, past_parts)
        {ints("history_parts", sizes.z_offset, sizes.row_stride - sizes.z_offset)}
        tail, unused_history = Split <axis = 1> (history, history_parts)
        {ints("columns", *parts)}
        {candidate} = Split <axis = 1> (candidates, columns)
        all_qkv = Concat <axis = 0> (candidate_qkv, qkv_in)
        all_b = Concat <axis = 0> (candidate_b, b)
        all_a = Concat <axis = 0> (candidate_a, a)
        {convolution_body(rows="all_qkv", tail="tail")}
        {heads_body(attributes)}
        {gates_body(attributes, "all_a", "all_b", "g", "beta")}
        {ints("candidate_rows", MAX_ROWS)}
        all_rows = Concat <axis = 0> (candidate_rows, rows)
        unused_q, own_q = Split <axis = 1> (q3, all_rows)
        commit_k, own_k = Split <axis = 1> (k3, all_rows)
        commit_v, own_v = Split <axis = 1> (v3, all_rows)
        candidate_g, own_g = Split <axis = 0> (g, all_rows)
        candidate_beta, own_beta = Split <axis = 0> (beta, all_rows)
        {ints("candidate", *range(MAX_ROWS))}
        first = Sub (candidate_rows, pending)
        keep = GreaterOrEqual (candidate, first)
        keep_float = Cast <to = 1> (keep)
        keep_column = Unsqueeze (keep_float, minus_one)
        commit_g = Mul (candidate_g, keep_column)
        commit_beta = Mul (candidate_beta, keep_column)
        commit_g3 = Unsqueeze (commit_g, zero)
        commit_beta3 = Unsqueeze (commit_beta, zero)
        state4 = Unsqueeze (recurrent_state, zero)
        commit_o, committed4 = {linear_attention(attributes)} (
            commit_k, commit_k, commit_v, state4, commit_g3, commit_beta3)
        {committed} = Squeeze (committed4, zero)
        own_g3 = Unsqueeze (own_g, zero)
        own_beta3 = Unsqueeze (own_beta, zero)
        o, final4 = {linear_attention(attributes, scale=sizes.head_k_dim**-0.5)} (
            own_q, own_k, own_v, committed4, own_g3, own_beta3)
        {final} = Squeeze (final4, zero)
        {gated_norm_body(attributes)}
        {ring_body(sizes)}"""


def ring_body(sizes: Sizes) -> str:
    """Body statements: the last of the call's own rows, into their slots."""
    return f"""
        own_columns = Concat <axis = 1> (qkv_in, z, b, a)
        {ints("pads", 0, 0, 0, sizes.row_stride - sizes.a_offset - sizes.num_v_heads)}
        own_rows = Pad (own_columns, pads)
        {ints("latest_from", -RING)}
        {ints("latest_to", LAST)}
        latest = Slice (own_rows, latest_from, latest_to, zero)
        latest_rows = Shape <end = 1> (latest)
        end = Add (start, rows)
        latest_start = Sub (end, latest_rows)
        latest_slot = Mod (latest_start, slots)
        latest3 = Unsqueeze (latest, zero)
        ring3 = Unsqueeze (ring, zero)
        next_ring3 = TensorScatter <axis = -2, mode = "circular"> (ring3, latest3, latest_slot)
        next_ring = Squeeze (next_ring3, zero)"""


def cases(generator: torch.Generator, rows: int) -> Iterator[Case]:
    """Before, at and after the ring's first turn; row_stride with padding and, in the last sizes, without."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    layers = [Sizes(2, 4, 16, 16), Sizes(1, 1, 16, 32), Sizes(2, 16, 32, 16)]
    starts = [(0, 0), (2, 2), (7, 5), (31, 8), (40, 0), (1003, 1)]
    for sizes, (position, accepted) in product(layers, starts):
        heads, columns = sizes.num_v_heads, sizes.a_offset + sizes.num_v_heads
        rows_and_weights = random_inputs(normal, rows, sizes)
        ring = torch.zeros(RING, sizes.row_stride)
        written = torch.arange(max(position - RING, 0), position) % RING
        ring[written, :columns] = normal(len(written), columns)
        state = normal(heads, sizes.head_k_dim, sizes.head_v_dim)
        dtype = torch.int32 if position % 2 else torch.int64
        counts = [torch.tensor([count], dtype=dtype) for count in (position, accepted)]
        values = (sizes.num_k_heads, heads, sizes.head_k_dim, sizes.head_v_dim, 1e-6)
        yield (*rows_and_weights, *counts, state, ring), dict(zip(ATTRIBUTES, values, strict=True))


def _op(name: str, prefill: bool, launch: Launch) -> Op:
    return Op(
        name=name,
        inputs=RING_INPUTS,
        outputs=("y", *(f"next_{state}" for state in STATES)),
        attributes=ATTRIBUTES,
        weights=WEIGHTS,
        reference=lambda *inputs, **attributes: reference(inputs, attributes, prefill),
        infer=infer,
        body=lambda attributes, expanded: body(attributes, prefill),
        cases=lambda generator, rows: cases(generator, rows if prefill else min(rows, MAX_ROWS)),
        # Its norm divides by what may be small: of 10,000 random cases 99.9 % are within 1e-6, one had 1.05e-5.
        rtol=3e-5,
        launch=launch,
    )


GATED_DELTA_NET_RING = _op("GatedDeltaNetRing", prefill=False, launch=RING_LAUNCH)
GATED_DELTA_NET_RING_PREFILL = _op("GatedDeltaNetRingPrefill", prefill=True, launch=RING_PREFILL_LAUNCH)
