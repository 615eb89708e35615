"""What the demo model is worth: held-out loss, acceptance of its drafts, samples; and that it is exact.

Contract: `score` measures on rows of tokens with the text as context. `--check` holds `demo.model` to
transformers on random weights of a tiny model. Otherwise the finished checkpoint is measured: its loss, also
transformers' on the same weights, greedy continuations of `prompts.json` by transformers, and how many drafts
greedy decoding accepts along them. The last line of stdout is one JSON document.

    python -m demo.evaluate --checkpoint demo/checkpoint --tokens .train/heldout.bin
    python -m demo.evaluate --check
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from demo.model import Config, Layers, Weights, forward_all, forward_main, linear_attention, under
from demo.reference import transformers_model

HERE = Path(__file__).parent
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def score(w: Weights, c: Config, tokens: Tensor, length: int, rows: int = 16, limit: int = 400) -> dict[str, float]:
    """Losses, and the share of positions whose drafts are the main model's own greedy choice.

    `accept2` counts a position when both drafts are right, the second one from the text's token.
    """
    stride = length + 3
    count = min(len(tokens) // stride, limit)
    names = ("loss", "draft1_loss", "draft2_loss", "accept1", "accept2")
    sums = torch.zeros(len(names), dtype=torch.float64)
    for start in range(0, count, rows):
        batch = tokens[start * stride : min(start + rows, count) * stride].view(-1, stride).long()
        hidden = forward_all(w, c, batch[:, :-1])
        head = w["lm_head.weight"]
        values, picks = [], []
        for shift, h in ((1, hidden.main), (2, hidden.draft1), (3, hidden.draft2)):
            logits = F.linear(h.to(head.dtype), head).float()
            target = batch[:, shift : shift + length]
            values.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
            picks.append(logits.argmax(-1))
        first = picks[1][:, :-2] == picks[0][:, 1:-1]
        second = picks[2][:, :-2] == picks[0][:, 2:]
        values += [first.float().mean(), (first & second).float().mean()]
        sums += torch.stack(values).double().cpu() * len(batch)
    return dict(zip(names, (sums / count).tolist(), strict=True)) | {"tokens": float(count * length)}


@torch.no_grad()
def greedy_rounds(w: Weights, c: Config, tokens: list[int], prompt: int) -> list[int]:
    """Accepted drafts, 0 to 2, of each round that greedy decoding with two drafts takes along `tokens`.

    Drafting does not change the text, and a round's drafts depend on the text before it alone, so one pass over
    the finished text gives every round.
    """
    ids = torch.tensor([tokens])
    hidden = forward_all(w, c, ids)
    drafts = [F.linear(h, w["lm_head.weight"]).argmax(-1)[0].tolist() for h in (hidden.draft1, hidden.draft2)]
    accepted = []
    p = prompt - 1  # the last row whose hidden state is known; token p + 1 is known too
    while p + 3 < len(tokens):
        first = drafts[0][p] == tokens[p + 2]
        second = first and drafts[1][p] == tokens[p + 3]
        accepted.append(int(first) + int(second))
        p += 1 + accepted[-1]
    return accepted


def transformers_loss(model: Any, rows: Tensor) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(model(row[None, :-1]).logits[0], row[1:]).item() for row in rows]
    return float(np.mean(losses))


def acceptance(rounds: list[int]) -> dict[str, float]:
    n = len(rounds)
    return {
        "rounds": n,
        "first": sum(r >= 1 for r in rounds) / n,
        "second": sum(r == 2 for r in rounds) / n,
        "tokens_per_round": 1 + sum(rounds) / n,
    }


def continue_prompts(
    model: Any, w: Weights, c: Config, folder: Path, new: int
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Greedy continuations by transformers, and the acceptance along them by kind of prompt."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = json.loads((HERE / "prompts.json").read_text())
    stop = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    found, texts = {}, []
    for kind, template in (("completions", "{}"), ("chats", CHAT)):
        rounds = []
        for prompt in prompts[kind]:
            ids = tokenizer.encode(template.format(prompt)).ids
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=stop, pad_token_id=stop[1]
            )[0].tolist()
            rounds += greedy_rounds(w, c, out, len(ids))
            texts.append(tokenizer.decode(out, skip_special_tokens=False))
        found[kind] = acceptance(rounds)
    return found, texts


def measure(folder: Path, tokens: Path, rows: int, new: int) -> None:
    from demo.quantize import read_checkpoint  # quantize is a user of this package's other half

    w, c = read_checkpoint(folder), Config.from_json(folder / "config.json")
    ids = torch.from_numpy(np.fromfile(tokens, np.uint16).astype(np.int64))
    model = transformers_model(folder / "config.json", w)
    sample = ids[: 4 * 513].view(4, 513)
    with torch.no_grad():
        logits = F.linear(forward_main(w, c, sample[:, :-1], Layers())[0], w["lm_head.weight"])
    same = F.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten()).item()
    report: dict[str, Any] = {"loss_here": same, "loss_transformers": transformers_loss(model, sample)}
    report["heldout"] = score(w, c, ids, 1024, rows=4, limit=rows)
    report["greedy"], texts = continue_prompts(model, w, c, folder, new)
    for text in texts:
        print(text, "\n" + "=" * 80)
    print(json.dumps(report))


def check() -> None:
    """demo.model against transformers on a tiny random model, norms included; one JSON line of differences."""
    from demo.train import initial_weights, smoke_config

    torch.manual_seed(0)
    c = smoke_config()
    text = {name: getattr(c, name) for name in Config.__dataclass_fields__ if not name.startswith("ro")}
    rope = {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1], "mrope_interleaved": True}  # fmt: skip
    w = initial_weights(c, 0)
    w = {n: x + 0.3 * torch.randn_like(x) if x.ndim == 1 else x for n, x in w.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({"text_config": {**text, "rope_parameters": rope}}))
        assert Config.from_json(path) == c
        model: Any = transformers_model(path, w)
    tokens, x = torch.randint(0, c.vocab_size, (2, 200)), torch.randn(2, 200, c.hidden_size)
    with torch.no_grad():
        mixer = linear_attention(x, under(w, "layers.0."), c) - model.model.layers[0].linear_attn(x)
        hidden, _ = forward_main(w, c, tokens, Layers())
        logits = F.linear(hidden, w["lm_head.weight"]) - model(tokens).logits
    print(json.dumps({"linear_attention": mixer.abs().max().item(), "logits": logits.abs().max().item()}))
    assert mixer.abs().max() < 1e-4 and logits.abs().max() < 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the demo checkpoint, or checks the demo's model.")
    parser.add_argument("--check", action="store_true", help="compare with transformers on random weights")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--tokens", type=Path, help="heldout.bin")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows of 1024 tokens")
    parser.add_argument("--new", type=int, default=160, help="tokens to continue each prompt with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.check:
        check()
    elif args.tokens is None:
        parser.error("--tokens is needed (or --check)")
    else:
        measure(args.checkpoint, args.tokens, args.rows, args.new)


if __name__ == "__main__":
    main()
