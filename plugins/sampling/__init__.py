"""Sampling and acceptance on a GPU: no op of the ONNX graphs, but what a round does between them.

The semantics are those of runtime/sampling.py and runtime/rounds.py, which the kernels are tested against.
"""
