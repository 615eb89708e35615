"""`export.checkpoint`: every layout of the same weights against its dequantized twin, and bad directories.

python -m pytest tests/test_checkpoint.py
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint, load_weights, read_header
from export.errors import UserError
from tests.checkpoints import (
    LAYOUTS,
    Layout,
    State,
    quantize_nvfp4,
    random_state,
    tiny_config,
    transformers_model,
    write_checkpoint,
)

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
FAMILIES = ("qwen3_5_moe", "qwen3_5", "qwen3_next")
MIXES: list[dict[str, Any]] = [
    {"shards": 1, "mtp": "inside", "mtp_experts": "stacked", "experts": "stacked"},
    {"shards": 3, "mtp": "sidecar", "mtp_experts": "split", "experts": "split", "vision": True},
]
state_of = functools.cache(lambda family: random_state(tiny_config(family)))


def export(directory: Path) -> tuple[Checkpoint, State]:
    """Open, write, read back; the file has exactly the tensors that were promised."""
    checkpoint = Checkpoint.open(directory)
    checkpoint.write_weights(directory / "weights.out")
    weights = load_weights(directory / "weights.out")
    promised = {name: spec.shape for name, spec in checkpoint.tensors.items()}
    assert promised == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    dtypes = {name: found.dtype for name, found in read_header(directory / "weights.out").items()}
    assert dtypes == {name: spec.dtype for name, spec in checkpoint.tensors.items()}
    return checkpoint, weights


def dequantize(weights: State) -> State:
    """Canonical weights -> canonical float32, by the formulas that the contract states."""
    out: State = {}
    for name, w in weights.items():
        if name.endswith((".weight_scale", ".weight_scale_2")):
            continue
        if w.dtype == torch.uint8:
            codes = torch.stack([w & 15, w >> 4], -1).flatten(-2).long()
            values = E2M1[codes].unflatten(-1, (-1, 16)) * weights[f"{name}_scale"].float()[..., None]
            total = weights[f"{name}_scale_2"]
            if total.dim():  # experts: one per expert and part, spread over the rows of the part
                rows = total.reshape(w.shape[0], -1)
                total = rows.repeat_interleave(w.shape[1] // rows.shape[1], 1)[..., None]
            w = values.flatten(-2) * total
        elif w.dtype == torch.float8_e4m3fn:
            w = w.float() * weights[f"{name}_scale"]
        out[name] = w.float()
    return out


def canonical(twin: State, config: dict[str, Any]) -> State:
    """The twin under canonical names; Qwen3-Next's fused projections taken apart by transformers."""
    out: State = {}
    for name, w in twin.items():
        name = name.removeprefix("model.")
        if name.endswith(".in_proj_ba.weight"):
            continue
        if name.endswith(".in_proj_qkvz.weight"):
            base = name.removesuffix("in_proj_qkvz.weight")
            ba = twin[f"model.{base}in_proj_ba.weight"]
            module = transformers_model(config).model.layers[0].linear_attn
            q, k, v, z, b, a = module.fix_query_key_value_ordering(w.T[None], ba.T[None])
            q, k, v, z = (x.reshape(1, w.shape[1], -1) for x in (q, k, v, z))
            parts = {"qkv": torch.cat([q, k, v], -1), "z": z, "b": b, "a": a}
            out |= {f"{base}in_proj_{part}.weight": x[0].T for part, x in parts.items()}
            continue
        if name.endswith("conv1d.weight"):
            w = w.squeeze(1)
        out[f"{name}.weight" if name.endswith((".gate_up_proj", "experts.down_proj")) else name] = w
    return out


def assert_same(weights: State, twin: State, config: dict[str, Any], ulps: int = 0) -> None:
    found, expected = dequantize(weights), canonical(twin, config)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error = (found[name] - want).abs()
        assert found[name].shape == want.shape, name
        bad = (error > ulps * 2.0**-23 * want.abs()).sum().item()
        assert not bad, f"{name}: {bad} differ, at most {error.max():.3g}, mean {error.mean():.3g}"


# Layouts


