"""The commands as a person types them: results, streams, statistics, and one clear line for bad input.

pytest tests/test_decode.py
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from safetensors.torch import load_file, save_file

from engines.build import _replaced
from engines.manifest import Manifest, describe
from tests import full_size
from tests.checkpoints import random_state, tiny_config, write_checkpoint
from tests.conftest import Build, Built

ROOT = Path(__file__).parents[1]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def decode(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run("runtime.decode", "--engines", directory, "--threads", 1, *arguments)


def refused(result: subprocess.CompletedProcess[str], *mentions: object) -> None:
    """One line on stderr that names the thing, exit status 2, no traceback."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0], result.stderr
    assert "Traceback" not in result.stderr
    for mention in mentions:
        assert str(mention) in errors[0]


def bytes_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of single characters, so that text in and out can be predicted."""
    letters = {chr(97 + i): i for i in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def built(build_engine: Build) -> Built:
    return build_engine("modelopt_mixed", True, vocab_size=24)


@pytest.fixture(scope="module")
def spoken(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of a checkpoint that came with a tokenizer and stop ids."""
    root = tmp_path_factory.mktemp("spoken")
    shutil.copytree(built.checkpoint, root / "checkpoint")
    bytes_tokenizer(root / "checkpoint" / "tokenizer.json", 24)
    (root / "checkpoint" / "generation_config.json").write_text('{"eos_token_id": [21, 22, 23]}')
    result = run("engines.build", "--model", root / "checkpoint", "--out", root / "engines")
    assert result.returncode == 0, result.stderr
    return root / "engines"


def test_json_trace_and_text_agree(spoken: Path, tmp_path: Path) -> None:
    results = []
    for mtp_k in (0, 3):
        trace = tmp_path / f"trace{mtp_k}"
        flags = ("--max-new-tokens", 30, "--mtp-k", mtp_k, "--temperature", 0.9, "--seed", 4, "--ignore-eos")
        result = decode(spoken, "--prompt", "hello", *flags, "--json", "--trace", trace)
        assert result.returncode == 0, result.stderr
        *text, last = result.stdout.splitlines()
        value = json.loads(last)
        assert value["text"] == "".join(text) == "".join(chr(97 + token) for token in value["token_ids"])
        assert len(value["token_ids"]) == 30
        rounds = [json.loads(line) for line in trace.read_text().splitlines()]
        assert [token for r in rounds for token in r["tokens"]] == value["token_ids"][1:]
        assert [r["position"] for r in rounds] == [
            6 + sum(len(r["tokens"]) for r in rounds[:i]) for i in range(len(rounds))
        ]
        assert all(r["drafts"][: r["accepted"]] == r["tokens"][: r["accepted"]] for r in rounds)
        assert value["rounds"] == len(rounds)
        assert value["drafted"] == sum(len(r["drafts"]) for r in rounds)
        assert value["accepted"] == sum(value["accepted_per_position"]) == sum(r["accepted"] for r in rounds)
        assert value["tokens_per_round"] == pytest.approx(29 / len(rounds))
        assert value["tokens_per_second"] == pytest.approx(29 / value["decode_seconds"])
        assert value["prefill_seconds"] > 0
        for word in ("prompt", "decode", "tokens/s", "tokens a round"):
            assert word in result.stderr
        results.append(value["token_ids"])
    assert results[0] == results[1]


def test_token_ids_need_no_tokenizer(built: Built) -> None:
    result = decode(built.directory, "--token-ids", "1 2 3", "--max-new-tokens", 5, "--json")
    value = json.loads(result.stdout.splitlines()[-1])
    assert value["text"] is None and len(value["token_ids"]) == 5
    refused(decode(built.directory, "--prompt", "abc"), "tokenizer.json", "--token-ids")


