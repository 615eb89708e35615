"""`export.config`: every spelling of a config.json that is read, and every field that is refused by name.

python -m pytest tests/test_config.py
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.config import ModelConfig
from export.errors import UserError
from tests.checkpoints import text_config, tiny_config

FAMILIES = ("qwen3_5_moe", "qwen3_5", "qwen3_next")


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_the_family(family: str) -> None:
    config = ModelConfig.from_hf(tiny_config(family))
    assert config.model_type == family
    assert config.layer_types == ("linear_attention",) * 3 + ("full_attention",)
    assert (config.num_experts, config.intermediate_size) == ((0, 48) if family == "qwen3_5" else (8, 0))
    assert (config.head_dim, config.rotary_dim, config.rope_theta) == (16, 4, 1e4)
    assert (config.key_dim, config.value_dim, config.conv_dim) == (32, 64, 128)
    assert config.mtp_num_hidden_layers == 1 and not config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_nested_and_flat_are_the_same(family: str) -> None:
    nested = tiny_config(family)
    assert ModelConfig.from_hf(text_config(nested)) == ModelConfig.from_hf(nested)


def test_qwen3_6_as_published() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    text = {
        "model_type": "qwen3_5_moe_text", "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40,
        "full_attention_interval": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "max_position_embeddings": 262144,
        "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "attn_output_gate": True,
        "shared_expert_intermediate_size": 512, "mtp_num_hidden_layers": 1, "eos_token_id": 248044,
        "rope_parameters": rope | {"mrope_section": [11, 11, 10], "mrope_interleaved": True},
    }  # fmt: skip
    config = ModelConfig.from_hf({"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {}})
    assert config.layer_types.count("full_attention") == 10
    assert (config.rotary_dim, config.conv_dim, config.eos_token_id) == (64, 8192, (248044,))


def test_layer_types_follow_the_interval() -> None:
    config = tiny_config(num_hidden_layers=6, full_attention_interval=3)
    del config["text_config"]["layer_types"]
    full = [i for i, t in enumerate(ModelConfig.from_hf(config).layer_types) if t == "full_attention"]
    assert full == [2, 5]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}},
        {"rope_scaling": None, "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        {
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
            "rope_theta": 5e6,
            "partial_rotary_factor": 0.5,
        },
    ],
)
def test_rope_spellings(rope: dict[str, Any]) -> None:
    config = tiny_config()
    del config["text_config"]["rope_parameters"]
    config["text_config"] |= rope
    read = ModelConfig.from_hf(config)
    assert (read.rope_theta, read.rotary_dim) == (5e6, 8)


@pytest.mark.parametrize("inside", [True, False])
def test_tied_embeddings_at_either_level(inside: bool) -> None:
    config = tiny_config()
    del config["tie_word_embeddings"]
    (config["text_config"] if inside else config)["tie_word_embeddings"] = True
    assert ModelConfig.from_hf(config).tie_word_embeddings


def test_stop_ids_come_from_the_generation_config_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(eos_token_id=3)))
    assert ModelConfig.from_hf(tmp_path).eos_token_id == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    assert ModelConfig.from_hf(tmp_path).eos_token_id == (5, 3)
    assert ModelConfig.from_hf(tmp_path / "config.json").eos_token_id == (5, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_manifest_round_trip(family: str) -> None:
    config = ModelConfig.from_hf(tiny_config(family, eos_token_id=[1, 2]))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("change", [{"colour": 1}, {"head_dim": None}])
def test_manifest_with_other_fields(change: dict[str, Any]) -> None:
    values = ModelConfig.from_hf(tiny_config()).to_dict() | change
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(UserError, match=next(iter(change))):
        ModelConfig.from_dict(values)


REFUSED: list[tuple[str, str, Any]] = [
    ("qwen3_5_moe", "hidden_act", "gelu"),
    ("qwen3_5_moe", "attn_output_gate", False),
    ("qwen3_5_moe", "attention_bias", True),
    ("qwen3_5_moe", "mtp_use_dedicated_embeddings", True),
    ("qwen3_5_moe", "mtp_num_hidden_layers", 2),
    ("qwen3_5_moe", "num_key_value_heads", 3),
    ("qwen3_5_moe", "linear_num_key_heads", 3),
    ("qwen3_5_moe", "num_experts_per_tok", 9),
    ("qwen3_5_moe", "shared_expert_intermediate_size", 0),
    ("qwen3_5_moe", "shared_expert_intermediate_size", None),
    ("qwen3_5_moe", "hidden_size", "32"),
    ("qwen3_5_moe", "hidden_size", 32.0),
    ("qwen3_5_moe", "vocab_size", True),
    ("qwen3_5_moe", "num_hidden_layers", 10**12),
    ("qwen3_5_moe", "num_hidden_layers", 5),
    ("qwen3_5_moe", "head_dim", -16),
    ("qwen3_5_moe", "rms_norm_eps", float("nan")),
    ("qwen3_5_moe", "layer_types", ["linear_attention"] * 3 + ["sliding_attention"]),
    ("qwen3_5_moe", "layer_types", "full_attention"),
    ("qwen3_5_moe", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ("qwen3_5_moe", "rope_scaling", {"type": "dynamic"}),
    ("qwen3_5_moe", "rope_parameters", {"partial_rotary_factor": 0.25}),
    ("qwen3_5_moe", "eos_token_id", 64),
    ("qwen3_5", "intermediate_size", None),
    ("qwen3_next", "norm_topk_prob", False),
    ("qwen3_next", "decoder_sparse_step", 2),
    ("qwen3_next", "mlp_only_layers", [0]),
]


@pytest.mark.parametrize(("family", "field", "value"), REFUSED)
def test_refused_fields_are_named(family: str, field: str, value: Any) -> None:
    config = tiny_config(family)
    ModelConfig.from_hf(config)
    config.get("text_config", config)[field] = value
    named = {"num_key_value_heads": "num_attention_heads", "linear_num_key_heads": "linear_num_value_heads"}
    if isinstance(value, dict) and "partial_rotary_factor" in value:
        named[field] = "rope_theta"
    with pytest.raises(UserError, match=named.get(field, field)) as caught:
        ModelConfig.from_hf(config)
    assert "\n" not in str(caught.value)


def test_odd_rotary_dimensions() -> None:
    config = tiny_config()
    config["text_config"]["rope_parameters"]["partial_rotary_factor"] = 0.2  # 3 of 16
    with pytest.raises(UserError, match=r"partial_rotary_factor.* 3 of head_dim"):
        ModelConfig.from_hf(config)


def test_another_architecture() -> None:
    with pytest.raises(UserError, match=r"'llama'.*LlamaForCausalLM.*qwen3_5_moe"):
        ModelConfig.from_hf({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_value_in_any_field_is_read_or_refused(data: st.DataObject) -> None:
    config = copy.deepcopy(tiny_config(data.draw(st.sampled_from(FAMILIES))))
    levels = [config, config.get("text_config", config)]
    level = data.draw(st.sampled_from([*levels, levels[1]["rope_parameters"]]))
    field = data.draw(st.sampled_from(sorted(level)))
    level[field] = data.draw(JSON)
    try:
        read = ModelConfig.from_hf(config)
    except UserError as error:
        assert "\n" not in str(error) and "config.json" in str(error)
    else:
        assert ModelConfig.from_dict(json.loads(json.dumps(read.to_dict()))) == read


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON)
def test_any_object_at_all(value: Any) -> None:
    if isinstance(value, dict):
        with pytest.raises(UserError):
            ModelConfig.from_hf(value)