@pytest.mark.parametrize("mix", MIXES, ids=["plain", "spread"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layout_equals_its_twin(tmp_path: Path, family: str, layout: Layout, mix: dict[str, Any]) -> None:
    config = tiny_config(family)
    twin = write_checkpoint(tmp_path, config, state_of(family), layout, **mix)
    checkpoint, weights = export(tmp_path)
    # 1 / (1 / G) in place of / G: a rounding of the reciprocal and one of the product
    assert_same(weights, twin, config, ulps=2 if layout.startswith("compressed") else 0)
    assert checkpoint.has_mtp and "mtp.fc" in checkpoint.formats
    skipped = [note for note in checkpoint.notes if "vision" in note]
    assert skipped == (["skipped 3 vision tensors under model.visual."] if "vision" in mix else [])


def test_formats_are_those_of_the_layout(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"), "modelopt_mixed")
    checkpoint = Checkpoint.open(tmp_path)
    assert {
        name: checkpoint.formats[name]
        for name in ("layers.0.mlp.experts", "layers.0.linear_attn.in_proj_qkv", "layers.3.self_attn.o_proj")
    } == {
        "layers.0.mlp.experts": "nvfp4",
        "layers.0.linear_attn.in_proj_qkv": "fp8",
        "layers.3.self_attn.o_proj": "fp8",
    }
    assert (checkpoint.formats["lm_head"], checkpoint.formats["mtp.layers.0.mlp.experts"]) == (
        "nvfp4",
        "float",
    )
    assert set(checkpoint.formats.values()) == {"float", "fp8", "nvfp4"}
    assert checkpoint.tensors["layers.0.mlp.experts.gate_up_proj.weight"] == ("U8", (8, 32, 16))
    assert checkpoint.tensors["layers.0.mlp.experts.gate_up_proj.weight_scale_2"] == ("F32", (8, 2))
    assert checkpoint.tensors["layers.0.mlp.experts.down_proj.weight_scale_2"] == ("F32", (8,))
    assert checkpoint.tensors["lm_head.weight_scale_2"] == ("F32", ())
    assert any("13 input_scale" in note and "1 k_scale" in note for note in checkpoint.notes)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_other_float_types(tmp_path: Path, dtype: str) -> None:
    config = tiny_config()
    twin = write_checkpoint(tmp_path, config, state_of("qwen3_5_moe"), dtype=dtype)
    checkpoint, weights = export(tmp_path)
    assert_same(weights, twin, config)
    assert checkpoint.tensors["layers.0.mlp.experts.down_proj.weight"].dtype == dtype


@pytest.mark.parametrize("layout", ["float", "modelopt_mixed"])
def test_tied_embeddings(tmp_path: Path, layout: Layout) -> None:
    config = tiny_config("qwen3_5", tie_word_embeddings=True)
    twin = write_checkpoint(tmp_path, config, random_state(config), layout)
    checkpoint, weights = export(tmp_path)
    assert_same(weights, twin, config)
    assert "lm_head" not in checkpoint.formats and not any("lm_head" in name for name in weights)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", ""])
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    config = tiny_config("qwen3_5")
    twin = write_checkpoint(tmp_path, config, state_of("qwen3_5"), "modelopt_mixed", prefix=prefix)
    if prefix.startswith("language_model."):
        edit(tmp_path, lambda state: {f"language_model.{n}" if "lm_head" in n else n: t for n, t in state.items()})
    assert_same(export(tmp_path)[1], twin, config)


@pytest.mark.parametrize("mtp", ["none", "sidecar"])
def test_without_a_head(tmp_path: Path, mtp: Any) -> None:
    """The config may speak of a head that a repack dropped; then there is none."""
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"), mtp=mtp)
    (tmp_path / "model_mtp.safetensors").unlink(missing_ok=True)
    checkpoint, weights = export(tmp_path)
    assert not checkpoint.has_mtp and checkpoint.config.mtp_num_hidden_layers == 0
    assert not any(name.startswith("mtp.") for name in (*weights, *checkpoint.formats))
    assert any(note.startswith("no MTP head") for note in checkpoint.notes)


def test_a_head_that_the_config_does_not_mention(tmp_path: Path) -> None:
    config = tiny_config()
    twin = write_checkpoint(tmp_path, config, state_of("qwen3_5_moe"))
    edit_config(tmp_path, lambda c: c["text_config"].pop("mtp_num_hidden_layers"))
    checkpoint, weights = export(tmp_path)
    assert checkpoint.config.mtp_num_hidden_layers == 1
    assert_same(weights, twin, config)


def test_a_second_head_in_a_sidecar_is_left_alone(tmp_path: Path) -> None:
    config = tiny_config()
    twin = write_checkpoint(tmp_path, config, state_of("qwen3_5_moe"))
    save_file({"mtp.fc.weight": torch.zeros(32, 64)}, tmp_path / "model_mtp.safetensors")
    checkpoint, weights = export(tmp_path)
    assert_same(weights, twin, config)
    assert any(note.startswith("ignored model_mtp.safetensors") for note in checkpoint.notes)


@pytest.mark.parametrize("join", [".", "_"])
@pytest.mark.parametrize("layout", ["modelopt_nvfp4", "compressed_tensors"])
def test_stacked_nvfp4_experts(tmp_path: Path, layout: Layout, join: str) -> None:
    config = tiny_config()
    twin = write_checkpoint(tmp_path, config, state_of("qwen3_5_moe"), layout)
    split = export(tmp_path)[1]
    kinds = ("weight", "weight_scale", "weight_scale_2")
    if layout == "compressed_tensors":
        kinds = ("weight_packed", "weight_scale", "weight_global_scale")

    def stack(state: State) -> State:
        kept = {n: t for n, t in state.items() if ".mlp.experts." not in n or n.startswith("mtp.")}
        for layer in range(4):
            base = f"model.language_model.layers.{layer}.mlp.experts."
            for part in ("gate_up_proj", "down_proj"):
                names = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
                for kind in kinds:
                    each = [torch.cat([state[f"{base}{e}.{n}.{kind}"].reshape(-1) for n in names]) for e in range(8)]
                    columns = state[f"{base}0.{names[0]}.{kind}"].shape[1:]
                    stacked = torch.stack(each).reshape(8, -1, *columns) if kind != kinds[2] else torch.stack(each)
                    name = base + part + ("" if kind == "weight" else f"{join}{kind}")
                    kept[name.replace("_weight_packed", "_packed")] = stacked
        return kept

    edit(tmp_path, stack)
    weights = export(tmp_path)[1]
    assert all(torch.equal(weights[n].view(torch.uint8), t.view(torch.uint8)) for n, t in split.items() if t.dim())
    assert_same(weights, twin, config, ulps=2)


def test_the_twin_is_what_compressed_tensors_decodes() -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    w = torch.randn(32, 64) * torch.logspace(-2, 1, 32)[:, None]
    parts, values = quantize_nvfp4(w, reciprocal=True)
    codes = unpack_fp4_from_uint8(parts["codes"], 32, 64, torch.float32).reshape(32, 4, 16)
    theirs = (codes * (parts["scale"].float() / parts["global"])[..., None]).reshape(32, 64)
    torch.testing.assert_close(values, theirs, rtol=2**-22, atol=0)
    assert ((values - w).norm() / w.norm()).item() < 0.12


def test_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "blobs", tiny_config(), state_of("qwen3_5_moe"), shards=2)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    checkpoint = Checkpoint.open(tmp_path / "snapshot")
    names = [path.name for path in checkpoint.files()]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert names == ["config.json", "model.safetensors.index.json", *shards]


def test_a_leftover_rope_buffer_is_not_swallowed(tmp_path: Path) -> None:
    """Anything without a use is named, however harmless it looks."""
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"))
    edit(tmp_path, lambda state: state | {"model.language_model.rotary_emb.inv_freq": torch.zeros(2)})
    refuses(tmp_path, r"unused tensor 'model\.language_model\.rotary_emb\.inv_freq'")


# Bad directories


def edit(directory: Path, change: Callable[[State], State]) -> None:
    path = directory / "model.safetensors"
    save_file({n: t.clone().contiguous() for n, t in change(load_file(path)).items()}, path)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def refuses(directory: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        export(directory)
    assert "\n" not in str(caught.value)


def test_no_directory(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "nowhere: no such directory")
    refuses(tmp_path, r"config\.json: no such file")
    (tmp_path / "config.json").write_text("{nope")
    refuses(tmp_path, r"config\.json: not JSON")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    refuses(tmp_path, r"config\.json: not JSON")
    (tmp_path / "config.json").write_text("[]")
    refuses(tmp_path, r"config\.json: not a JSON object")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refuses(tmp_path, "model_type 'llama'")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    refuses(tmp_path, r"model\.safetensors: missing, and no model\.safetensors\.index\.json")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    refuses(tmp_path, r"model\.safetensors\.index\.json too, which the shards here need")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"), shards=2)
    return tmp_path


SHARD = "model-00002-of-00002.safetensors"


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    refuses(sharded, f"{SHARD}: named by model.safetensors.index.json, but missing")


@pytest.mark.parametrize(("size", "message"), [(4, "truncated"), (3000, "truncated"), (-1, "truncated")])
def test_a_truncated_shard(sharded: Path, size: int, message: str) -> None:
    os.truncate(sharded / SHARD, size if size > 0 else (sharded / SHARD).stat().st_size - 1)
    refuses(sharded, f"{SHARD}: {message}")


def test_a_shard_with_a_corrupt_header(sharded: Path) -> None:
    content = bytearray((sharded / SHARD).read_bytes())
    content[20:24] = b"\x00\x01\x02\x03"
    (sharded / SHARD).write_bytes(content)
    refuses(sharded, f"{SHARD}: corrupt header")


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", 3]
)
def test_an_index_that_leaves_the_directory(sharded: Path, place: object) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = place
    path.write_text(json.dumps(index))
    refuses(sharded, r"index\.json: tensor 'lm_head\.weight' is placed in .*expected the name of a")


def test_other_bad_indexes(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.bias"] = SHARD
    path.write_text(json.dumps(index))
    refuses(sharded, f"{SHARD}: .*places tensor 'lm_head.bias' there")
    path.write_text(json.dumps({"metadata": {}}))
    refuses(sharded, r"index\.json: no weight_map")
    path.write_text("")
    refuses(sharded, r"index\.json: not JSON")


LAYER = "model.language_model.layers.0."
ATTENTION = "model.language_model.layers.3.self_attn."
EDITS: list[tuple[str, Layout, Callable[[State], dict[str, Any]]]] = [
    # (message, layout, tensors to replace; None removes one)
    (rf"'{LAYER}linear_attn.A_log' is missing", "float", lambda s: {f"{LAYER}linear_attn.A_log": None}),
    ("'lm_head.weight' is missing.*tie_word_embeddings", "float", lambda s: {"lm_head.weight": None}),
    ("'mtp.fc.weight' is missing", "float", lambda s: {"mtp.fc.weight": None}),
    (
        rf"'{LAYER}mlp.experts.3.up_proj.weight' is missing \(looked for .*experts.gate_up_proj or",
        "modelopt_mixed",
        lambda s: {f"{LAYER}mlp.experts.3.up_proj.weight": None},
    ),
    (
        rf"'{LAYER}mlp.experts.3.up_proj.weight_scale_2' is missing",
        "modelopt_mixed",
        lambda s: {f"{LAYER}mlp.experts.3.up_proj.weight_scale_2": None},
    ),
    (
        rf"'{ATTENTION}q_norm.weight' has shape \[8\], expected \[16\]",
        "float",
        lambda s: {f"{ATTENTION}q_norm.weight": torch.zeros(8)},
    ),
    (
        rf"'{ATTENTION}q_proj.weight' has shape \[64, 32\], expected \[128, 32\]",
        "modelopt_mixed",
        lambda s: {f"{ATTENTION}q_proj.weight": s[f"{ATTENTION}q_proj.weight"][:64]},
    ),
    (
        r"'lm_head.weight' has shape \[64, 8\], expected \[64, 16\]",
        "modelopt_mixed",
        lambda s: {"lm_head.weight": s["lm_head.weight"][:, :8]},
    ),
    (
        r"'lm_head.weight_scale' has shape \[64, 1\], expected \[64, 2\]",
        "modelopt_mixed",
        lambda s: {"lm_head.weight_scale": s["lm_head.weight_scale"][:, :1]},
    ),
    (
        r"'lm_head.weight_scale' has dtype F32, expected F8_E4M3",
        "modelopt_mixed",
        lambda s: {"lm_head.weight_scale": s["lm_head.weight_scale"].float()},
    ),
    (r"'lm_head.weight' has dtype I32", "float", lambda s: {"lm_head.weight": s["lm_head.weight"].int()}),
    (
        rf"'{LAYER}mlp.gate.weight' has dtype U8",
        "float",
        lambda s: {f"{LAYER}mlp.gate.weight": s[f"{LAYER}mlp.gate.weight"].to(torch.uint8)},
    ),
    ("unused tensor 'lm_head.bias'", "float", lambda s: {"lm_head.bias": torch.zeros(64)}),
    (
        "unused tensor 'model.language_model.layers.4.x' and 1 more",
        "float",
        lambda s: {f"model.language_model.layers.4.{n}": torch.zeros(1) for n in "xy"},
    ),
    (
        "'model.embed_tokens.weight' is 'model.language_model.embed_tokens.weight' .*once more"
        "|'model.language_model.embed_tokens.weight' is 'model.embed_tokens.weight' .*once more",
        "float",
        lambda s: {"model.embed_tokens.weight": torch.zeros(64, 32)},
    ),
    (
        rf"'{ATTENTION}k_proj.weight_scale' has shape \[32, 1\].*per channel are not supported",
        "compressed_tensors_mixed",
        lambda s: {f"{ATTENTION}k_proj.weight_scale": torch.ones(32, 1)},
    ),
    (
        rf"'{ATTENTION}k_proj.weight_scale_inv'.*block scales are not supported.*supported: ",
        "modelopt_mixed",
        lambda s: {f"{ATTENTION}k_proj.weight_scale_inv": torch.ones(1, 1)},
    ),
    (
        rf"'{ATTENTION}k_proj.weight_scale' holds nan",
        "modelopt_mixed",
        lambda s: {f"{ATTENTION}k_proj.weight_scale": torch.tensor(torch.nan)},
    ),
    (
        rf"'{ATTENTION}k_proj.weight_global_scale' holds 0",
        "compressed_tensors",
        lambda s: {f"{ATTENTION}k_proj.weight_global_scale": torch.zeros(1)},
    ),
    (
        rf"'{ATTENTION}k_proj.weight' is float, but the config \(ModelOpt MIXED_PRECISION\) declares fp8",
        "modelopt_mixed",
        lambda s: {
            f"{ATTENTION}k_proj.weight": torch.zeros(32, 32),
            f"{ATTENTION}k_proj.weight_scale": None,
            f"{ATTENTION}k_proj.input_scale": None,
        },
    ),
    (
        rf"'{LAYER}linear_attn.in_proj_b.weight' is fp8, but .* declares float",
        "modelopt_nvfp4",
        lambda s: {
            f"{LAYER}linear_attn.in_proj_b.weight": torch.zeros(4, 32).to(torch.float8_e4m3fn),
            f"{LAYER}linear_attn.in_proj_b.weight_scale": torch.tensor(1.0),
        },
    ),
    (
        r"FP8 experts \(layers.0.mlp.experts.0.gate_proj\) are not supported",
        "float",
        lambda s: _fp8_experts(s),
    ),
    (
        r"experts of one layer differ: .*gate_up_proj is float \(BF16\), .*down_proj is float \(F32\)",
        "float",
        lambda s: {f"{LAYER}mlp.experts.down_proj": s[f"{LAYER}mlp.experts.down_proj"].float()},
    ),
]


def _fp8_experts(state: State) -> dict[str, Any]:
    base = f"{LAYER}mlp.experts"
    changes: dict[str, Any] = {f"{base}.gate_up_proj": None, f"{base}.down_proj": None}
    for e in range(8):
        for part, shape in (("gate_proj", (16, 32)), ("up_proj", (16, 32)), ("down_proj", (32, 16))):
            changes[f"{base}.{e}.{part}.weight"] = torch.zeros(shape).to(torch.float8_e4m3fn)
            changes[f"{base}.{e}.{part}.weight_scale"] = torch.tensor(1.0)
    return changes


@pytest.mark.parametrize(("message", "layout", "change"), EDITS, ids=[str(i) for i in range(len(EDITS))])
def test_bad_tensors(tmp_path: Path, message: str, layout: Layout, change: Callable[[State], dict[str, Any]]) -> None:
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"), layout)
    export(tmp_path)
    edit(tmp_path, lambda s: {n: t for n, t in {**s, **change(s)}.items() if t is not None})
    refuses(tmp_path, rf"model\.safetensors: .*(?:{message})")


def test_a_tied_config_with_a_head_of_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"), "modelopt_mixed")
    edit_config(tmp_path, lambda c: c.update(tie_word_embeddings=True))
    refuses(tmp_path, "'lm_head.weight' is quantized, but tied")
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"), "float")
    (tmp_path / "hf_quant_config.json").unlink()
    edit_config(tmp_path, lambda c: c.update(tie_word_embeddings=True))
    assert any(note.startswith("ignored lm_head.weight") for note in export(tmp_path)[0].notes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 3, "unused tensor"),
        ("num_hidden_layers", 8, r"layers\.4\..* is missing"),
        ("hidden_size", 64, r"embed_tokens\.weight' has shape \[64, 32\], expected \[64, 64\]"),
        ("num_experts", 4, r"gate\.weight' has shape \[8, 32\], expected \[4, 32\]"),
    ],
)
def test_a_config_of_another_model(tmp_path: Path, field: str, value: int, message: str) -> None:
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"))
    changed: dict[str, Any] = {field: value}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(**changed)))
    refuses(tmp_path, message)


