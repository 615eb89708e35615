"""Every op's plugin launch on a GPU (or emulated) against the op's torch reference.

Tolerances, of the largest output. Up to 8 rows 2e-5, as the decoding kernels' own tests: activations of 16 bits or
more, float32 sums. More rows, and GatedDeltaNetRingPrefill, 2e-3: activations enter or leave as float16, whose rounding
is 2^-11 of a value, up to three times one after the other; but FloatLinear and MoeRouting, whose rows enter as two
float16, and the recurrent state 2e-5 again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from export.errors import UserError
from plugins.gated_attention import GATED_ATTENTION, KV_APPEND, append_reference, rotate
from plugins.gated_attention.launch import GATED_ATTENTION_LAUNCH, KV_APPEND_LAUNCH
from plugins.gated_delta_net.cuda import RING, Sizes
from plugins.gated_delta_net.launch import RING_LAUNCH, RING_PREFILL_LAUNCH
from plugins.gated_delta_net.ring import GATED_DELTA_NET_RING, GATED_DELTA_NET_RING_PREFILL
from plugins.kernels import compile_kernels
from plugins.launch import DECODE_ROWS, DECODE_RTOL, PREFILL_RTOL, Argument, Call, Device, Launch
from plugins.linear import FLOAT_LINEAR, FP8_LINEAR, NVFP4_LINEAR, random_nvfp4
from plugins.moe_experts import FLOAT_MOE_EXPERTS, NVFP4_MOE_EXPERTS, float_weights, nvfp4_weights
from plugins.moe_routing import MOE_ROUTING
from plugins.op import HALF_STEP, Op
from plugins.rms_norm import RMS_NORM
from plugins.rms_norm import reference as rms_norm
from tests.backends import BACKENDS, Backend

RTOL, HALF_RTOL = DECODE_RTOL, PREFILL_RTOL
DEVICE = Device(multiprocessors=3, shared_bytes=200 << 10)
EPSILON = 1e-6
BY_ROW = ("x", "topk_weights", "topk_ids", "qkv_in", "z", "b", "a", "q_gate", "k", "v")  # inputs of as many rows

Tensors = dict[str, torch.Tensor]
Attributes = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """An op, its launch, inputs of so many rows, what its outputs may differ by on the tensor cores."""

    op: Op
    launch: Launch
    inputs: Callable[[int], tuple[list[torch.Tensor], Attributes]]
    prefill_rtol: float = HALF_RTOL

    def named(self, rows: int) -> tuple[Tensors, Attributes]:
        inputs, attributes = self.inputs(rows)
        return dict(zip(self.op.inputs, inputs, strict=True)), attributes


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(1 << 31, ())))


def float_linear(rows: int) -> tuple[list[torch.Tensor], Attributes]:
    return [torch.randn(rows, 128), torch.randn(33, 128).bfloat16()], {}


def fp8_linear(rows: int) -> tuple[list[torch.Tensor], Attributes]:
    weight = (torch.randn(48, 96) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return [torch.randn(rows, 96), weight, torch.rand(())], {}


def nvfp4_linear(rows: int) -> tuple[list[torch.Tensor], Attributes]:
    return [torch.randn(rows, 192), *random_nvfp4(generator(), 40, 192), torch.rand(())], {}


def norm(rows: int) -> tuple[list[torch.Tensor], Attributes]:
    return [torch.randn(rows, 3, 80) * 3, torch.randn(80)], {"epsilon": EPSILON}


def routing(rows: int) -> tuple[list[torch.Tensor], Attributes]:
    weight = (torch.randn(12, 64) / 8).bfloat16()  # logits of about one, whose error is the weights'
    return [torch.randn(rows, 64), weight], {"num_experts_per_tok": 3}


# With NVFP4's scale_2 divided: what experts make of a row must be in float16's range.
def experts(weights: Callable[..., Any]) -> Callable[[int], tuple[list[torch.Tensor], Attributes]]:
    def inputs(rows: int) -> tuple[list[torch.Tensor], Attributes]:
        topk_weights, topk_ids = torch.randn(rows, 12).softmax(-1).topk(3)
        topk_weights /= topk_weights.sum(-1, keepdim=True)
        made = [w / 100 if w.dtype == torch.float32 else w for w in weights(generator(), 128, 12, 64)]
        return [torch.randn(rows, 128), topk_weights, topk_ids, *made], {"num_experts": 12, "moe_intermediate_size": 64}

    return inputs


SIZES = Sizes(2, 4, 16, 32)


def delta_net(rows: int) -> tuple[list[torch.Tensor], Attributes]:
    """The ring holds what the call may read, the rest is NaN."""
    position, accepted, heads = 31, 5, SIZES.num_v_heads
    widths = SIZES.z_offset, SIZES.value_width, heads, heads
    weights = [torch.randn(SIZES.z_offset, 4), torch.randn(heads), torch.randn(heads), torch.randn(SIZES.head_v_dim)]
    ring = torch.full((RING, SIZES.row_stride), float("nan"))
    ring[torch.arange(position - accepted - 3, position) % RING] = torch.randn(accepted + 3, SIZES.row_stride)
    scalars = [torch.tensor([value], dtype=torch.int32) for value in (position, accepted)]
    state = torch.randn(heads, SIZES.head_k_dim, SIZES.head_v_dim)
    attributes: Attributes = {"num_k_heads": SIZES.num_k_heads, "num_v_heads": heads}
    attributes |= {"head_k_dim": SIZES.head_k_dim, "head_v_dim": SIZES.head_v_dim, "epsilon": EPSILON}
    return [*(torch.randn(rows, width) for width in widths), *weights, *scalars, state, ring], attributes


def attention(rows: int) -> tuple[list[torch.Tensor], Attributes]:
    """What lies behind the rows in the cache is NaN."""
    heads, kv_heads, dim, position = 4, 2, 32, 61
    cache = torch.full((2, kv_heads, 128, dim), float("nan")).half()
    cache[:, :, :position] = torch.randn(2, kv_heads, position, dim).half()
    inputs = [torch.randn(rows, width * dim) for width in (2 * heads, kv_heads, kv_heads)]
    inputs += [torch.randn(dim), torch.randn(dim), torch.tensor([position], dtype=torch.int32), cache]
    attributes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "rotary_dim": 16}
    return inputs, {**attributes, "rope_theta": 1e7, "epsilon": EPSILON, "cache_dtype": "float16"}


def append(rows: int) -> tuple[list[torch.Tensor], Attributes]:
    inputs, attributes = attention(rows)
    del attributes["num_heads"]
    return [*inputs[1:3], *inputs[4:]], attributes


def wired(op: Op) -> Launch:
    assert op.launch
    return op.launch


KINDS = {
    kind.op.name: kind
    for kind in (
        Kind(FLOAT_LINEAR, wired(FLOAT_LINEAR), float_linear, RTOL),
        Kind(FP8_LINEAR, wired(FP8_LINEAR), fp8_linear),
        Kind(NVFP4_LINEAR, wired(NVFP4_LINEAR), nvfp4_linear),
        Kind(RMS_NORM, wired(RMS_NORM), norm, RTOL),
        Kind(MOE_ROUTING, wired(MOE_ROUTING), routing, RTOL),
        Kind(FLOAT_MOE_EXPERTS, wired(FLOAT_MOE_EXPERTS), experts(float_weights)),
        Kind(NVFP4_MOE_EXPERTS, wired(NVFP4_MOE_EXPERTS), experts(nvfp4_weights)),
        Kind(GATED_DELTA_NET_RING, RING_LAUNCH, delta_net),
        Kind(GATED_DELTA_NET_RING_PREFILL, RING_PREFILL_LAUNCH, delta_net),
        Kind(GATED_ATTENTION, GATED_ATTENTION_LAUNCH, attention),
        Kind(KV_APPEND, KV_APPEND_LAUNCH, append),
    )
}
RING_KIND, RING_PREFILL_KIND = KINDS["GatedDeltaNetRing"], KINDS["GatedDeltaNetRingPrefill"]


class Layer:
    """A kind's tensors on a device. `run` launches and does not wait."""

    def __init__(self, backend: Backend, kind: Kind, inputs: Tensors, attributes: Attributes) -> None:
        self.backend, self.kind, self.attributes = backend, kind, attributes
        self.tensors = {name: self.put(tensor) for name, tensor in inputs.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.backend.tensor(tensor.reshape(tensor.shape or (1,)))

    def run(self, device: Device = DEVICE) -> Tensors:
        op, launch = self.kind.op, self.kind.launch
        outputs = {}
        for name, (dtype, shape) in zip(op.outputs, op.infer(*self.tensors.values(), **self.attributes), strict=True):
            source = launch.aliases.get(name)
            outputs[name] = self.tensors[source] if source else self.backend.empty(shape, dtype)
        size = launch.workspace(self.attributes, self.shapes, device)
        self.workspace = self.backend.empty((size,), torch.uint8)
        call = Call(
            self.attributes,
            {name: argument(tensor, self.shapes[name]) for name, tensor in self.tensors.items()},
            {name: argument(tensor, tuple(tensor.shape)) for name, tensor in outputs.items()},
            device,
            self.backend.module,
            self.workspace.data_ptr(),
            self.backend.stream,
        )
        launch.run(call)
        return outputs


def argument(tensor: torch.Tensor, shape: tuple[int, ...]) -> Argument:
    return Argument(tensor.data_ptr(), shape, str(tensor.dtype).removeprefix("torch."))


def outputs_of(
    backend: Backend, kind: Kind, inputs: Tensors, attributes: Attributes, device: Device = DEVICE
) -> Tensors:
    outputs = Layer(backend, kind, inputs, attributes).run(device)
    backend.sync()
    return {name: tensor.cpu() for name, tensor in outputs.items()}


def attended(inputs: Tensors, cache: torch.Tensor, attributes: Attributes) -> torch.Tensor:
    """GatedAttention's y in float64, from the cache that its kernels wrote: they say how a key was rounded."""
    q_gate, position, dim = inputs["q_gate"].double(), inputs["position"], attributes["head_dim"]
    rows, heads, slots = len(q_gate), attributes["num_heads"], int(position) + len(q_gate)
    q, gate = q_gate.unflatten(-1, (heads, 2 * dim)).chunk(2, dim=-1)
    q = rms_norm(q, inputs["q_norm"], epsilon=attributes["epsilon"])
    q = rotate(q, position, attributes["rotary_dim"], attributes["rope_theta"])
    keys, values = cache[:, :, :slots].double().repeat_interleave(heads // attributes["num_kv_heads"], dim=1)
    scores = torch.einsum("thd,hsd->ths", q, keys) * dim**-0.5
    hidden = torch.arange(slots)[None] > (position + torch.arange(rows))[:, None]
    weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    return (torch.einsum("ths,hsd->thd", weights, values) * gate.sigmoid()).flatten(1)


def expected_of(kind: Kind, inputs: Tensors, attributes: Attributes, outputs: Tensors) -> Tensors:
    """The reference's outputs; of mixers in float64."""
    if "kv_cache" in inputs:
        names = ("k", "v", "k_norm", "position", "kv_cache")
        cache = append_reference(*(inputs[name] for name in names), **attributes)
        y = {"y": attended(inputs, outputs["next_kv_cache"], attributes)} if "q_gate" in inputs else {}
        return y | {"next_kv_cache": cache}
    if "ring" in inputs:
        inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    made = kind.op.reference(*inputs.values(), **attributes)
    return dict(zip(kind.op.outputs, made if isinstance(made, tuple) else (made,), strict=True))


def assert_close(name: str, out: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    """NaN where the reference, which left NaN alone, has it."""
    assert torch.equal(out.isnan(), expected.isnan()), f"{name}: NaN where none should be, or none where it was"
    out, expected = out.double().nan_to_num(), expected.double().nan_to_num()
    difference, largest = (out - expected).abs(), expected.abs().max()
    assert difference.max() <= rtol * largest, (
        f"{name}: largest {difference.max() / largest:.2e}, mean {difference.mean() / largest:.2e}"
    )


def check(kind: Kind, inputs: Tensors, attributes: Attributes, outputs: Tensors, prefill: bool) -> None:
    expected = expected_of(kind, inputs, attributes, outputs)
    for name, out in outputs.items():
        if out.dtype == torch.int64:
            assert torch.equal(out, expected[name]), name
        elif name == "next_ring":  # copies
            assert torch.equal(out.nan_to_num(7.0), expected[name].float().nan_to_num(7.0))
        elif name == "next_kv_cache":
            assert_close(name, out, expected[name], HALF_STEP)
            position, rows = int(inputs["position"]), len(inputs["k"])
            untouched = [slot for slot in range(out.shape[2]) if not position <= slot < position + rows]
            before = inputs["kv_cache"][:, :, untouched].view(torch.int16)
            assert torch.equal(out[:, :, untouched].view(torch.int16), before), "a slot that is none of the rows'"
        else:
            rtol = kind.prefill_rtol if prefill and name != "next_recurrent_state" else RTOL
            assert_close(name, out, expected[name], rtol)


def cases() -> Iterator[Any]:
    for name, kind in KINDS.items():
        for rows in (1, 3, 8, 9, 40):
            if kind is not RING_KIND or rows <= DECODE_ROWS:
                yield pytest.param(name, rows, id=f"{name}-{rows}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "rows"), cases())
def test_a_launch(backend: Backend, name: str, rows: int) -> None:
    """In a workspace of just the size that it asks for."""
    kind = KINDS[name]
    inputs, attributes = kind.named(rows)
    outputs = outputs_of(backend, kind, inputs, attributes)
    check(kind, inputs, attributes, outputs, prefill=rows > DECODE_ROWS or kind is RING_PREFILL_KIND)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind not in (RING_PREFILL_KIND,)])
def test_bits_of_a_row_do_not_depend_on_the_rows_after_it(backend: Backend, name: str) -> None:
    """Nor on how many rows a launch's shared memory holds: 36 KB are three, of linear layers."""
    kind, most = KINDS[name], 5
    inputs, attributes = kind.named(most)
    device = Device(3, 36 << 10) if "Linear" in name else Device(3, 44 << 10) if "Experts" in name else DEVICE
    every = outputs_of(backend, kind, inputs, attributes, device)
    for rows in range(1, most):
        fewer = {key: value[:rows] if key in BY_ROW else value for key, value in inputs.items()}
        outputs = outputs_of(backend, kind, fewer, attributes)
        for key, out in outputs.items():
            if key == "next_kv_cache":
                slots = int(inputs["position"]) + rows
                assert torch.equal(out[:, :, :slots], every[key][:, :, :slots])
            elif key == "next_recurrent_state":
                assert torch.equal(out, every[key])
            elif key != "next_ring":
                assert torch.equal(out, every[key][:rows]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conversation_of_the_delta_net(backend: Backend) -> None:
    """A prompt in two chunks, then rounds of which some rows are accepted, on one state and ring, no wait between."""
    inputs, attributes = RING_PREFILL_KIND.named(1)
    inputs["ring"], inputs["recurrent_state"] = (torch.zeros_like(inputs[n]) for n in ("ring", "recurrent_state"))
    state = {name: backend.tensor(inputs[name]) for name in ("ring", "recurrent_state")}
    position, results = 0, []
    for kind, rows, accepted in (
        *((RING_PREFILL_KIND, 45, 0), (RING_PREFILL_KIND, 2, 0), (RING_KIND, 4, 0), (RING_KIND, 3, 2)),
        *((RING_KIND, 8, 3), (RING_KIND, 1, 8), (RING_PREFILL_KIND, 10, 1)),
    ):
        position += accepted
        inputs |= {name: torch.randn(rows, inputs[name].shape[1]) for name in BY_ROW if name in inputs}
        inputs |= {"position": torch.tensor([position], dtype=torch.int32)}
        inputs |= {"accepted": torch.tensor([accepted], dtype=torch.int32)}
        layer = Layer(backend, kind, inputs, attributes)
        layer.tensors |= state
        results.append((kind, dict(inputs), layer, layer.run()))
        position += rows if kind is RING_PREFILL_KIND else 0
    backend.sync()
    for kind, given, _, outputs in results:
        given |= {name: inputs[name] for name in state}
        expected = expected_of(kind, given, attributes, {})
        assert_close("y", outputs["y"].cpu(), expected["y"], HALF_RTOL if kind is RING_PREFILL_KIND else RTOL)
        inputs |= {name: expected[f"next_{name}"] for name in state}
    assert_close("state", state["recurrent_state"].cpu(), inputs["recurrent_state"], RTOL)
    assert torch.equal(state["ring"].cpu(), inputs["ring"].float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_after_attention(backend: Backend) -> None:
    """Layers of other frequencies on one workspace, no wait between: none reads the one before's, or early."""
    kind, layers = KINDS["GatedAttention"], []
    workspace = backend.empty((1 << 20,), torch.uint8)
    for rows, theta in ((40, 1e4), (3, 1e7), (1, 1e2), (9, 1e5), (8, 1e3)) * 2:
        inputs, attributes = kind.named(rows)
        layers.append(Layer(backend, kind, inputs, attributes | {"rope_theta": theta}))
    runs = []
    for layer in layers:
        layer.backend = SharedWorkspace(backend, workspace)
        runs.append((layer, {name: t.cpu().clone() for name, t in layer.tensors.items()}))
    made = [layer.run() for layer, _ in runs]
    backend.sync()
    for (layer, inputs), outputs in zip(runs, made, strict=True):
        found = {name: tensor.cpu() for name, tensor in outputs.items()}
        check(kind, inputs, layer.attributes, found, prefill=len(inputs["k"]) > DECODE_ROWS)


class SharedWorkspace(Backend):
    """A backend whose bytes are all the same ones."""

    def __init__(self, backend: Backend, workspace: torch.Tensor) -> None:
        super().__init__(backend.name)
        self.workspace = workspace

    def empty(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return self.workspace if dtype == torch.uint8 else super().empty(shape, dtype)


def listed_kernels() -> Iterator[Any]:
    """Every source with its macros once."""
    listed = {}
    for kind in KINDS.values():
        inputs, attributes = kind.named(8)
        for source, macros in kind.launch.kernels(attributes, {key: tuple(t.shape) for key, t in inputs.items()}):
            listed[source, tuple(macros.items())] = pytest.param(
                source, macros, id=f"{source.parent.name}-{source.stem}"
            )
    yield from listed.values()


@pytest.mark.parametrize(("source", "macros"), listed_kernels())
@pytest.mark.parametrize("arch", ["sm_90", "sm_120"])
def test_all_kernels_compile(source: Path, macros: dict[str, int | str], arch: str) -> None:
    assert compile_kernels(source, arch, macros)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [8, 40])
def test_a_launch_takes_no_kernels_but_those_listed_and_no_more_workspace_for_fewer_rows(name: str, rows: int) -> None:
    kind, backend = KINDS[name], Backend("emulator")
    inputs, attributes = kind.named(min(rows, DECODE_ROWS) if kind is RING_KIND else rows)
    layer = Layer(backend, kind, inputs, attributes)
    listed = kind.launch.kernels(attributes, layer.shapes)
    taken: list[Any] = []
    module = backend.module
    backend.module = lambda source, macros=None: taken.append((source, macros)) or module(source, macros)  # type: ignore
    layer.run()
    assert taken and all(key in listed for key in taken)

    def workspace(rows: int) -> int:
        shapes = {key: (rows, *shape[1:]) if key in BY_ROW else shape for key, shape in layer.shapes.items()}
        return kind.launch.workspace(attributes, shapes, DEVICE)

    sizes = [workspace(rows) for rows in range(1, DECODE_ROWS + 1 if kind is RING_KIND else 48)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("name", "changed", "shapes", "message"),
    [
        ("FloatLinear", {}, {"x": (1, 48)}, "48 inputs"),
        ("Nvfp4Linear", {}, {"x": (1, 96)}, "96 inputs"),
        ("MoeRouting", {"num_experts_per_tok": 9}, {}, "9 of 12 experts"),
        ("Nvfp4MoeExperts", {"moe_intermediate_size": 32}, {}, "moe_intermediate_size: 32 inputs"),
        ("FloatMoeExperts", {"num_experts": 513}, {}, "3 of 513 experts"),
        ("GatedDeltaNetRing", {"head_k_dim": 24}, {}, "linear_key_head_dim 24"),
        ("GatedDeltaNetRingPrefill", {"head_v_dim": 256}, {}, "linear_value_head_dim 256"),
        ("GatedDeltaNetRing", {}, {"conv_weight": (192, 3)}, "linear_conv_kernel_dim 3"),
        ("GatedAttention", {"head_dim": 40}, {}, "head_dim 40"),
        ("GatedAttention", {"num_heads": 64}, {}, "64 attention heads over 2"),
        ("KvAppend", {"cache_dtype": "float32"}, {}, "cache_dtype float32"),
        ("KvAppend", {"rotary_dim": 64}, {}, "rotary_dim 64"),
    ],
)
def test_sizes_without_kernels(name: str, changed: Attributes, shapes: dict[str, Any], message: str) -> None:
    inputs, attributes = KINDS[name].named(1)
    given = {key: tuple(value.shape) for key, value in inputs.items()} | shapes
    with pytest.raises(UserError, match=message):
        KINDS[name].launch.kernels(attributes | changed, given)
