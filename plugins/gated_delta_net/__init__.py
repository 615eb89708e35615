"""The Gated DeltaNet mixer between its projections, with rejected drafts rolled back by deferred commit.

    qkv      = silu(causal depthwise convolution of qkv_in)
    q, k     = x * rsqrt(Σ x² + 1e-6);  q *= Dk^-0.5;  value head h reads key head h // (Hv / Hk)
    g        = -exp(A_log) * softplus(a + dt_bias);  beta = sigmoid(b)
    S        = exp(g) S;  S += beta k (v - kᵀ S)ᵀ;  o = qᵀ S          # o reads the updated state
    y        = norm_weight * rms(o) * silu(z)

(transformers, Qwen3_5MoeGatedDeltaNet.) A call first commits the `accepted` leading rows of the pending window, the
rows of the call before, to the states; then it runs its own rows on top. `GatedDeltaNetVerify` returns the states
without its own rows and the rows as the next pending window; `GatedDeltaNetPrefill` commits its rows at once.
A rejected draft therefore never touches a state, and the states are written once a call, whatever its rows.

Shapes: qkv_in [T, C], z [T, Hv Dv], b and a [T, Hv], conv_weight [C, kernel], A_log and dt_bias [Hv], norm_weight
[Dv], accepted int64 [1], recurrent_state [Hv, Dk, Dv], conv_state [kernel - 1, C] (raw inputs), pending_conv [W, C]
(raw inputs), pending_k [W, Hk Dk] (after the convolution, normalised), pending_v [W, Hv Dv], pending_g and
pending_beta [W, Hv]. C = 2 Hk Dk + Hv Dv. Float32; A_log, dt_bias and the weights may be bfloat16.
The same mixer with its rows in a ring, for GPUs, is in ring.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import silu, softplus

from plugins.gated_delta_net.cuda import Sizes
from plugins.op import Attributes, Case, Op, floats, ints, number, padded

L2_EPSILON = 1e-6
WINDOW = ("pending_conv", "pending_k", "pending_v", "pending_g", "pending_beta")
INPUTS = ("qkv_in", "z", "b", "a", "conv_weight", "A_log", "dt_bias", "norm_weight", "accepted")
STATES = ("recurrent_state", "conv_state")
ATTRIBUTES = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "epsilon")


def convolve(tail: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """tail [kernel - 1, C] then rows [T, C], weight [C, kernel] -> silu of the causal convolution, [T, C]."""
    windows = torch.cat([tail, rows]).unfold(0, weight.shape[1], 1)  # [T, C, kernel]
    return silu((windows * weight.float()).sum(-1))


def recur(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [T, Hv, Dk], v [T, Hv, Dv], g, beta [T, Hv], state [Hv, Dk, Dv] -> o [T, Hv, Dv], state."""
    out = torch.empty_like(v)
    for t in range(len(v)):
        state = state * g[t].exp()[:, None, None]
        delta = beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][:, :, None] * delta[:, None, :]
        out[t] = torch.einsum("hk,hkv->hv", q[t], state)
    return out, state


