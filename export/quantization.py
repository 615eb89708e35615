"""What a checkpoint declares about its quantization, to hold against the tensors it really has.

Contract: `read_declared` understands ModelOpt (`quantization_config` in config.json, hf_quant_config.json
or both) and compressed-tensors; any other method or algorithm is a `UserError` that names it and lists
the supported ones. The tensors themselves say how they are stored; a declaration that contradicts them
is an error, because one of the two belongs to another checkpoint.

    python -m pytest tests/test_checkpoint.py -k declar
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from export.config import read_json
from export.errors import UserError

# Where the text model may live in the tensor names; the first that fits is dropped.
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")

# ModelOpt's quant_algo -> the format of the weights. W4A16 and W4A4 differ in the activations only.
MODELOPT_ALGOS = {"NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", "NVFP4_W4A16": "nvfp4", "FP8": "fp8"}
COMPRESSED_FORMATS = (
    "nvfp4-pack-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
)
SUPPORTED = (
    "BF16/F16/F32; ModelOpt NVFP4, W4A16_NVFP4, FP8 (per tensor) and MIXED_PRECISION of these; "
    "compressed-tensors nvfp4-pack-quantized and float-quantized (FP8 per tensor)"
)


def strip_prefix(name: str) -> str:
    """A tensor's or module's name inside the text model."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


class Expectation(NamedTuple):
    """The declared format of one module; `firm` if it may not be stored as plain floats instead."""

    format: str
    firm: bool


@dataclass(frozen=True)
class Declared:
    label: str = "unquantized"
    default: str | None = None  # format of every linear that is neither excluded nor named
    layers: dict[str, str] | None = None  # module -> format: complete, all others are floats
    named: list[tuple[re.Pattern[str], str]] = field(default_factory=list)  # compressed-tensors targets
    excluded: re.Pattern[str] | None = None
    quantized: bool = False

    def expect(self, module: str) -> Expectation | None:
        """What is declared of a module (its name on disk); None where nothing is."""
        if self.layers is not None:
            stripped = strip_prefix(module)
            for name in _ancestors(stripped):
                if name in self.layers:
                    return Expectation(self.layers[name], True)
            return Expectation("float", True)
        if self.excluded and any(self.excluded.fullmatch(name) for name in _spellings(module)):
            return Expectation("float", True)
        for pattern, how in self.named:
            if any(pattern.fullmatch(name) for name in _spellings(module)):
                return Expectation(how, False)
        # An MTP head is often copied in unquantized after the fact, and no list says so: never firm.
        return Expectation(self.default, False) if self.default else None


def _ancestors(name: str) -> Iterable[str]:
    """The module, then what holds it: `a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _spellings(module: str) -> list[str]:
    """The module and its ancestors, as on disk and under each prefix a quantizer may have seen."""
    names = list(_ancestors(strip_prefix(module)))
    return [prefix + name for name in names for prefix in ("", *PREFIXES)]


def read_declared(config: Mapping[str, Any], directory: Path) -> Declared:
    """From config.json's content and, beside it, hf_quant_config.json."""
    where = "config.json: quantization_config"
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    inside = config.get("quantization_config") or nested
    sidecar = directory / "hf_quant_config.json"
    beside = read_json(sidecar).get("quantization") if sidecar.exists() else None
    for value, name in ((inside, where), (beside, f"{sidecar}: quantization")):
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"{name} is {value!r}: expected an object; download the file again")
    if inside:
        method = inside.get("quant_method")
        if method == "compressed-tensors":
            if beside:
                raise UserError(f"{sidecar}: contradicts {where} (compressed-tensors); remove one of them")
            return _compressed_tensors(inside, where)
        if not (isinstance(method, str) and method.startswith("modelopt")):
            raise UserError(f"{where}.quant_method {method!r} is not supported; supported: {SUPPORTED}")
    if inside and beside and inside.get("quant_algo") != beside.get("quant_algo"):
        algos = f"quant_algo {beside.get('quant_algo')!r} contradicts {inside.get('quant_algo')!r}"
        raise UserError(f"{sidecar}: {algos} of {where}; download both from one place")
    if inside or beside:
        return _modelopt(inside or beside or {}, where if inside else f"{sidecar}: quantization")
    return Declared()


def _modelopt(quantization: Mapping[str, Any], where: str) -> Declared:
    algo = quantization.get("quant_algo")
    label = f"ModelOpt {algo}"
    if algo is None and "quant_algo" in quantization:  # only the KV cache is quantized
        return Declared(label="unquantized (ModelOpt)")
    if algo == "MIXED_PRECISION":
        layers = quantization.get("quantized_layers")
        if not isinstance(layers, Mapping):
            raise UserError(f"{where}.quantized_layers is absent under MIXED_PRECISION; download it again")
        formats = {}
        for name, entry in layers.items():
            inner = entry.get("quant_algo") if isinstance(entry, Mapping) else entry
            formats[strip_prefix(name)] = _algo(inner, f"{where}.quantized_layers[{name!r}].quant_algo")
        return Declared(label, layers=formats, quantized=True)
    excluded = quantization.get("exclude_modules") or quantization.get("ignore") or []
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        raise UserError(f"{where}: the list of excluded modules is not a list of names; download it again")
    return Declared(
        label,
        default=_algo(algo, f"{where}.quant_algo"),
        excluded=_any_of(fnmatch.translate(name) for name in excluded),
        quantized=True,
    )


def _algo(algo: object, where: str) -> str:
    if not isinstance(algo, str) or algo not in MODELOPT_ALGOS:
        raise UserError(f"{where} {algo!r} is not supported; supported: {SUPPORTED}")
    return MODELOPT_ALGOS[algo]


def _compressed_tensors(quantization: Mapping[str, Any], where: str) -> Declared:
    packed = quantization.get("format")
    if packed not in COMPRESSED_FORMATS:
        raise UserError(f"{where}.format {packed!r} is not supported; supported: {SUPPORTED}")
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise UserError(f"{where}.config_groups is {groups!r}: expected an object; download it again")
    named: list[tuple[re.Pattern[str], str]] = []
    default = None
    for key, group in groups.items():
        how = _group_format(group, f"{where}.config_groups.{key}")
        for target in group.get("targets") or []:
            if target == "Linear":
                default = how
            elif pattern := _any_of([_target(str(target))]):
                named.append((pattern, how))
    excluded = _any_of(_target(str(name)) for name in quantization.get("ignore") or [])
    return Declared(f"compressed-tensors {packed}", default, None, named, excluded, True)


def _group_format(group: object, where: str) -> str:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise UserError(f"{where}.weights is absent; supported: {SUPPORTED}")
    bits, kind, size = weights.get("num_bits"), weights.get("type"), weights.get("group_size")
    if kind == "float" and bits == 4 and size == 16:
        return "nvfp4"
    # Scales per channel are caught by their shape, where the message can name the tensor.
    if kind == "float" and bits == 8 and weights.get("strategy") in ("tensor", "channel"):
        return "fp8"
    what = f"num_bits {bits}, type {kind!r}, strategy {weights.get('strategy')!r}, group_size {size}"
    raise UserError(f"{where}.weights ({what}) is not supported; supported: {SUPPORTED}")


def _target(name: str) -> str:
    """A compressed-tensors target or ignore entry as a pattern; `re:` ones need to match the start only."""
    return f"(?:{name[3:]}).*" if name.startswith("re:") else re.escape(name)


def _any_of(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    try:
        return re.compile(joined) if joined else None
    except re.error as error:
        raise UserError(f"quantization_config: {joined!r} is no pattern ({error}); mend it") from None
