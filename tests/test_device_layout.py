"""Graphs whose state has the layout for GPUs, in ONNX Runtime: the same tokens as with the layout for CPUs.

pytest tests/test_device_layout.py
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from engines.build import build
from engines.manifest import WEIGHTS, Manifest
from engines.onnxruntime import OnnxRuntimeEngine
from export.bindings import GRAPHS, input_specs, output_specs
from export.checkpoint import Checkpoint
from export.trace import trace
from plugins.gated_attention import KV_APPEND
from plugins.gated_delta_net import mix
from plugins.gated_delta_net.cuda import MAX_ROWS, RING, Sizes
from plugins.gated_delta_net.ring import GATED_DELTA_NET_RING, GATED_DELTA_NET_RING_PREFILL
from runtime.bench import load_prompts
from runtime.rounds import Decoder
from runtime.tokenizer import Tokenizer
from tests.conftest import Build
from tests.test_model import GREEDY, tokens_of
from tests.test_ops import run, session

DEMO = Path(__file__).parents[1] / "demo"
Layouts = tuple[OnnxRuntimeEngine, OnnxRuntimeEngine]


def device_engine(checkpoint: Path, engines: Path, directory: Path, expanded: bool) -> OnnxRuntimeEngine:
    """The device layout of the engines in `engines`, written into `directory`."""
    source, manifest = Checkpoint.open(checkpoint), Manifest.read(engines)
    shutil.copyfile(engines / WEIGHTS, directory / WEIGHTS)
    for name in GRAPHS:
        weights = directory / WEIGHTS
        model = trace(name, source.config, source.tensors, source.formats, weights, expanded, layout="device")
        ir.save(model, directory / f"{name}.onnx")
    manifest = dataclasses.replace(manifest, expanded=expanded)
    return OnnxRuntimeEngine(directory, manifest, threads=1, layout="device")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """The demo checkpoint's engines: host, device."""
    root = tmp_path_factory.mktemp("device")
    build(DEMO / "checkpoint", root / "host")
    host = OnnxRuntimeEngine(root / "host", threads=1)
    (root / "device").mkdir()
    return host, device_engine(DEMO / "checkpoint", root / "host", root / "device", expanded=True)


@pytest.fixture(scope="module")
def packed(build_engine: Build, tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """A small random model with packed weights: host, device. Dense: a router's near-tie may fall either way."""
    sizes = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 0, "vocab_size": 24}
    built = build_engine("modelopt_mixed", False, **sizes)
    directory = tmp_path_factory.mktemp("packed")
    return built.engine(), device_engine(built.checkpoint, built.directory, directory, expanded=False)


