"""The sizes of a Qwen3.5 / 3.6 / Next model, read from a Hugging Face `config.json` and checked.

Contract: `ModelConfig.from_hf` takes a checkpoint directory, a config.json or its parsed dict, with the
text model flat or nested under `text_config`. Field names are the ones of Hugging Face. A field that is
absent, malformed or outside what Tandem computes is a `UserError` that names it; defaults are those of transformers.

    python -c "from export.config import ModelConfig; print(ModelConfig.from_hf('path/to/checkpoint'))"
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from export.errors import UserError

LINEAR, FULL = "linear_attention", "full_attention"

# model_type in config.json (the nested text model's, where there is one) -> family
FAMILIES = {
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_5": "qwen3_5",
    "qwen3_5_text": "qwen3_5",
    "qwen3_next": "qwen3_next",
}

# Far above any model of the family; keeps a nonsense config from running for hours before it fails.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1024

# Fields whose value is fixed: anything else is another architecture.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attn_output_gate": True, "attention_bias": False}
_FIXED_NEXT: dict[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "max_position_embeddings",
)
_MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


@dataclass(frozen=True)
class ModelConfig:
    model_type: str  # "qwen3_5_moe", "qwen3_5" (dense) or "qwen3_next"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]  # "linear_attention" or "full_attention" per layer
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    partial_rotary_factor: float
    rope_theta: float
    rms_norm_eps: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    mtp_num_hidden_layers: int = 0
    num_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    intermediate_size: int = 0  # dense only
    eos_token_id: tuple[int, ...] = ()  # generation_config.json's where there is one

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def key_dim(self) -> int:
        """Width of q, and of k, in a GDN layer."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of v, and of z, in a GDN layer."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution of a GDN layer: q, k and v."""
        return 2 * self.key_dim + self.value_dim

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _check_size(name, getattr(self, name), 1)
        for name in (*_MOE, "intermediate_size", "mtp_num_hidden_layers"):
            _check_size(name, getattr(self, name), 0)
        _check_layers(self)
        _check_numbers(self)
        _check_divides("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self)
        _check_divides("linear_num_value_heads", self.linear_num_value_heads, "linear_num_key_heads", self)
        _check_mlp(self)
        if self.mtp_num_hidden_layers > 1:
            _reject("mtp_num_hidden_layers", self.mtp_num_hidden_layers, "Tandem drafts with one MTP layer")
        for token in self.eos_token_id:
            if not _is_int(token) or not 0 <= token < self.vocab_size:
                _reject("eos_token_id", token, f"expected token ids in 0..{self.vocab_size - 1}")

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Read a checkpoint directory, a config.json or its dict."""
        if isinstance(source, Mapping):
            return _from_hf(source, None)
        path = Path(source)
        directory = path if path.is_dir() else path.parent
        config = read_json(directory / "config.json" if path.is_dir() else path)
        generation = directory / "generation_config.json"
        return _from_hf(config, read_json(generation) if generation.exists() else None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; an unknown or absent field is an error."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if odd := sorted(fields ^ set(values)):
            raise UserError(f"model config: field {odd[0]!r} is unknown or absent; export the model again")
        kwargs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**kwargs)


def read_json(path: Path, mend: str = "download it again") -> dict[str, Any]:
    """A JSON object from a file of the checkpoint, or a UserError that names the file."""
    try:
        text = path.read_bytes().decode("utf-8")
        value = json.loads(text)
    except FileNotFoundError:
        where = "point at the directory of a Hugging Face checkpoint, with config.json in it"
        raise UserError(f"{path}: no such file; {where}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {mend}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object but a {type(value).__name__}; {mend}")
    return value


def _from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> ModelConfig:
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        _reject("text_config", text, "expected an object")
    family = _family(config, text)
    fixed = {**_FIXED, **(_FIXED_NEXT if family == "qwen3_next" else {})}
    for name, expected in fixed.items():
        value = text.get(name, expected)
        if (value or []) != [] if name == "mlp_only_layers" else value != expected:
            _reject(name, value, f"Tandem computes {json.dumps(expected)} only")
    if text.get("mtp_use_dedicated_embeddings"):
        _reject("mtp_use_dedicated_embeddings", True, "the MTP head shares the embedding with the main model")
    names = (*_POSITIVE, *(("intermediate_size",) if family == "qwen3_5" else _MOE))
    theta, partial_rotary_factor = _rope(text)
    # transformers puts tie_word_embeddings at the top level, some repacks inside text_config.
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    fields: dict[str, Any] = {name: _required(text, name) for name in names}
    return ModelConfig(
        model_type=family,
        **fields,
        layer_types=_layer_types(text),
        partial_rotary_factor=partial_rotary_factor,
        rope_theta=theta,
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=tied,
        mtp_num_hidden_layers=text.get("mtp_num_hidden_layers", 0),
        eos_token_id=_eos(config, text, generation),
    )


