"""Every op: torch reference == ONNX function body in ONNX Runtime, and rows whose bits do not depend on T.

pytest tests/test_ops.py
"""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from plugins import DOMAIN, OPS, Op
from plugins.op import IMPORTS, Attributes

ONNX_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.uint8: TensorProto.UINT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()


def session(op: Op, inputs: tuple[torch.Tensor, ...], attributes: Attributes, expanded: bool) -> Any:
    """An ONNX Runtime session over one node of the op, its weights inside."""
    named = dict(zip(op.inputs, inputs, strict=True))
    weights = [
        helper.make_tensor(name, ONNX_DTYPES[tensor.dtype], tensor.shape, raw(tensor), raw=True)
        for name, tensor in named.items()
        if name in op.weights
    ]
    graph = helper.make_graph(
        [helper.make_node(op.name, op.inputs, op.outputs, domain=DOMAIN, **attributes)],
        op.name,
        [
            helper.make_tensor_value_info(name, ONNX_DTYPES[tensor.dtype], None)
            for name, tensor in named.items()
            if name not in op.weights
        ],
        [
            helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], None)
            for name, (dtype, _) in zip(op.outputs, op.infer(*inputs, **attributes), strict=True)
        ],
        weights,
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in {**IMPORTS, DOMAIN: 1}.items()]
    functions = [op.function(attributes, expanded)]
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    disabled = [] if expanded else ["ConstantFolding"]
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )


def run(runner: Any, op: Op, inputs: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    feeds = {n: t.numpy() for n, t in zip(op.inputs, inputs, strict=True) if n not in op.weights}
    return runner.run(list(op.outputs), feeds)


def as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("expanded", [True, False], ids=["expanded", "packed"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 70])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_function_body_equals_reference(op: Op, rows: int, expanded: bool) -> None:
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    for inputs, attributes in op.cases(generator, rows):
        expected = as_tuple(op.reference(*inputs, **attributes))
        specs = op.infer(*inputs, **attributes)
        actual = run(session(op, inputs, attributes, expanded), op, inputs)
        for name, want, got, (dtype, shape) in zip(op.outputs, expected, actual, specs, strict=True):
            assert want.dtype == dtype and tuple(want.shape) == tuple(shape), f"{op.name}: infer says otherwise"
            assert got.shape == tuple(want.shape)
            if dtype == torch.int64:
                np.testing.assert_array_equal(got, want.numpy())
                continue
            error = np.abs(got.astype(np.float32) - want.float().numpy()).max() / max(np.abs(want.numpy()).max(), 1e-6)
            assert error <= op.tolerance(expected), f"{op.name}.{name}: relative error {error:.2e} with {attributes}"


STATELESS = [op for op in OPS if op.inputs[0] == "x"]  # every input but the weights has a row per token


@pytest.mark.parametrize("expanded", [True, False], ids=["expanded", "packed"])
@pytest.mark.parametrize("op", STATELESS, ids=lambda op: op.name)
def test_bits_of_a_row_do_not_depend_on_the_other_rows(op: Op, expanded: bool) -> None:
    """Whole verify calls are compared in test_rounds.py; this names the op that breaks the promise."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    for inputs, attributes in op.cases(generator, 7):
        runner = session(op, inputs, attributes, expanded)

        def call(start: int, stop: int, runner: Any = runner, inputs: Any = inputs) -> list[np.ndarray]:
            pairs = zip(op.inputs, inputs, strict=True)
            return run(runner, op, tuple(t if name in op.weights else t[start:stop] for name, t in pairs))

        alone = [np.concatenate(parts) for parts in zip(*(call(t, t + 1) for t in range(7)), strict=True)]
        for start, stop in [(0, 7), (0, 2), (1, 4), (2, 7)]:
            for together, single in zip(call(start, stop), alone, strict=True):
                np.testing.assert_array_equal(together, single[start:stop])