# Declared quantization


NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}


def _compressed(weights: dict[str, Any], form: str = "nvfp4-pack-quantized") -> dict[str, Any]:
    groups = {"group_7": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "mxfp4"}, "quant_method 'mxfp4'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method 'fp8'"),
        ({"bits": 4}, "quant_method None"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "quant_algo 'FP8_PB_WO'"),
        ({"quant_method": "modelopt"}, "quant_algo None"),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"lm_head": {"quant_algo": "MXFP8"}},
            },
            r"quantized_layers\['lm_head'\]\.quant_algo 'MXFP8'",
        ),
        (_compressed(NVFP4, "pack-quantized"), "format 'pack-quantized'"),
        (_compressed(NVFP4, "mxfp4-pack-quantized"), "format 'mxfp4-pack-quantized'"),
        (_compressed(NVFP4 | {"type": "int"}), r"config_groups\.group_7\.weights .*type 'int'"),
        (_compressed(NVFP4 | {"group_size": 32}), r"group_7\.weights .*group_size 32"),
        (_compressed({"num_bits": 8, "type": "float", "strategy": "block"}), "group_7.*'block'"),
    ],
)
def test_unknown_quantization_is_named(tmp_path: Path, quantization: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"))
    edit_config(tmp_path, lambda c: c.update(quantization_config=quantization))
    refuses(tmp_path, f"{message}.*not supported.*supported: .*NVFP4.*MIXED_PRECISION.*compressed-tensors")


def test_declarations_that_contradict_each_other(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(), state_of("qwen3_5_moe"), "modelopt_mixed")
    edit_config(tmp_path, lambda c: c["quantization_config"].update(quant_algo="NVFP4"))
    refuses(tmp_path, r"hf_quant_config\.json: .*'MIXED_PRECISION' contradicts 'NVFP4'")
    edit_config(tmp_path, lambda c: c.update(quantization_config=_compressed(NVFP4)))
    refuses(tmp_path, r"hf_quant_config\.json: contradicts .*compressed-tensors")


def test_declared_nowhere_is_read_by_its_tensors(tmp_path: Path) -> None:
    config = tiny_config()
    twin = write_checkpoint(tmp_path, config, state_of("qwen3_5_moe"), "modelopt_nvfp4")
    (tmp_path / "hf_quant_config.json").unlink()
    assert_same(export(tmp_path)[1], twin, config)


def test_a_float_linear_that_no_list_excludes_is_noted(tmp_path: Path) -> None:
    config = tiny_config()
    twin = write_checkpoint(tmp_path, config, state_of("qwen3_5_moe"), "compressed_tensors")
    edit_config(tmp_path, lambda c: c["quantization_config"].update(ignore=["lm_head"]))
    checkpoint, weights = export(tmp_path)
    assert_same(weights, twin, config, ulps=2)
    assert any("stored as floats" in note and "in_proj_qkv" in note for note in checkpoint.notes)


# Memory


_CHILD = """
import resource, sys
from pathlib import Path
from export.checkpoint import Checkpoint
Checkpoint.open(Path(sys.argv[1])).write_weights(Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def sparse_checkpoint(directory: Path, layers: int) -> int:
    """A checkpoint of 12 MB a layer, all zeros, that takes no room on the disk; returns its size."""
    config = tiny_config(
        num_hidden_layers=layers, hidden_size=256, num_experts=32, moe_intermediate_size=256, vocab_size=1024
    )
    with torch.device("meta"):
        state = dict(transformers_model(config).state_dict())
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in state.items():
        span = [at, at + 2 * tensor.numel()]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (directory / "config.json").write_text(json.dumps(config))
    return at


def test_peak_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (8, 32):
        directory, target = tmp_path / str(layers), tmp_path / "weights.safetensors"
        directory.mkdir()
        sizes.append(sparse_checkpoint(directory, layers))
        command = [sys.executable, "-c", _CHILD, str(directory), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        peaks.append(int(done.stdout) * 1024)
        assert target.stat().st_size > sizes[-1]
        target.unlink()
    grown, more = peaks[1] - peaks[0], sizes[1] - sizes[0]
    assert more > 256 << 20 and grown < 64 << 20, f"{grown >> 20} MiB more for {more >> 20} MiB of weights"
