"""Graphs of an engine directory as TensorRT networks with our plugins, for Polygraphy's command line.

An engine directory of TensorRT has a `network.py` that calls this; GRAPH names one of its graphs:

    GRAPH=mtp.draft polygraphy convert build/demo/sm_120/network.py --model-type trt-network-script --convert-to trt …
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engines.cuda_memory import slots
from engines.manifest import Manifest
from engines.tensorrt_build import ROWS, Library, parse
from export.errors import UserError

SCRIPT = '''"""Polygraphy's entry point to the graphs beside this file; the environment's GRAPH says which."""

from pathlib import Path

from engines.network import load


def load_network():
    return load(Path(__file__).parent)
'''


def load(directory: Path) -> tuple[Any, Any, Any]:
    """builder, network and parser of the graph. Raises UserError as a build does."""
    graph = os.environ.get("GRAPH", "main.verify")
    if graph not in ROWS or not (directory / f"{graph}.onnx").is_file():
        raise UserError(f"GRAPH={graph}: no such graph in {directory}; one of {', '.join(ROWS)}")
    manifest = Manifest.read(directory)
    library = Library.of(tuple(manifest.target.split(",")))
    parsed = parse(library, directory / f"{graph}.onnx", manifest.formats, slots(manifest.capacity))
    return parsed.builder, parsed.network, parsed.parser