def test_stop_ids_end_the_text(spoken: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("abcabc")
    flags = ("--prompt-file", tmp_path / "prompt", "--temperature", 1.5, "--max-new-tokens", 200, "--json")
    stopped = json.loads(decode(spoken, *flags).stdout.splitlines()[-1])["token_ids"]
    full = json.loads(decode(spoken, *flags, "--ignore-eos").stdout.splitlines()[-1])["token_ids"]
    assert len(full) == 200 and full[: len(stopped)] == stopped
    assert stopped[-1] in (21, 22, 23) and not {21, 22, 23} & set(stopped[:-1])


def test_flags_of_sampling_do_not_depend_on_drafts(spoken: Path) -> None:
    """Penalties, biases, stop strings and logprobs through the command: they do something, and K does nothing."""
    plain = json.loads(decode(spoken, "--prompt", "abc", "--max-new-tokens", 30, "--json").stdout.splitlines()[-1])
    penalties = ("--frequency-penalty", 1.5, "--repetition-penalty", 1.2, "--presence-penalty", -0.5, "--logprobs", 2)
    flags = (*penalties, "--temperature", 0.7, "--logit-bias", "1:3,2:-100", "--stop", "zz", "--stop", "dq", "--json")
    values = []
    for mtp_k in (0, 2, "auto"):
        result = decode(spoken, "--prompt", "abc", "--max-new-tokens", 30, *flags, "--mtp-k", mtp_k)
        assert result.returncode == 0, result.stderr
        values.append(json.loads(result.stdout.splitlines()[-1]))
    for value in values:
        assert value["token_ids"] == values[0]["token_ids"] != plain["token_ids"]
        assert value["text"] == values[0]["text"]
        assert 2 not in value["token_ids"] and "logprobs" not in plain
        assert [entry["token"] for entry in value["logprobs"]] == value["token_ids"]
        assert all(len(entry["top"]) == 2 and entry["top"][0][1] >= entry["logprob"] for entry in value["logprobs"])


def test_a_stop_string_ends_the_text(spoken: Path) -> None:
    flags = ("--prompt", "abc", "--temperature", 1.5, "--max-new-tokens", 100, "--ignore-eos", "--json")
    text = json.loads(decode(spoken, *flags).stdout.splitlines()[-1])["text"]
    stop = text[20:23]
    for mtp_k in (0, 3, "auto"):
        stopped = json.loads(decode(spoken, *flags, "--stop", stop, "--mtp-k", mtp_k).stdout.splitlines()[-1])
        assert stopped["text"] == text[: text.index(stop)]
        assert len(stopped["token_ids"]) == text.index(stop) + len(stop)


def test_text_comes_as_it_is_decoded(spoken: Path) -> None:
    command = [sys.executable, "-m", "runtime.decode", "--engines", str(spoken), "--prompt", "abc", "--ignore-eos"]
    with subprocess.Popen([*command, "--max-new-tokens", "500"], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        assert process.poll() is None and first.isalpha()
        rest = process.stdout.read()
    assert len(first + rest) == 501


def on_a_terminal(*arguments: object) -> str:
    """What a command shows on a terminal, its control sequences taken out."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}
    ):
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # Linux ends a terminal that way
            while piece := os.read(master, 4096):
                shown += piece
    os.close(master)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(spoken: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("abcdefgh" * 50)
    flags = ("runtime.decode", "--engines", spoken, "--prompt-file", tmp_path / "prompt", "--max-new-tokens", 2)
    assert re.search(r"prefill of 400 tokens ━+ +100 %", on_a_terminal(*flags))
    lines = run(*flags).stderr.splitlines()
    assert "prefill of 400 tokens: done" in lines and not any("━" in line or "\r" in line for line in lines)


def test_bad_requests_are_one_line(built: Built, spoken: Path, tmp_path: Path) -> None:
    refused(decode(tmp_path / "none", "--prompt", "a"), tmp_path / "none", "make engines")
    refused(decode(tmp_path, "--prompt", "a"), tmp_path, "manifest.json")
    refused(decode(spoken, "--token-ids", "1 99"), "token id 99", "vocabulary")
    refused(decode(spoken, "--token-ids", "1 x"), "--token-ids")
    refused(decode(spoken, "--token-ids", "1", "--max-new-tokens", 512), "512", "cache")
    refused(decode(spoken, "--token-ids", "1", "--temperature", -1), "--temperature")
    refused(decode(spoken, "--prompt-file", tmp_path / "missing"), tmp_path / "missing")
    refused(decode(spoken, "--prompt", "a", "--trace", tmp_path / "no" / "trace"), tmp_path / "no" / "trace")
    refused(decode(spoken, "--prompt", b"\xff".decode(errors="surrogateescape")), "UTF-8")
    refused(decode(spoken, "--prompt", "a", "--no-such-flag"), "--no-such-flag")
    for flags in (("--threads", 99999), ("--threads", -1), ("--seed", "1e3"), ("--temperature", 1e-300)):
        refused(decode(spoken, "--prompt", "a", *flags), flags[0])
    refused(decode(spoken, "--token-ids", "1_0"), "1_0")
    refused(decode(spoken, "--prompt", "a", "--json", "--logprobs", 21), "--logprobs 21")
    for flag, value in (
        ("--mtp-k", "most"),
        ("--mtp-k", 17),
        ("--logit-bias", "1=2"),
        ("--logit-bias", "24:1"),
        ("--logit-bias", "1:101"),
        ("--stop", ""),
        ("--presence-penalty", 3),
        ("--repetition-penalty", 0),
    ):
        refused(decode(spoken, "--prompt", "a", flag, value), flag)
    refused(decode(spoken, "--prompt", "a", "--json-schema", tmp_path / "missing"), tmp_path / "missing")
    refused(decode(spoken, "--prompt", "a", "--json-object"), "tokenizer.json", "Fuse")
    refused(decode(spoken, "--prompt", "a", "--json-object", "--ignore-eos"), "--ignore-eos")
    refused(decode(spoken, "--prompt", "a", "--logprobs", 2), "--logprobs", "--json")
    refused(decode(built.directory, "--token-ids", "1", "--stop", "a"), "--stop", "tokenizer.json")
    refused(decode(built.directory, "--token-ids", "1", "--json-object"), "--json-object", "tokenizer.json")


def test_trace_never_overwrites_what_is_read(spoken: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("abc")
    flags = ("--prompt-file", tmp_path / "prompt", "--trace")
    refused(decode(spoken, *flags, tmp_path / "prompt"), "--trace")
    refused(decode(spoken, *flags, spoken / "main.verify.onnx"), "--trace")
    assert (tmp_path / "prompt").read_text() == "abc"
    assert decode(spoken, "--token-ids", "1", "--max-new-tokens", 2).returncode == 0


def test_weights_that_are_no_numbers(build_engine: Build, tmp_path: Path) -> None:
    shutil.copytree(build_engine(vocab_size=24).checkpoint, tmp_path / "checkpoint")
    shard = tmp_path / "checkpoint" / "model.safetensors"
    state = load_file(shard)
    state["model.language_model.norm.weight"][3] = float("nan")
    save_file(state, shard)
    assert run("engines.build", "--model", tmp_path / "checkpoint", "--out", tmp_path / "engines").returncode == 0
    refused(decode(tmp_path / "engines", "--token-ids", "1"), "NaN")


def test_graph_that_is_not_what_it_should_be(built: Built, tmp_path: Path) -> None:
    for spoiled in (b"", (built.directory / "main.prefill.onnx").read_bytes()):
        copy = tmp_path / str(len(spoiled))
        shutil.copytree(built.directory, copy)
        (copy / "main.verify.onnx").write_bytes(spoiled)
        manifest = Manifest(**{**vars(built.engine().manifest), "files": describe_all(copy)})
        manifest.write(copy)
        refused(decode(copy, "--token-ids", "1"), "main.verify.onnx")


def describe_all(directory: Path) -> dict[str, dict[str, Any]]:
    return describe(path for path in directory.iterdir() if path.name != "manifest.json")


def test_no_head_refuses_drafts(build_engine: Build) -> None:
    headless = build_engine(written={"mtp": "none"}, vocab_size=24)
    refused(decode(headless.directory, "--token-ids", "1", "--mtp-k", 1), "no MTP head", "--mtp-k 0")


@pytest.mark.parametrize("what", ["changed", "truncated", "missing", "version", "field", "unchecked", "touched"])
def test_engine_directory_that_was_changed(what: str, built: Built, tmp_path: Path) -> None:
    copy = tmp_path / "engines"
    shutil.copytree(built.directory, copy)
    weights, manifest = copy / "weights.safetensors", copy / "manifest.json"
    if what == "touched":  # another time of change is no change
        os.utime(weights)
        assert decode(copy, "--token-ids", "1", "--max-new-tokens", 1).returncode == 0
        return
    mention = "weights.safetensors"
    if what == "changed":
        data = bytearray(weights.read_bytes())
        data[-7] ^= 1
        weights.write_bytes(data)
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif what == "missing":
        (copy / "main.verify.onnx").unlink()
        mention = "main.verify.onnx"
    else:
        values = json.loads(manifest.read_text())
        values |= {"version": {"version": "0.0.1"}, "field": {"capacity": "abc"}, "unchecked": {"files": {}}}[what]
        manifest.write_text(json.dumps(values))
        mention = "0.0.1" if what == "version" else "manifest.json"
    refused(decode(copy, "--token-ids", "1"), mention, "make engines")


def test_unknown_target_and_model(tmp_path: Path) -> None:
    refused(run("engines.build", "--model", tmp_path / "none", "--out", tmp_path / "out"), tmp_path / "none")
    refused(run("engines.build", "--model", tmp_path, "--out", tmp_path / "out"), "config.json")
    refused(run("engines.build", "--model", tmp_path, "--target", "sm_999", "--out", tmp_path / "out"), "sm_999", "cpu")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    config = tiny_config()
    write_checkpoint(tmp_path / "model", config, random_state(config))
    refused(run("engines.build", "--model", tmp_path / "model", "--out", tmp_path / "precious"), "precious")
    (tmp_path / "precious" / "manifest.json").write_text('{"name": "somebody else\'s"}')
    refused(run("engines.build", "--model", tmp_path / "model", "--out", tmp_path / "precious"), "precious")
    assert (tmp_path / "precious" / "file").read_text() == "mine"
    refused(
        run("engines.build", "--model", tmp_path / "model", "--out", tmp_path / "o", "--capacity", 9999), "--capacity"
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "o").exists()


def spoil_index(root: Path) -> str:
    (root / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}')
    return "../elsewhere.safetensors"


def spoil_shard(root: Path) -> str:
    shard = root / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return "model.safetensors"


def spoil_header(root: Path) -> str:
    shard = root / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"dtype"', b'"dtyp_"', 1))
    return "model.safetensors"


def spoil_architecture(root: Path) -> str:
    return edit(root, "model_type", "llama")


def spoil_size(root: Path) -> str:
    return edit(root, "hidden_size", 64)


def spoil_quantization(root: Path) -> str:
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (root / "config.json").write_text(json.dumps(config))
    return "awq"


def spoil_json(root: Path) -> str:
    (root / "config.json").write_text("{")
    return "config.json"


def edit(root: Path, field: str, value: object) -> str:
    config = json.loads((root / "config.json").read_text())
    config["text_config"][field] = value
    (root / "config.json").write_text(json.dumps(config))
    return str(value)


SPOILERS = (
    spoil_index,
    spoil_shard,
    spoil_header,
    spoil_architecture,
    spoil_size,
    spoil_quantization,
    spoil_json,
)


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_spoiled_checkpoint_is_one_line(spoil: Callable[[Path], str], build_engine: Build, tmp_path: Path) -> None:
    """Every defect of a checkpoint is a case of tests/test_checkpoint.py; these go through the command."""
    root = tmp_path / "checkpoint"
    shutil.copytree(build_engine(vocab_size=24).checkpoint, root)
    mention = spoil(root)
    refused(run("engines.build", "--model", root, "--out", tmp_path / "out"), mention)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}


def limited(result: Path, size: int) -> list[str]:
    """A command line that builds with at most `size` bytes per file: a disk that fills up in the middle."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}));"
    ignore = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    code = f"{limit}{ignore} from engines.build import main; from export.cli import run; run(main)"
    return [sys.executable, "-c", code, "--model", str(result / "checkpoint"), "--out", str(result / "engines")]


def test_files_added_to_the_engines_are_not_lost(built: Built, tmp_path: Path) -> None:
    copy_with_engines(built, tmp_path)
    (tmp_path / "engines" / "notes.txt").write_text("mine")
    refused(run("engines.build", "--model", tmp_path / "checkpoint", "--out", tmp_path / "engines"), "notes.txt")
    assert (tmp_path / "engines" / "notes.txt").read_text() == "mine"


def copy_with_engines(built: Built, root: Path) -> bytes:
    shutil.copytree(built.checkpoint, root / "checkpoint")
    shutil.copytree(built.directory, root / "engines")
    return (root / "engines" / "manifest.json").read_bytes()


def test_full_disk_leaves_the_old_engines(built: Built, tmp_path: Path) -> None:
    before = copy_with_engines(built, tmp_path)
    weights = (built.directory / "weights.safetensors").stat().st_size
    for size, mention in ((1000, "weights.safetensors"), (weights, ".onnx")):
        result = subprocess.run(limited(tmp_path, size), cwd=ROOT, capture_output=True, text=True, timeout=300)
        refused(result, mention, "space")
        assert (tmp_path / "engines" / "manifest.json").read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "engines"}
    assert decode(tmp_path / "engines", "--token-ids", "1", "--max-new-tokens", 2).returncode == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("had_engines", [True, False])
def test_failure_between_the_two_renames(
    error: type[BaseException], had_engines: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "engines"
    if had_engines:
        out.mkdir()
        (out / "old").touch()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error), _replaced(out) as fresh:
        (fresh / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "engines",
        "engines/old",
    ] * had_engines


def test_engines_set_aside_by_a_killed_build_come_back(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    aside = tmp_path / f".engines.old-{gone.pid}"
    aside.mkdir()
    (aside / "old").touch()
    with pytest.raises(RuntimeError), _replaced(tmp_path / "engines"):
        raise RuntimeError
    assert (tmp_path / "engines" / "old").exists() and not aside.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_interrupted_build_leaves_the_old_engines(number: signal.Signals, built: Built, tmp_path: Path) -> None:
    before = copy_with_engines(built, tmp_path)
    arguments = ["--model", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "engines")]
    command = [sys.executable, "-m", "engines.build", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".engines.new-*/*.onnx")):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, number)
        _, stderr = process.communicate()
    assert process.returncode != 0 and "Traceback" not in stderr
    assert (tmp_path / "engines" / "manifest.json").read_bytes() == before
    assert decode(tmp_path / "engines", "--token-ids", "1", "--max-new-tokens", 2).returncode == 0
    if number == signal.SIGKILL:  # nobody could clean up: the next build does
        assert run("engines.build", "--model", tmp_path / "checkpoint", "--out", tmp_path / "engines").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "engines"}


def test_an_interrupt_that_a_library_swallows_ends_the_build(tmp_path: Path) -> None:
    out = tmp_path / "engines"
    with pytest.raises(KeyboardInterrupt), _replaced(out) as fresh:
        (fresh / "file").write_text("new")
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert not list(tmp_path.iterdir())


def test_export_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Build, not only weights: 4 and 16 layers of the real widths with 64 experts, 0.8 and 2.3 GB."""
    peaks = []
    for layers in (4, 16):
        model = tmp_path / str(layers)
        full_size.write(model, layers, experts=64, vocab_size=16384)
        code = (
            "import resource, sys; from engines.build import build; from pathlib import Path;"
            "build(Path(sys.argv[1]), Path(sys.argv[2]));"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        )
        command = [sys.executable, "-c", code, str(model), str(tmp_path / "engines")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
        peaks.append(int(result.stdout))
        shutil.rmtree(tmp_path / "engines")
    assert peaks[1] - peaks[0] < 64, f"peak RSS in MiB: {peaks}"
