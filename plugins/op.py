"""One declaration per op: what it computes, its shapes, its ONNX function body, its tolerance.

An `Op` is called like a function. In eager torch it runs `reference`; while a graph is being exported it
becomes one node of the domain `tandem`, which carries the function body, so that plain ONNX Runtime runs the
file and a plugin of the same name may take its place. A new op is one folder and one entry in `plugins.OPS`.

    pytest tests/test_ops.py          # holds reference and function body together, for every op
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import parser

from plugins.launch import Launch

DOMAIN = "tandem"
OPSET = 24  # TensorScatter came with 24; ONNX Runtime's CPU provider runs it
IMPORTS = {"": OPSET, "com.microsoft": 1}

HALF_STEP = 2.0**-10  # from one float16 to the next, relative to a value

Attributes = dict[str, Any]
Case = tuple[tuple[torch.Tensor, ...], Attributes]
Infer = Callable[..., Sequence[tuple[torch.dtype, Sequence[Any]]]]


@dataclass(frozen=True)
class Op:
    """name: ONNX op type. inputs, outputs: formal names, in order.
    reference: torch semantics, `(*inputs, **attributes) -> Tensor | tuple`; float32 arithmetic.
    infer: `(*inputs, **attributes) -> [(dtype, shape), ...]`, one per output, without touching data.
    body: `(attributes, expanded) -> str`, the statements of the ONNX function in ONNX's text syntax, for the
        given attribute values. `expanded` says that weights will be constant-folded to float32 at load; else
        they stay packed in memory and the body must touch only what it needs.
    cases: `(generator, rows) -> iterator of (inputs, attributes)`, random inputs for the tests.
    rtol: largest allowed max|out - reference| / max|reference| of any implementation in float32. See `tolerance`.
    launch: its kernels as a plugin; ops of CPU graphs alone have none.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reference: Callable[..., Any]
    infer: Infer
    body: Callable[[Attributes, bool], str]
    cases: Callable[[torch.Generator, int], Iterator[Case]]
    attributes: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    rtol: float = 2e-6
    launch: Launch | None = None

    def __call__(self, *inputs: torch.Tensor, **attributes: Any) -> Any:
        assert len(inputs) == len(self.inputs), f"{self.name} takes {self.inputs}"
        assert set(attributes) == set(self.attributes), f"{self.name} has the attributes {self.attributes}"
        if not torch.onnx.is_in_onnx_export():
            return self.reference(*inputs, **attributes)
        specs = self.infer(*inputs, **attributes)
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{self.name}",
            inputs,
            attributes,
            dtypes=[dtype for dtype, _ in specs],
            shapes=[tuple(shape) for _, shape in specs],
            version=1,
        )
        return outputs[0] if len(self.outputs) == 1 else tuple(outputs)

    def tolerance(self, outputs: Sequence[torch.Tensor]) -> float:
        """rtol, or where an output is float16, of which a value may round to either neighbour, at least its step."""
        return max(self.rtol, HALF_STEP) if any(out.dtype == torch.float16 for out in outputs) else self.rtol

    def function(self, attributes: Attributes, expanded: bool) -> onnx.FunctionProto:
        """The ONNX function, specialised to these attribute values (a model has one set per op)."""
        imports = ", ".join(f'"{domain}": {version}' for domain, version in IMPORTS.items())
        declared = f"<{', '.join(self.attributes)}>" if self.attributes else ""
        text = (
            f'<opset_import: [{imports}], domain: "{DOMAIN}">\n'
            f"{self.name} {declared} ({', '.join(self.inputs)}) => ({', '.join(self.outputs)})\n"
            f"{{\n{self.body(attributes, expanded)}\n}}"
        )
        try:
            return parser.parse_function(text)
        except parser.ParseError as error:
            raise AssertionError(f"the function body of {self.name} does not parse: {error}\n{text}") from error


def ints(name: str, *values: int) -> str:
    """A body statement: a 1-D int64 constant."""
    return f"{name} = Constant <value_ints = [{', '.join(map(str, values))}]> ()"


def number(value: float) -> str:
    """A float32 literal that ONNX's text syntax does not take for an integer."""
    text = f"{value:.9g}"
    return text if any(mark in text for mark in ".e") else f"{text}.0"


def floats(name: str, *values: float) -> str:
    """A body statement: a 1-D float32 constant."""
    return f"{name} = Constant <value_floats = [{', '.join(map(number, values))}]> ()"


def scalar(name: str, value: float) -> str:
    """A body statement: a float32 constant of rank 0."""
    return f"{name} = Constant <value_float = {number(value)}> ()"


PACKET = 4  # ONNX Runtime computes Softplus, Cos and Sin four values at a time and the last few another way


def padded(op: str, out: str, x: str, width: int) -> str:
    """Body statements: out = op(x) for x [T, width], each row's bits independent of the number of rows."""
    if width % PACKET == 0:
        return f"{out} = {op} ({x})"
    return f"""
        {ints(f"{out}_pads", 0, 0, 0, -width % PACKET)}
        {out}_padded = Pad ({x}, {out}_pads)
        {out}_wide = {op} ({out}_padded)
        {ints(f"{out}_from", 0)}
        {ints(f"{out}_to", width)}
        {ints(f"{out}_axis", 1)}
        {out} = Slice ({out}_wide, {out}_from, {out}_to, {out}_axis)"""