def commit(
    accepted: torch.Tensor, recurrent_state: torch.Tensor, conv_state: torch.Tensor, window: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states after the accepted leading rows of the window."""
    n = int(accepted)
    conv, k, v, g, beta = (rows[:n] for rows in window)
    heads, k_dim, v_dim = recurrent_state.shape
    keys = k.unflatten(-1, (-1, k_dim)).repeat_interleave(heads * k_dim // k.shape[-1], dim=1)
    _, state = recur(keys, keys, v.unflatten(-1, (heads, v_dim)), g, beta, recurrent_state)
    return state, torch.cat([conv_state, conv])[n:]


def mix(
    projections: Sequence[torch.Tensor], recurrent_state: torch.Tensor, conv_state: torch.Tensor, **attributes: Any
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """projections: INPUTS but `accepted` -> y [T, Hv Dv], the state after all rows, the rows as a window."""
    qkv_in, z, b, a, conv_weight, A_log, dt_bias, norm_weight = projections
    k_heads, v_heads = attributes["num_k_heads"], attributes["num_v_heads"]
    k_dim, v_dim = attributes["head_k_dim"], attributes["head_v_dim"]
    q, k, v = convolve(conv_state, qkv_in, conv_weight).split([k_heads * k_dim, k_heads * k_dim, v_heads * v_dim], -1)
    q, k = (rows.unflatten(-1, (k_heads, k_dim)) for rows in (q, k))
    q, k = (rows * torch.rsqrt(rows.pow(2).sum(-1, keepdim=True) + L2_EPSILON) for rows in (q, k))
    queries, keys = (rows.repeat_interleave(v_heads // k_heads, dim=1) for rows in (q * k_dim**-0.5, k))
    g = -A_log.float().exp() * softplus(a + dt_bias.float())
    beta = b.sigmoid()
    o, state = recur(queries, keys, v.unflatten(-1, (v_heads, v_dim)), g, beta, recurrent_state)
    normed = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + attributes["epsilon"]) * norm_weight.float()
    return normed.flatten(1) * silu(z), state, (qkv_in, k.flatten(1), v, g, beta)


def verify_reference(*inputs: torch.Tensor, **attributes: Any) -> tuple[torch.Tensor, ...]:
    *projections, accepted, recurrent_state, conv_state = inputs[: len(INPUTS) + len(STATES)]
    window = inputs[len(INPUTS) + len(STATES) :]
    recurrent_state, conv_state = commit(accepted, recurrent_state, conv_state, window)
    y, _, rows = mix(projections, recurrent_state, conv_state, **attributes)
    return y, recurrent_state, conv_state, *rows


def prefill_reference(*inputs: torch.Tensor, **attributes: Any) -> tuple[torch.Tensor, ...]:
    *projections, accepted, recurrent_state, conv_state = inputs[: len(INPUTS) + len(STATES)]
    window = inputs[len(INPUTS) + len(STATES) :]
    recurrent_state, conv_state = commit(accepted, recurrent_state, conv_state, window)
    y, state, _ = mix(projections, recurrent_state, conv_state, **attributes)
    return y, state, torch.cat([conv_state, projections[0]])[-len(conv_state) :]


def infer_prefill(*inputs: torch.Tensor, **_: Any) -> list[tuple[torch.dtype, list[Any]]]:
    states = inputs[len(INPUTS) : len(INPUTS) + len(STATES)]
    return [(torch.float32, list(tensor.shape)) for tensor in (inputs[1], *states)]


def infer_verify(*inputs: torch.Tensor, **attributes: Any) -> list[tuple[torch.dtype, list[Any]]]:
    rows = inputs[0].shape[0]
    window = inputs[len(INPUTS) + len(STATES) :]
    return infer_prefill(*inputs, **attributes) + [(torch.float32, [rows, tensor.shape[1]]) for tensor in window]


def linear_attention(attributes: Attributes, scale: float | None = None) -> str:
    """The recurrence's node, but for its inputs."""
    heads = f"q_num_heads = {attributes['num_k_heads']}, kv_num_heads = {attributes['num_v_heads']}"
    scaled = "" if scale is None else f", scale = {number(scale)}"
    return f'com.microsoft.LinearAttention <{heads}, update_rule = "gated_delta"{scaled}>'


def convolution_body(rows: str, tail: str) -> str:
    """Body statements: rows [T, C] after tail [kernel - 1, C] -> mixed [1, T, C], present_tail [1, kernel - 1, C]."""
    return f"""
        tail3 = Unsqueeze ({tail}, zero)
        qkv3 = Unsqueeze ({rows}, zero)
        conv_w = Cast <to = 1> (conv_weight)
        conv_w3 = Unsqueeze (conv_w, kernel_axis)
        mixed, present_tail = com.microsoft.CausalConvWithState <channels_last = 1, activation = "silu"> (
            qkv3, conv_w3, , tail3)"""


def heads_body(attributes: Attributes) -> str:
    """Body statements: mixed [1, T, C] -> q3 and k3 [1, T, Hk Dk], normalised, and v3 [1, T, Hv Dv]."""
    k_heads, v_heads = attributes["num_k_heads"], attributes["num_v_heads"]
    k_dim, v_dim = attributes["head_k_dim"], attributes["head_v_dim"]
    return f"""
        {ints("parts", 2 * k_heads * k_dim, v_heads * v_dim)}
        qk, v3 = Split <axis = 2> (mixed, parts)
        {ints("as_heads", 0, 0, -1, k_dim)}
        qk_heads = Reshape (qk, as_heads)
        {floats("unit", *[k_dim**-0.5] * k_dim)}
        qk_unit = RMSNormalization <axis = -1, epsilon = {number(L2_EPSILON / k_dim)}> (qk_heads, unit)
        {ints("as_rows", 0, 0, -1)}
        qk_rows = Reshape (qk_unit, as_rows)
        q3, k3 = Split <axis = 2, num_outputs = 2> (qk_rows)"""


def gates_body(attributes: Attributes, a: str, b: str, g: str, beta: str) -> str:
    """Body statements: a, b [T, Hv] -> g, beta [T, Hv]."""
    return f"""
        A = Cast <to = 1> (A_log)
        exp_A = Exp (A)
        rate = Neg (exp_A)
        bias = Cast <to = 1> (dt_bias)
        biased = Add ({a}, bias)
        {padded("Softplus", "step", "biased", attributes["num_v_heads"])}
        {g} = Mul (step, rate)
        {beta} = Sigmoid ({b})"""


def gated_norm_body(attributes: Attributes) -> str:
    """Body statements: o [1, T, Hv Dv] and z -> y."""
    return f"""
        norm_w = Cast <to = 1> (norm_weight)
        o_rows = Squeeze (o, zero)
        {ints("value_heads", 0, attributes["num_v_heads"], attributes["head_v_dim"])}
        o_heads = Reshape (o_rows, value_heads)
        normed = RMSNormalization <axis = -1, epsilon = {number(attributes["epsilon"])}> (o_heads, norm_w)
        {ints("flat", 0, -1)}
        normed_rows = Reshape (normed, flat)
        z_sigmoid = Sigmoid (z)
        z_silu = Mul (z, z_sigmoid)
        y = Mul (normed_rows, z_silu)"""


def body(attributes: Attributes, prefill: bool) -> str:
    conv_name = "conv_tail" if prefill else "next_conv_state"
    state_name = "state" if prefill else "next_recurrent_state"
    final_state, final_conv = (
        ("next_recurrent_state", "next_conv_state") if prefill else ("unused_state", "unused_conv")
    )
    k_name, v_name, g_name, beta_name = ("k", "v", "g", "beta") if prefill else [f"next_{name}" for name in WINDOW[1:]]
    return f"""
        {ints("zero", 0)}
        {ints("one", 1)}
        {ints("minus_one", -1)}
        {ints("kernel_axis", 1)}
        scalar_zero = Constant <value_int = 0> ()
        scalar_one = Constant <value_int = 1> ()
        window_rows = Shape <end = 1> (pending_g)
        window_count = Squeeze (window_rows, zero)
        row = Range (scalar_zero, window_count, scalar_one)
        keep = Less (row, accepted)
        keep_float = Cast <to = 1> (keep)
        keep_column = Unsqueeze (keep_float, minus_one)
        commit_g = Mul (pending_g, keep_column)
        commit_beta = Mul (pending_beta, keep_column)
        commit_g3 = Unsqueeze (commit_g, zero)
        commit_beta3 = Unsqueeze (commit_beta, zero)
        commit_k3 = Unsqueeze (pending_k, zero)
        commit_v3 = Unsqueeze (pending_v, zero)
        state4 = Unsqueeze (recurrent_state, zero)
        commit_o, committed4 = {linear_attention(attributes)} (
            commit_k3, commit_k3, commit_v3, state4, commit_g3, commit_beta3)
        {state_name} = Squeeze (committed4, zero)
        raw = Concat <axis = 0> (conv_state, pending_conv)
        tail_rows = Shape <end = 1> (conv_state)
        tail_end = Add (accepted, tail_rows)
        {conv_name} = Slice (raw, accepted, tail_end, zero)
        {convolution_body(rows="qkv_in", tail=conv_name)}
        {final_conv} = Squeeze (present_tail, zero)
        {heads_body(attributes)}
        {k_name} = Squeeze (k3, zero)
        {v_name} = Squeeze (v3, zero)
        {gates_body(attributes, "a", "b", g_name, beta_name)}
        g3 = Unsqueeze ({g_name}, zero)
        beta3 = Unsqueeze ({beta_name}, zero)
        o, final4 = {linear_attention(attributes, scale=attributes["head_k_dim"] ** -0.5)} (
            q3, k3, v3, committed4, g3, beta3)
        {final_state} = Squeeze (final4, zero)
        {"" if prefill else "next_pending_conv = Identity (qkv_in)"}
        {gated_norm_body(attributes)}"""


def random_inputs(normal: Callable[..., torch.Tensor], rows: int, sizes: Sizes) -> list[torch.Tensor]:
    """qkv_in, z, b, a, conv_weight, A_log, dt_bias, norm_weight. normal: as torch.randn."""
    channels, heads = sizes.z_offset, sizes.num_v_heads
    return [
        *(normal(rows, width) for width in (channels, sizes.value_width, heads, heads)),
        *(normal(channels, 4).bfloat16(), normal(heads), normal(heads).bfloat16(), normal(sizes.head_v_dim)),
    ]


def cases(generator: torch.Generator, rows: int) -> Iterator[Case]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for k_heads, v_heads, k_dim, v_dim, window in [(2, 4, 16, 16, 3), (1, 1, 16, 32, 1), (2, 6, 32, 16, 5)]:
        channels = 2 * k_heads * k_dim + v_heads * v_dim
        accepted = int(torch.randint(0, window + 1, (1,), generator=generator))
        keys = torch.nn.functional.normalize(normal(window, k_heads, k_dim), dim=-1).flatten(1)
        rows_and_weights = random_inputs(normal, rows, Sizes(k_heads, v_heads, k_dim, v_dim))
        states = [torch.tensor([accepted]), normal(v_heads, k_dim, v_dim), normal(3, channels)]
        pending = [normal(window, channels), keys, normal(window, v_heads * v_dim)]
        gates = [-normal(window, v_heads).abs(), normal(window, v_heads).sigmoid()]
        attributes = {"num_k_heads": k_heads, "num_v_heads": v_heads, "head_k_dim": k_dim, "head_v_dim": v_dim}
        yield (*rows_and_weights, *states, *pending, *gates), {**attributes, "epsilon": 1e-6}


GATED_DELTA_NET_VERIFY = Op(
    name="GatedDeltaNetVerify",
    inputs=(*INPUTS, *STATES, *WINDOW),
    outputs=("y", *(f"next_{name}" for name in (*STATES, *WINDOW))),
    attributes=ATTRIBUTES,
    weights=("conv_weight", "A_log", "dt_bias", "norm_weight"),
    reference=verify_reference,
    infer=infer_verify,
    body=lambda attributes, expanded: body(attributes, prefill=False),
    cases=cases,
    rtol=1e-5,  # a recurrence over up to 13 rows, each a sum over Dk
)

GATED_DELTA_NET_PREFILL = Op(
    name="GatedDeltaNetPrefill",
    inputs=(*INPUTS, *STATES, *WINDOW),
    outputs=("y", *(f"next_{name}" for name in STATES)),
    attributes=ATTRIBUTES,
    weights=("conv_weight", "A_log", "dt_bias", "norm_weight"),
    reference=prefill_reference,
    infer=infer_prefill,
    body=lambda attributes, expanded: body(attributes, prefill=True),
    cases=cases,
    rtol=1e-5,
)
