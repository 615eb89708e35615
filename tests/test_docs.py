"""Every command of the documents, run as a reader would run it; a block that there is no way to run is an error.

A document is a session at one shell: its blocks run in their order, in a copy of the tree, with this environment as
.venv and a small checkpoint at $HOME/models/Qwen3.6-35B-A3B-NVFP4. The words behind a fence say what a block is:

    sh                  commands, all of which succeed
    sh fails            ends with one line `error: …` and exit status 2
    sh cuda, sh sm_120  needs that GPU: elsewhere it ends with an error that the document quotes, and then runs once
                        more on engines of the cpu target, so that the rest of it is tried too
    sh cuda only        as `sh cuda`, but there is nothing like it on the cpu target
    sh … server         goes on until the document's end, or the next server; 8000 becomes a free port
    text                what the block before printed, or a part of it; … stands for anything
    python FILE         a new file (also c++, json); without FILE it has to be well-formed
    diff FILE           a change of a file, which must hold the lines that stay and those that go exactly once

    pytest tests/test_docs.py                  # and on a GPU: pytest -m gpu tests/test_docs.py
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from engines.build import build
from tests.checkpoints import random_state, tiny_config, write_checkpoint

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ON_A_GPU = "qwen3.6-on-a-rtx-5090.md"
SESSIONS = (ON_A_GPU, "adding-an-op.md", "adding-a-model.md", "how-a-round-works.md")
MODEL = "Qwen3.6-35B-A3B-NVFP4"
PORT = "8000"  # in the documents
SECONDS = 600  # for a block, at most
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
SHELL_WORDS = ("fails", "cuda", "sm_120", "only", "server")


class Block(NamedTuple):
    where: str  # document:line
    language: str
    words: tuple[str, ...]
    text: str


def blocks(document: Path) -> list[Block]:
    """Raises AssertionError for a block that there is no way to run."""
    text = document.read_text()
    found: list[Block] = []
    for match in FENCE.finditer(text):
        where = f"{document.name}:{text.count(chr(10), 0, match.start()) + 1}"
        language, *words = match[1].split() or [""]
        block = Block(where, language, tuple(words), match[2])
        known = {
            "sh": set(words) <= set(SHELL_WORDS),
            "text": not words and bool(found) and found[-1].language == "sh",
            "python": len(words) < 2,
            "c++": len(words) == 1,
            "json": len(words) < 2,
            "diff": len(words) == 1,
        }
        assert known.get(language), f"{where}: no way to run a block that begins with ```{match[1]}"
        found.append(block)
    prose = FENCE.sub("", text)
    assert "```" not in prose, f"{document.name}: a fence that is not closed"
    assert not re.search(r"^\n( {4}|\t)\S", prose, re.MULTILINE), f"{document.name}: an indented block; fence it"
    return found


def quoted(document: Path) -> list[str]:
    """The messages in the document's table of errors."""
    _, _, table = document.read_text().partition("\n| error |")
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def pattern(text: str) -> str:
    """As a regular expression: … stands for anything, on a line of its own for any lines."""
    lines = [r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + r"\n" for line in text.splitlines()]
    return "^" + "".join(lines)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in NVIDIA's mixed layout with the demo's tokenizer, of sizes that the kernels take; and beside it
    its engines for the cpu target."""
    directory = tmp_path_factory.mktemp("models") / MODEL
    sizes: dict[str, Any] = dict.fromkeys(
        ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64
    )
    config = tiny_config(vocab_size=4096, max_position_embeddings=65536, **sizes)
    write_checkpoint(directory, config, random_state(config), "modelopt_mixed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(ROOT / "demo/checkpoint" / name, directory)
    build(directory, directory.parent / "cpu")
    return directory


class Reader:
    """A document being followed. arch: of the GPU that it is followed on."""

    def __init__(self, document: Path, work: Path, arch: str | None) -> None:
        self.document, self.work, self.arch = document, work, arch
        self.server: subprocess.Popen[str] | None = None
        self.port = free_port()
        self.printed = ""
        shutil.copytree(ROOT, work, ignore=shutil.ignore_patterns(".*", "build", "shared", "__pycache__"))
        for path in ("home/models", ".venv/bin"):
            (work / path).mkdir(parents=True)
        for tool in Path(sys.executable).parent.iterdir():
            (work / ".venv/bin" / tool.name).symlink_to(tool)
        python = work / ".venv/bin/python"  # a link would make Python look for its libraries here
        python.unlink(missing_ok=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (work / ".venv/ready").touch()
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self.environment = os.environ | {"HOME": str(work / "home"), "XDG_CACHE_HOME": cache, "PYTHONUNBUFFERED": "1"}
        self.environment |= {} if arch else {"CUDA_VISIBLE_DEVICES": ""}
        for name in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MODEL", "TARGET", "OUT", "WEIGHTS"):
            self.environment.pop(name, None)

    def follow(self) -> None:
        for block in blocks(self.document):
            match block.language:
                case "sh":
                    self.run(block)
                case "text":
                    shown = re.search(pattern(block.text), self.printed, re.MULTILINE)
                    assert shown, f"{block.where}: the block before printed\n{self.printed}"
                case "diff":
                    self.change(block)
                case _ if block.words:
                    path = self.work / block.words[0]
                    assert not path.exists(), f"{block.where}: {block.words[0]} is there already"
                    path.parent.mkdir(exist_ok=True, parents=True)
                    path.write_text(block.text)
                case "python":
                    ast.parse(block.text, block.where)
                case "json":
                    json.loads(block.text)

    def change(self, block: Block) -> None:
        path = self.work / block.words[0]
        for hunk in block.text.removeprefix("@@\n").split("@@\n"):
            lines = hunk.splitlines()
            assert all(not line or line[0] in " -+" for line in lines), f"{block.where}: not a diff"
            before, after = ("\n".join(line[1:] for line in lines if line[:1] != other) + "\n" for other in "+-")
            text = path.read_text()
            assert text.count(before) == 1, f"{block.where}: not once in {block.words[0]}:\n{before}"
            path.write_text(text.replace(before, after))

    def run(self, block: Block) -> None:
        needs = "cuda" if "cuda" in block.words else "sm_120" if "sm_120" in block.words else None
        script = block.text.replace(PORT, self.port)
        if needs and self.arch != needs and not (needs == "cuda" and self.arch):
            message = self.refused(block, script)
            assert any(re.fullmatch(pattern(text)[1:-2], message) for text in quoted(self.document)), (
                f"{block.where}: {self.document.name} does not quote the error: {message}"
            )
            if "only" in block.words:
                return
            script = script.replace(f"{MODEL}/{needs}", f"{MODEL}/cpu")
        if "server" in block.words:
            self.serve(block, script)
        elif "fails" in block.words:
            self.refused(block, script)
        else:
            status = self.shell(script)
            assert status == 0, f"{block.where}: exit status {status}\n{self.printed}"

    def refused(self, block: Block, script: str) -> str:
        """The error's message."""
        status = self.shell(script)
        lines = [line for line in self.printed.splitlines() if not line.startswith("make: ")]
        assert status == 2 and lines and lines[-1].startswith("error: "), f"{block.where}: {status}\n{self.printed}"
        assert "Traceback" not in self.printed, f"{block.where}:\n{self.printed}"
        return lines[-1].removeprefix("error: ")

    def shell(self, script: str) -> int:
        result = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        self.printed = result.stdout if result.stdout.endswith("\n") else result.stdout + "\n"
        return result.returncode

    def serve(self, block: Block, script: str) -> None:
        """Until it says where it listens."""
        self.stop()
        command = ["bash", "-e", "-c", f"exec {script}"]
        log = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.server = subprocess.Popen(command, cwd=self.work, env=self.environment, text=True, **log)  # type: ignore
        assert self.server.stdout
        late = threading.Timer(SECONDS, self.server.kill)
        late.start()
        self.printed = ""
        while f":{self.port}" not in self.printed:
            line = self.server.stdout.readline()
            assert line, f"{block.where}: the server ended\n{self.printed}"
            self.printed += line
        late.cancel()

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self.server:
            self.server.send_signal(2)
            rest, _ = self.server.communicate(timeout=SECONDS)
            status, self.server = self.server.returncode, None
            assert status == 0 and "Traceback" not in rest, (
                f"{self.document.name}: the server ended with {status}\n{rest}"
            )


