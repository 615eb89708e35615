"""From the tensors a checkpoint has to the ones the weights file gets: one naming for every layout.

Contract: `Planner.plan` takes every tensor of the checkpoint exactly once and describes each output as
byte runs of the source files: experts are stacked, Qwen3-Next's fused projections taken apart by rows,
global scales turned the same way round, and no weight is ever decoded. A tensor that is missing, has an
unexpected shape or dtype, contradicts the declared quantization or has no use is a `UserError`.

    python -m export.checkpoint path/to/checkpoint
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, NoReturn

from export.config import FULL, ModelConfig
from export.errors import UserError
from export.quantization import SUPPORTED, Declared
from export.weights import DTYPES, Output, Run, Scalar

FLOATS = ("BF16", "F16", "F32")
GROUP = 16  # NVFP4 elements per block scale


class Source(NamedTuple):
    """One tensor as the checkpoint stores it."""

    name: str  # on disk, prefix included
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def run(self) -> Run:
        return Run(self.path, self.offset, self.length)

    def rows(self, spans: Iterable[tuple[int, int]]) -> list[Run]:
        """The bytes of rows start..stop of a matrix, for each span."""
        width = self.length // self.shape[0]
        return [Run(self.path, self.offset + a * width, (b - a) * width) for a, b in spans]

    def scalar(self, reciprocal: bool = False, index: int = 0) -> Scalar:
        offset = self.offset + index * DTYPES[self.dtype][0]
        return Scalar(self.path, self.name, self.dtype, offset, reciprocal)


class Matrix(NamedTuple):
    """One stored linear [N, K]; a stack of E of them where `experts` are stored as one tensor."""

    name: str
    format: str  # "float", "fp8" or "nvfp4"
    weight: Source
    scale: Source | None = None  # block scales of nvfp4
    total: tuple[Scalar, ...] = ()  # per-tensor scales


Spans = Sequence[tuple[int, int]]


class Planner:
    def __init__(
        self, config: ModelConfig, sources: dict[str, Source], declared: Declared, where: Path, prefix: str
    ) -> None:
        self.config = config
        self.declared = declared
        self.outputs: list[Output] = []
        self.formats: dict[str, str] = {}
        self.notes: list[str] = []
        self._sources = dict(sources)  # what nobody has taken yet, by name without prefix
        self._where = where  # the file to blame for what is missing
        self._prefix = prefix
        self._ignored: Counter[str] = Counter()
        self._undeclared: list[str] = []

    def plan(self) -> None:
        """Fill `outputs` and `formats`, layer by layer; nothing may be left over."""
        config, hidden = self.config, self.config.hidden_size
        self._plain("embed_tokens.weight", (config.vocab_size, hidden))
        for i, kind in enumerate(config.layer_types):
            self._layer(f"layers.{i}", kind)
        self._plain("norm.weight", (hidden,))
        self._lm_head()
        if config.mtp_num_hidden_layers:
            self._linear("mtp.fc", hidden, 2 * hidden)
            for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
                self._plain(f"mtp.{norm}.weight", (hidden,))
            self._layer("mtp.layers.0", FULL)
        self._finish()

    # Parts of the model

    def _layer(self, name: str, kind: str) -> None:
        hidden = self.config.hidden_size
        self._plain(f"{name}.input_layernorm.weight", (hidden,))
        if kind == FULL:
            self._attention(f"{name}.self_attn")
        else:
            self._gdn(f"{name}.linear_attn")
        self._plain(f"{name}.post_attention_layernorm.weight", (hidden,))
        if self.config.is_moe:
            self._moe(f"{name}.mlp")
        else:
            self._swiglu(f"{name}.mlp", self.config.intermediate_size)

    def _attention(self, name: str) -> None:
        c = self.config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self._linear(f"{name}.q_proj", 2 * queries, c.hidden_size)  # per head [q | gate]
        self._linear(f"{name}.k_proj", keys, c.hidden_size)
        self._linear(f"{name}.v_proj", keys, c.hidden_size)
        self._linear(f"{name}.o_proj", c.hidden_size, queries)
        self._plain(f"{name}.q_norm.weight", (c.head_dim,))
        self._plain(f"{name}.k_norm.weight", (c.head_dim,))
        for p in "kv":  # scales of a quantized KV cache; ours is not
            for scale in (f"{p}_scale", f"{p}_proj.{p}_scale", f"{p}_proj.output_scale"):
                self._ignore(f"{name}.{scale}")

    def _gdn(self, name: str) -> None:
        c = self.config
        if self._has_linear(f"{name}.in_proj_qkvz"):
            self._fused_gdn(name)
        else:
            self._linear(f"{name}.in_proj_qkv", c.conv_dim, c.hidden_size)
            self._linear(f"{name}.in_proj_z", c.value_dim, c.hidden_size)
            self._linear(f"{name}.in_proj_b", c.linear_num_value_heads, c.hidden_size)
            self._linear(f"{name}.in_proj_a", c.linear_num_value_heads, c.hidden_size)
        self._linear(f"{name}.out_proj", c.hidden_size, c.value_dim)
        kernel = c.linear_conv_kernel_dim
        self._plain(f"{name}.conv1d.weight", (c.conv_dim, kernel), stored=(c.conv_dim, 1, kernel))
        self._plain(f"{name}.A_log", (c.linear_num_value_heads,))
        self._plain(f"{name}.dt_bias", (c.linear_num_value_heads,))
        self._plain(f"{name}.norm.weight", (c.linear_value_head_dim,))

    def _fused_gdn(self, name: str) -> None:
        """Qwen3-Next: rows are grouped per key head, [q k v.. z..] and [b.. a..]."""
        c = self.config
        heads, ratio = c.linear_num_key_heads, c.linear_num_value_heads // c.linear_num_key_heads
        key, value = c.linear_key_head_dim, ratio * c.linear_value_head_dim

        def spans(sizes: Sequence[int], which: int) -> list[tuple[int, int]]:
            start = sum(sizes[:which])
            return [(h * sum(sizes) + start, h * sum(sizes) + start + sizes[which]) for h in range(heads)]

        qkvz = self._matrix(f"{name}.in_proj_qkvz", c.conv_dim + c.value_dim, c.hidden_size)
        sizes = (key, key, value, value)
        qkv = [*spans(sizes, 0), *spans(sizes, 1), *spans(sizes, 2)]
        self._emit(f"{name}.in_proj_qkv", qkvz, c.conv_dim, c.hidden_size, qkv)
        self._emit(f"{name}.in_proj_z", qkvz, c.value_dim, c.hidden_size, spans(sizes, 3))
        ba = self._matrix(f"{name}.in_proj_ba", 2 * c.linear_num_value_heads, c.hidden_size)
        for i, part in enumerate("ba"):
            rows = spans((ratio, ratio), i)
            self._emit(f"{name}.in_proj_{part}", ba, c.linear_num_value_heads, c.hidden_size, rows)

    def _moe(self, name: str) -> None:
        c = self.config
        self._plain(f"{name}.gate.weight", (c.num_experts, c.hidden_size))
        self._experts(f"{name}.experts")
        self._swiglu(f"{name}.shared_expert", c.shared_expert_intermediate_size)
        self._plain(f"{name}.shared_expert_gate.weight", (1, c.hidden_size))

    def _swiglu(self, name: str, inner: int) -> None:
        self._linear(f"{name}.gate_proj", inner, self.config.hidden_size)
        self._linear(f"{name}.up_proj", inner, self.config.hidden_size)
        self._linear(f"{name}.down_proj", self.config.hidden_size, inner)

    def _lm_head(self) -> None:
        config = self.config
        if not config.tie_word_embeddings:
            self._linear("lm_head", config.vocab_size, config.hidden_size)
            return
        stored = self._sources.get("lm_head.weight")
        if stored is None:
            return
        if stored.dtype not in FLOATS:
            mend = "set tie_word_embeddings to false in config.json if the two differ"
            raise UserError(f"{stored.path}: tensor {stored.name!r} is quantized, but tied; {mend}")
        self._take("lm_head.weight", (config.vocab_size, config.hidden_size), FLOATS)
        self.notes.append(f"ignored {stored.name}: tie_word_embeddings is true")

    # Experts

    def _experts(self, name: str) -> None:
        c = self.config
        e, inner, hidden = c.num_experts, c.moe_intermediate_size, c.hidden_size
        up = self._stack(f"{name}.gate_up_proj", ("gate_proj", "up_proj"), inner, hidden)
        down = self._stack(f"{name}.down_proj", ("down_proj",), hidden, inner)
        first = self._agree([*up, *down])
        sizes = (("gate_up_proj", up, 2 * inner, hidden), ("down_proj", down, hidden, inner))
        for part, stack, n, k in sizes:
            weights = [m.weight.run() for m in stack]
            target = f"{name}.{part}.weight"
            if first.format == "float":
                self._output(target, first.weight.dtype, (e, n, k), weights)
                continue
            self._output(target, "U8", (e, n, k // 2), weights)
            scales = [m.scale.run() for m in stack if m.scale]
            self._output(f"{target}_scale", "F8_E4M3", (e, n, k // GROUP), scales)
            shape = (e, 2) if part == "gate_up_proj" else (e,)  # gate and up keep scales of their own
            self._output(f"{target}_scale_2", "F32", shape, list(chain(*(m.total for m in stack))))
        self.formats[name] = first.format

    @staticmethod
    def _agree(experts: list[Matrix]) -> Matrix:
        """The first, after a look that the experts of a layer are all stored like it."""
        first = experts[0]
        for matrix in experts:
            path = matrix.weight.path
            if matrix.format == "fp8":
                mend = "take a checkpoint whose experts are NVFP4 or BF16"
                raise UserError(f"{path}: FP8 experts ({matrix.name}) are not supported; {mend}")
            if (matrix.format, matrix.weight.dtype) != (first.format, first.weight.dtype):
                a, b = (f"{m.name} is {m.format} ({m.weight.dtype})" for m in (first, matrix))
                raise UserError(f"{path}: experts of one layer differ: {a}, {b}; quantize them alike")
        return first

    def _stack(self, name: str, parts: tuple[str, ...], n: int, k: int) -> list[Matrix]:
        """The experts' matrices [n, k] in order: one of all, or one per expert and part."""
        base, e = name.rpartition(".")[0], self.config.num_experts
        for stored in (name, f"{name}.weight", f"{name}.weight_packed", f"{name}_packed"):
            if stored in self._sources:
                return [self._stacked(name, stored, e, len(parts), n, k)]
        return [
            self._matrix(f"{base}.{i}.{part}", n, k, check=i == 0, hint=f"{name} or {base}.{i}.{part}")
            for i in range(e)
            for part in parts
        ]

    def _stacked(self, name: str, stored: str, e: int, parts: int, n: int, k: int) -> Matrix:
        source = self._sources[stored]
        if source.dtype != "U8":
            weight = self._take(stored, (e, parts * n, k), FLOATS)
            self._check_declared(name, name, "float", weight)
            return Matrix(name, "float", weight)
        weight = self._take(stored, (e, parts * n, k // 2), ("U8",))
        self._check_declared(name, name, "nvfp4", weight)
        packed = stored.endswith("packed")
        join = "." if f"{name}.weight_scale" in self._sources else "_"
        scale = self._take(f"{name}{join}weight_scale", (e, parts * n, k // GROUP), ("F8_E4M3",))
        total_name = "weight_global_scale" if packed else "weight_scale_2"
        total = self._take(f"{name}{join}{total_name}", None, FLOATS)
        count = total.length // DTYPES[total.dtype][0]
        if count not in (1, e, e * parts):
            self._bad_shape(total, f"one scale, {e} or {e * parts}")
        totals = tuple(total.scalar(packed, i * count // (e * parts)) for i in range(e * parts))
        for suffix in ("input_scale", "input_global_scale"):
            self._ignore(f"{name}{join}{suffix}")
        return Matrix(name, "nvfp4", weight, scale, totals)

    # Linears

    def _linear(self, name: str, n: int, k: int) -> None:
        self._emit(name, self._matrix(name, n, k), n, k, None)

    def _has_linear(self, name: str) -> bool:
        return f"{name}.weight" in self._sources or f"{name}.weight_packed" in self._sources

    def _matrix(self, name: str, n: int, k: int, check: bool = True, hint: str = "") -> Matrix:
        """One linear [n, k], its format told by its tensors."""
        packed = f"{name}.weight_packed" in self._sources
        stored = f"{name}.weight_packed" if packed else f"{name}.weight"
        source = self._sources.get(stored) or self._missing(stored, hint)
        if packed or source.dtype == "U8":
            if k % GROUP:
                why = f"NVFP4 rows of {k} are no whole blocks of {GROUP}; keep this linear in BF16"
                raise UserError(f"{source.path}: tensor {source.name!r}: {why}")
            weight = self._take(stored, (n, k // 2), ("U8",))
            scale = self._take(f"{name}.weight_scale", (n, k // GROUP), ("F8_E4M3",))
            total = self._take_scalar(f"{name}.{'weight_global_scale' if packed else 'weight_scale_2'}")
            matrix = Matrix(name, "nvfp4", weight, scale, (total.scalar(reciprocal=packed),))
        elif source.dtype == "F8_E4M3":
            if f"{name}.weight_scale_inv" in self._sources:
                what = f"tensor {source.name + '_scale_inv'!r}: FP8 block scales are not supported"
                raise UserError(f"{source.path}: {what}; supported: {SUPPORTED}")
            weight = self._take(stored, (n, k), ("F8_E4M3",))
            total = self._take_scalar(f"{name}.weight_scale")
            matrix = Matrix(name, "fp8", weight, None, (total.scalar(),))
        else:
            matrix = Matrix(name, "float", self._take(stored, (n, k), FLOATS))
        self._ignore(f"{name}.input_scale")
        self._ignore(f"{name}.input_global_scale")
        if check:
            self._check_declared(name, stored.removesuffix("_packed"), matrix.format, matrix.weight)
        return matrix

    def _emit(self, name: str, matrix: Matrix, n: int, k: int, rows: Spans | None) -> None:
        def runs(source: Source) -> list[Run]:
            return [source.run()] if rows is None else source.rows(rows)

        width = k // 2 if matrix.format == "nvfp4" else k
        self._output(f"{name}.weight", matrix.weight.dtype, (n, width), runs(matrix.weight))
        if matrix.format == "fp8":
            self._output(f"{name}.weight_scale", "F32", (), matrix.total)
        elif matrix.format == "nvfp4":
            assert matrix.scale is not None
            self._output(f"{name}.weight_scale", "F8_E4M3", (n, k // GROUP), runs(matrix.scale))
            self._output(f"{name}.weight_scale_2", "F32", (), matrix.total)
        self.formats[name] = matrix.format

    def _check_declared(self, name: str, stored: str, found: str, source: Source) -> None:
        module = source.name.removesuffix("_packed").removesuffix(".weight")
        expected = self.declared.expect(module)
        if expected is None or expected.format == found:
            return
        if found == "float" and not expected.firm:
            self._undeclared.append(name)
            return
        raise UserError(
            f"{source.path}: tensor {source.name!r} is {found}, but the config ({self.declared.label}) "
            f"declares {expected.format} for it; take config and weights from one checkpoint"
        )

    # Single tensors

    def _plain(self, name: str, shape: tuple[int, ...], stored: tuple[int, ...] | None = None) -> None:
        """A float tensor, kept as it is; `stored`: the shape on disk where it has a dimension of 1 more."""
        if stored and name in self._sources and self._sources[name].shape == shape:
            stored = None
        source = self._take(name, stored or shape, FLOATS)
        self._output(name, source.dtype, shape, [source.run()])

    def _take(self, name: str, shape: tuple[int, ...] | None, dtypes: tuple[str, ...]) -> Source:
        source = self._sources.pop(name, None) or self._missing(name)
        if source.dtype not in dtypes:
            found = f"dtype {source.dtype}, expected {' or '.join(dtypes)}"
            raise UserError(f"{source.path}: tensor {source.name!r} has {found}; supported checkpoints: {SUPPORTED}")
        if shape is not None and source.shape != shape:
            self._bad_shape(source, str(list(shape)))
        return source

    def _take_scalar(self, name: str) -> Source:
        source = self._take(name, None, FLOATS)
        if source.length != DTYPES[source.dtype][0]:
            self._bad_shape(source, "one scale for the whole tensor (scales per channel are not supported)")
        return source

    def _bad_shape(self, source: Source, expected: str) -> NoReturn:
        raise UserError(
            f"{source.path}: tensor {source.name!r} has shape {list(source.shape)}, expected {expected}; "
            "take config.json and weights from one checkpoint"
        )

    def _missing(self, name: str, hint: str = "") -> NoReturn:
        outside = name.startswith(("lm_head.", "mtp."))
        full = name if outside else self._prefix + name
        what = f" (looked for {hint})" if hint else ""
        mend = "download the checkpoint again, or take the config.json that belongs to it"
        if name == "lm_head.weight":
            mend += " (one with tied embeddings says tie_word_embeddings)"
        raise UserError(f"{self._where}: tensor {full!r} is missing{what}; {mend}")

    def _ignore(self, name: str) -> None:
        if self._sources.pop(name, None):
            self._ignored[name.rpartition(".")[2]] += 1

    def _output(self, name: str, dtype: str, shape: tuple[int, ...], parts: Sequence[Run | Scalar]) -> None:
        self.outputs.append(Output(name, dtype, shape, parts))

    def _finish(self) -> None:
        if self._sources:
            first = min(self._sources.values())
            more = f" and {len(self._sources) - 1} more" if len(self._sources) > 1 else ""
            why = f"a {self.config.model_type} model of config.json's sizes has no use for it"
            mend = "take config.json and weights from one checkpoint"
            raise UserError(f"{first.path}: unused tensor {first.name!r}{more}: {why}; {mend}")
        if self._ignored:
            listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self._ignored.items()))
            self.notes.append(f"ignored {listed}: activations and the KV cache are not quantized")
        if self._undeclared:
            names = f"{self._undeclared[0]}, .. ({len(self._undeclared)} in all)"
            self.notes.append(f"stored as floats, though the config declares them quantized: {names}")