def test_bindings(packed: Layouts) -> None:
    """No windows, no dimension but rows and capacity, and a next value of every state."""
    config = packed[0].config
    for graph in GRAPHS:
        inputs, outputs = input_specs(graph, config, "device"), output_specs(graph, config, "device")
        assert {dim for _, shape in inputs.values() for dim in shape if isinstance(dim, str)} == {"T", "S"}
        assert {inputs[name][0] for name in ("token_ids", "position", "accepted") if name in inputs} == {"int32"}
        for name, spec in inputs.items():
            if "layers." in name:
                assert outputs[f"next.{name}"] == spec
                assert spec[0] == ("float16" if name.endswith("kv_cache") else "float32")
    sizes = Sizes(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    assert input_specs("main.verify", config, "device")["layers.0.ring"][1] == (RING, sizes.row_stride)


def test_greedy_tokens_are_those_of_the_host_layout(demo: Layouts) -> None:
    """Three prompts of which the best and the second candidate are at least 0.18 apart in all 48 places; rounding the
    caches to float16 moves these logits by 0.008 at most. 48 tokens after a prompt of 34 turn the ring twice."""
    host, device = demo
    prompts = load_prompts(DEMO / "prompts.json", Tokenizer(host.directory))
    for prompt in (prompts[1], prompts[5], prompts[12]):
        expected = tokens_of(host, prompt, 48, mtp_k=0)
        assert tokens_of(device, prompt, 48, mtp_k=0) == expected
        assert tokens_of(device, prompt, 48, mtp_k=2) == expected


def test_tokens_do_not_depend_on_drafts(packed: Layouts) -> None:
    """Exact, whatever the margins: both sides round alike. The random head is mostly wrong."""
    device = packed[1]
    prompt = torch.randint(0, 24, (int(torch.randint(1, 40, ())),)).tolist()
    plain = tokens_of(device, prompt, 70, mtp_k=0)
    for mtp_k in (1, 2, MAX_ROWS - 1):
        assert tokens_of(device, prompt, 70, mtp_k) == plain


def test_logits_of_packed_weights(packed: Layouts) -> None:
    prompt, logits = torch.randint(0, 24, (50,)).numpy(), []
    for engine in packed:
        engine.start(64, window=5)
        engine.prefill(prompt[:40], 0, 0)
        first = engine.verify(prompt[40:45], 40, 0)[1].copy()
        logits.append(np.concatenate([first, engine.verify(prompt[45:], 45, 5)[1]]))
    assert np.abs(logits[1] - logits[0]).max() < 5e-3 * np.abs(logits[0]).max()


def test_a_further_prompt_after_a_round_commits_the_accepted_rows(demo: Layouts) -> None:
    """As in a chat: its logits and what follows equal those of a run that was given the whole text at once. Bits are
    the same so far; where products of other shapes differ in the last one, a key may round the other way: 2e-3."""
    host, device = demo
    prompt, more = (load_prompts(DEMO / "prompts.json", Tokenizer(host.directory))[i] for i in (1, 5))
    decoder = Decoder(device, 256, 2, GREEDY)
    text = [*prompt, decoder.prefill(prompt)]
    while decoder.accepted < 2:
        text += decoder.round(2)[1]
    _, logits = device.prefill(np.array([decoder.last, *more]), decoder.position, decoder.accepted)
    continued = logits.copy()
    _, following = device.verify(np.array([7, 8]), len(text) + len(more), 0)
    following = following.copy()

    device.start(256, window=3)
    _, fresh = device.prefill(np.array([*text, *more]), 0, 0)
    assert np.abs(continued - fresh).max() < 2e-3 * np.abs(fresh).max()
    _, fresh = device.verify(np.array([7, 8]), len(text) + len(more), 0)
    assert np.abs(following - fresh).max() < 2e-3 * np.abs(fresh).max()


def test_ring_calls_are_one_recurrence_over_the_true_rows() -> None:
    """Prefill, verify with rejected rows, verify, prefill longer than the ring, verify: y, state and ring."""
    sizes, true = Sizes(2, 4, 16, 16), 3 + 2 + 8 + 40 + 1
    attributes = {**dataclasses.asdict(sizes), "epsilon": 1e-6}
    widths = (sizes.z_offset, sizes.value_width, sizes.num_v_heads, sizes.num_v_heads)
    rows = [torch.randn(true, width) for width in widths]
    weights = [torch.randn(sizes.z_offset, 4), torch.randn(4), torch.randn(4), torch.randn(16)]
    zeros = torch.zeros(4, 16, 16)
    expected, _, _ = mix((*rows, *weights), zeros, torch.zeros(3, sizes.z_offset), **attributes)

    state, ring, position = zeros, torch.zeros(RING, sizes.row_stride), 0
    calls: list[tuple[Callable[..., tuple[torch.Tensor, ...]], int, int, int]] = [
        (GATED_DELTA_NET_RING_PREFILL, 3, 0, 0),  # op, true rows, rejected rows, pending rows
        (GATED_DELTA_NET_RING, 2, 3, 0),
        (GATED_DELTA_NET_RING, 8, 0, 2),
        (GATED_DELTA_NET_RING_PREFILL, 40, 0, 8),
        (GATED_DELTA_NET_RING, 1, 7, 0),
    ]
    for op, count, rejected, accepted in calls:
        end = position + count
        own = [torch.cat([part[position:end], torch.randn(rejected, part.shape[1])]) for part in rows]
        before = [torch.tensor([number], dtype=torch.int32) for number in (position, accepted)]
        y, state, ring = op(*own, *weights, *before, state, ring, **attributes)
        torch.testing.assert_close(y[:count], expected[position:end], rtol=1e-5, atol=1e-5)
        committed = end if op is GATED_DELTA_NET_RING_PREFILL else position
        _, want, _ = mix(
            (*(r[:committed] for r in rows), *weights), zeros, torch.zeros(3, sizes.z_offset), **attributes
        )
        torch.testing.assert_close(state, want, rtol=1e-5, atol=1e-5)
        position = end
    kept = torch.cat([part[-12:] for part in rows], dim=1)  # seven of its 32 rows are rejected ones
    assert torch.equal(ring[torch.arange(true - 12, true) % RING, : kept.shape[1]], kept)


def test_float16_caches_clamp_what_does_not_fit() -> None:
    inputs, attributes = next(
        case for case in KV_APPEND.cases(torch.Generator(), 2) if case[1]["cache_dtype"] != "float32"
    )
    k, v, *rest = inputs
    v = torch.full_like(v, 1e6) * torch.tensor([[1.0], [-1.0]])
    inputs = (k, v, *rest)
    (out,) = run(session(KV_APPEND, inputs, attributes, True), KV_APPEND, inputs)
    want = KV_APPEND(*inputs, **attributes)
    np.testing.assert_array_equal(out[1], want[1].numpy())
    assert (out[1, :, 0] == 65504).all() and (out[1, :, 1] == -65504).all()