def follow(name: str, request: pytest.FixtureRequest, work: Path, arch: str | None) -> None:
    reader = Reader(DOCS / name, work, arch)
    if name == ON_A_GPU:
        checkpoint: Path = request.getfixturevalue("checkpoint")
        (reader.work / "home/models" / MODEL).symlink_to(checkpoint)
        shutil.copytree(checkpoint.parent / "cpu", reader.work / "build" / MODEL / "cpu")
    try:
        reader.follow()
    finally:
        if reader.server and sys.exc_info()[0]:
            reader.server.kill()
        else:
            reader.stop()


@pytest.mark.parametrize("name", SESSIONS)
def test_every_command_does_what_the_document_says(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    follow(name, request, tmp_path / "tandem", arch=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_every_command_on_a_gpu(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    follow(ON_A_GPU, request, tmp_path / "tandem", arch)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nls\n```\n",
        "```\nls\n```\n",
        "```sh gpu\nls\n```\n",
        "```text\nls\n```\n",
        "```diff\n+ls\n```\n",
        "```sh\nls\n",
        "So:\n\n    make demo\n",
    ],
)
def test_a_block_that_cannot_be_run_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"# Page\n\n{text}")
    with pytest.raises(AssertionError, match=r"page\.md"):
        blocks(tmp_path / "page.md")


def test_documents_are_sessions_or_hold_no_fenced_commands() -> None:
    """One that is added has to be run too."""
    others = [path for path in DOCS.glob("*.md") if path.name not in SESSIONS]
    assert {*SESSIONS} <= {path.name for path in DOCS.glob("*.md")}
    assert [path.name for path in others if FENCE.search(path.read_text())] == []


def links() -> Iterator[tuple[str, Path]]:
    for document in (ROOT / "README.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                yield f"{document.name}: {target}", document.parent / target


def test_links_lead_somewhere() -> None:
    found = list(links())
    assert len(found) > 5
    assert [what for what, path in found if not path.exists()] == []


def test_quoted_errors_are_those_of_the_code() -> None:
    """Every part of them, between the … that stand for what varies, is in a source as it stands there."""
    sources = "".join(
        path.read_text() for folder in ("engines", "export", "runtime") for path in (ROOT / folder).glob("*.py")
    )
    messages = quoted(DOCS / ON_A_GPU)
    assert len(messages) > 5
    parts = [part.strip(" :;,") for message in messages for part in message.split("…")]
    assert [part for part in parts if part not in sources] == []
