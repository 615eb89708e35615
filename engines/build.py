"""Checkpoint -> engine directory: the command behind `make engines`.

Everything is written into a temporary directory beside the target and renamed at the end, so that a build that
fails, is interrupted or fills the disk leaves the engines that were there before as they were.

    python -m engines.build --model demo/checkpoint --target cpu --out build/demo/cpu
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from engines import tensorrt_files
from engines.cuda_model import check_room, check_sizes
from engines.manifest import NAME, VERSION, WEIGHTS, Manifest, describe
from engines.planned import PlannedCheckpoint
from engines.tensorrt_build import RTX, Library
from export.bindings import GRAPHS
from export.checkpoint import Checkpoint
from export.cli import Parser, progress, run, say
from export.config import read_json
from export.errors import UserError
from export.trace import trace

TARGETS = ("cpu", "cuda", "tensorrt", *RTX)
EXPAND_BELOW = 1 << 30  # bytes of float32 weights up to which they are unpacked at load
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def build(
    model: Path,
    out: Path,
    target: str = "cpu",
    capacity: int | None = None,
    expanded: bool | None = None,
    weights: bool = True,
) -> Manifest:
    """Build the engine directory `out` from the checkpoint directory `model`. weights: without them a config.json is
    enough, for targets of TensorRT, whose engines hold none.

    Raises UserError for a checkpoint or target that Tandem cannot build."""
    targets = parse_targets(target)
    out = out.resolve()  # the directory itself, not a link to it, is replaced
    _check_replaceable(out)
    if not weights and targets[0] in ("cpu", "cuda"):
        raise UserError(f"--weights none: for targets of TensorRT; engines for {target} are nothing without weights")
    library = None if targets[0] in ("cpu", "cuda") else Library.of(targets)
    checkpoint = Checkpoint.open(model) if weights else PlannedCheckpoint(model)
    if targets != ("cpu",):
        check_sizes(checkpoint.config, checkpoint.formats)
    if library:
        check_room(checkpoint.config, library.device.shared_bytes, target)
    limit = checkpoint.config.max_position_embeddings
    if capacity is not None and not 1 <= capacity <= limit:
        raise UserError(f"--capacity {capacity}: expected 1 to {limit} (the model's max_position_embeddings)")
    out.parent.mkdir(parents=True, exist_ok=True)
    for note in checkpoint.notes:
        say(note)
    with _replaced(out) as directory:
        manifest = _fill(checkpoint, directory, targets, library, capacity or limit, expanded)
        with _writing(directory / NAME):
            manifest.write(directory)
    say(f"engines for {target}: {out}")
    return manifest


def parse_targets(target: str) -> tuple[str, ...]:
    """A single target, or compute capabilities that share their engines. Raises UserError: unknown."""
    targets = tuple(dict.fromkeys(target.split(",")))
    if unknown := [name for name in targets if name not in TARGETS]:
        raise UserError(f"--target {unknown[0]!r}: unknown; this version builds {', '.join(TARGETS)}")
    if len(targets) > 1 and (others := [name for name in targets if name not in RTX]):
        raise UserError(f"--target {target}: {others[0]} is built alone; only {', '.join(RTX)} share their engines")
    return targets


def _fill(
    checkpoint: Checkpoint | PlannedCheckpoint,
    directory: Path,
    targets: tuple[str, ...],
    library: Library | None,
    capacity: int,
    expanded: bool | None,
) -> Manifest:
    with progress("writing the weights") as update:
        checkpoint.write_weights(directory / WEIGHTS, update)
    if expanded is None:
        codes = {"U8": 2}  # two weights a byte
        size = sum(4 * math.prod(t.shape) * codes.get(t.dtype, 1) for t in checkpoint.tensors.values())
        expanded = size <= EXPAND_BELOW
    graphs: tuple[str, ...] = GRAPHS if checkpoint.has_mtp else GRAPHS[:2]
    if targets == ("cuda",):
        graphs, expanded = (), False  # kernels are launched from Python, and compiled for the GPU that runs them
    layout = "host" if targets == ("cpu",) else "device"
    with progress("tracing the graphs") as update:
        for i, name in enumerate(graphs):
            update(i, len(graphs))
            weights = directory / WEIGHTS
            config, formats = checkpoint.config, checkpoint.formats
            model = trace(name, config, checkpoint.tensors, formats, weights, expanded, layout=layout)
            with _writing(directory / f"{name}.onnx") as path:
                ir.save(model, path)
        update(len(graphs), len(graphs))
    tensorrt: dict[str, Any] = {}
    if library:
        with progress("building the engines") as update:
            tensorrt = tensorrt_files.fill(directory, library, checkpoint.config, checkpoint.formats, capacity, update)
    if isinstance(checkpoint, PlannedCheckpoint):
        (directory / WEIGHTS).unlink()
    for file in TEXT_FILES:
        if (checkpoint.directory / file).is_file():
            with _writing(directory / file) as path:
                shutil.copyfile(checkpoint.directory / file, path)
    sources, done = list(checkpoint.files()), 0
    total = sum(path.stat().st_size for path in [*sources, *directory.iterdir()])
    with progress("hashing") as update:

        def count(size: int) -> None:
            nonlocal done
            done += size
            update(done, total)

        source = {"name": checkpoint.directory.resolve().name, "files": describe(sources, count)}
        files = describe(directory.iterdir(), count)
    return Manifest(
        version=VERSION,
        target=",".join(targets),
        config=checkpoint.config,
        formats=dict(checkpoint.formats),
        has_mtp=checkpoint.has_mtp,
        expanded=expanded,
        capacity=capacity,
        versions={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")},
        source=source,
        files=files,
        has_weights=not isinstance(checkpoint, PlannedCheckpoint),
        tensorrt=tensorrt,
    )


def _check_replaceable(out: Path) -> None:
    """Raises UserError unless `out` is absent, an empty directory, or engines and nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    found = read_json(out / NAME, "move the directory away or choose another --out") if (out / NAME).is_file() else {}
    files = found.get("files")
    if not isinstance(files, dict) or "target" not in found:
        raise UserError(f"{out}: exists and is not an engine directory; choose another --out or move it away")
    if others := sorted({path.name for path in out.iterdir()} - {NAME, "__pycache__", *files}):
        raise UserError(f"{out}: holds {others[0]}, which is not of the engines; move it away or choose another --out")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        mend = "free some space or choose another directory"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {mend}") from None