def _family(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    named = text.get("model_type", config.get("model_type"))
    family = FAMILIES.get(named) if isinstance(named, str) else None
    if family is None:
        architectures = config.get("architectures")
        raise UserError(
            f"config.json: model_type {named!r} (architectures {architectures!r}) is not supported; "
            f"Tandem reads Qwen3.6, Qwen3.5 and Qwen3-Next: model_type one of {', '.join(sorted(FAMILIES))}"
        )
    return family


def _layer_types(text: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = text.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list | tuple):
            _reject("layer_types", kinds, "expected a list")
        return tuple(kinds)
    interval = text.get("full_attention_interval", 4)
    _check_size("full_attention_interval", interval, 1)
    layers = _required(text, "num_hidden_layers")
    _check_size("num_hidden_layers", layers, 1)
    return tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(min(layers, _MAX_LAYERS + 1)))


def _rope(text: Mapping[str, Any]) -> tuple[Any, Any]:
    """(theta, partial_rotary_factor), from wherever this generation of configs keeps them."""
    theta, partial = text.get("rope_theta"), text.get("partial_rotary_factor", 0.25)
    for name in ("rope_scaling", "rope_parameters"):
        rope = text.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            _reject(name, rope, "expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        # "mrope" is the older spelling: for text its three axes carry one position, which is ordinary RoPE.
        if kind not in ("default", "mrope"):
            _reject(f"{name}.rope_type", kind, "Tandem computes the default RoPE only")
        theta, partial = rope.get("rope_theta", theta), rope.get("partial_rotary_factor", partial)
    if theta is None:
        _missing("rope_theta")
    return theta, partial


def _eos(config: Mapping[str, Any], text: Mapping[str, Any], generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    for file, source in (("generation_config.json", generation or {}), ("config.json", text), ("config.json", config)):
        eos = source.get("eos_token_id")
        if eos is None:
            continue
        ids = tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(_is_int(token) and 0 <= token < text.get("vocab_size", 0) for token in ids):
            raise UserError(f"{file}: eos_token_id is {eos!r}: expected ids of the vocabulary")
        return ids
    return ()


def _required(text: Mapping[str, Any], name: str) -> Any:
    value = text.get(name)
    if value is None:
        _missing(name)
    return value


def _missing(name: str) -> NoReturn:
    raise UserError(f"config.json: field {name} is absent; take the config.json of this checkpoint")


def _reject(name: str, value: object, why: str) -> NoReturn:
    raise UserError(f"config.json: {name} is {value!r}: {why}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(name: str, value: object, least: int) -> None:
    if not _is_int(value) or not least <= value <= _MAX_SIZE:  # type: ignore[operator]
        _reject(name, value, f"expected an integer from {least} to {_MAX_SIZE}")


def _check_divides(name: str, value: int, by_name: str, config: ModelConfig) -> None:
    if value % getattr(config, by_name):
        _reject(name, value, f"not a multiple of {by_name} ({getattr(config, by_name)})")


def _check_layers(config: ModelConfig) -> None:
    if config.num_hidden_layers > _MAX_LAYERS:
        _reject("num_hidden_layers", config.num_hidden_layers, f"expected at most {_MAX_LAYERS}")
    if len(config.layer_types) != config.num_hidden_layers:
        layers = f"num_hidden_layers ({config.num_hidden_layers})"
        _reject("layer_types", f"{len(config.layer_types)} entries", f"expected {layers} of them")
    for kind in config.layer_types:
        if kind not in (LINEAR, FULL):
            _reject("layer_types", kind, f"expected {LINEAR} or {FULL}")


def _check_numbers(config: ModelConfig) -> None:
    for name in ("partial_rotary_factor", "rope_theta", "rms_norm_eps"):
        value = getattr(config, name)
        if not (isinstance(value, float) or _is_int(value)) or not math.isfinite(value) or value <= 0:
            _reject(name, value, "expected a positive number")
    if config.partial_rotary_factor > 1:
        _reject("partial_rotary_factor", config.partial_rotary_factor, "expected at most 1")
    if config.rotary_dim < 2 or config.rotary_dim % 2:
        why = f"rotates {config.rotary_dim} of head_dim {config.head_dim} dimensions; expected an even number"
        _reject("partial_rotary_factor", config.partial_rotary_factor, why)
    if not isinstance(config.tie_word_embeddings, bool):
        _reject("tie_word_embeddings", config.tie_word_embeddings, "expected true or false")


def _check_mlp(config: ModelConfig) -> None:
    for name in _MOE if config.model_type != "qwen3_5" else ("intermediate_size",):
        _check_size(name, getattr(config, name), 1)
    if config.num_experts_per_tok > config.num_experts:
        most = f"expected at most num_experts ({config.num_experts})"
        _reject("num_experts_per_tok", config.num_experts_per_tok, most)
