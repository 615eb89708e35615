"""Checkpoint -> ONNX: configuration, weights, torch modules, traced graphs."""