@contextlib.contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """Yields a new directory that takes the place of `out` if the block succeeds and vanishes if it does not."""
    _recover(out)
    fresh = out.parent / f".{out.name}.new-{os.getpid()}"
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    fresh.mkdir()
    interrupts: list[int] = []

    def interrupted(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupted) for number in heeded}
    try:
        yield fresh
        if interrupts:  # what was raised for it hit a callback of a library, and was lost there
            raise KeyboardInterrupt
        if out.exists():
            out.rename(old)
        fresh.rename(out)  # an interrupt between the two ends in `finally`, which undoes the first
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _recover(out: Path) -> None:
    """What builds that were killed left behind: half-written engines go, engines that were set aside come back."""
    for kind in ("old", "new"):
        for left in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            if _is_another_build(left.name.rpartition("-")[2]):
                continue
            if kind == "old" and not out.exists():
                left.rename(out)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_another_build(pid: str) -> bool:
    """Whether a process with this number runs; this one's own number is a coincidence."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return int(pid) != os.getpid()


def main() -> None:
    parser = Parser(prog="python -m engines.build", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint directory")
    help = f"one of {', '.join(TARGETS)} (default cpu); several sm_*, with commas, share their engines"
    parser.add_argument("--target", default="cpu", help=help)
    parser.add_argument("--out", type=Path, metavar="DIR", help="engine directory (default build/<model>/<target>)")
    parser.add_argument("--capacity", type=int, metavar="N", help="positions of a run (default: the model's maximum)")
    parser.add_argument("--weights", choices=("all", "none"), default="all", help="none: a config.json is enough")
    options = parser.parse_args()
    model, start = options.model.expanduser(), time.monotonic()
    out = options.out or Path("build") / model.resolve().name.removesuffix(".json") / options.target
    manifest = build(model, out, options.target, options.capacity, weights=options.weights == "all")
    if manifest.tensorrt:
        size = sum(f["size"] for name, f in manifest.files.items() if name.endswith((".engine", ".cubin", ".onnx")))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = time.monotonic() - start
        files = f"{size / 1e6:.1f} MB of graphs, engines and kernels"
        say(f"{seconds:.0f} s, {peak / 1e9:.2f} GB of memory at most, {files}")


if __name__ == "__main__":
    run(main)
