"""Trains the demo model and its draft head together, on one GPU, for a given number of minutes.

Contract: reads `train.bin` and `heldout.bin` (uint16 ids, also as .xz) and the config; writes BF16 safetensors
below 16 MiB each and `log.json` to `--out`, halfway and at the end. The learning rate follows the clock, and
the last fifth of the time trains through the quantizer (straight-through), so the written checkpoint is the one
that was trained.

    python -m demo.train --tokens .train --out .train/trained --minutes 8
    python -m demo.train --smoke
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor

from demo.evaluate import score
from demo.model import Config, Layers, Weights, all_shapes, attention_layer, forward_all, linear_layer
from demo.quantize import fake_quantize, quant_algo, read_trained

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Training:
    minutes: float = 8.0
    batch: int = 64
    length: int = 1024
    muon_lr: float = 4e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.02
    warmup_steps: int = 100
    draft1_weight: float = 0.3
    draft2_weight: float = 0.2
    balance_weight: float = 2e-3
    quantized_from: float = 0.8  # the share of the training time after which weights pass the quantizer
    document_starts: float = 0.25  # of the rows start where a document does
    closing_seconds: float = 30.0  # kept for the last evaluation and the files
    max_steps: int = 1_000_000
    seed: int = 0


def smoke_config() -> Config:
    return Config(
        vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, rotary_dim=8, rope_theta=1e7, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=32, linear_conv_kernel_dim=4, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        rms_norm_eps=1e-6,
    )  # fmt: skip


def initial_weights(c: Config, seed: int) -> Weights:
    """float32. Projections into the residual stream start smaller; decays spread over 1 to 1000 tokens."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in all_shapes(c).items():
        if name.endswith("A_log"):
            w = torch.empty(shape).uniform_(1, 16, generator=generator).log()
        elif name.endswith("dt_bias"):
            dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
            w = dt + torch.log(-torch.expm1(-dt))  # softplus(w) = dt
        elif name.endswith("linear_attn.norm.weight"):
            w = torch.ones(shape)
        elif len(shape) == 1:
            w = torch.zeros(shape)
        elif name.endswith("conv1d.weight"):
            w = torch.empty(shape).uniform_(-0.5, 0.5, generator=generator)
        else:
            special = {"lm_head.weight": 0.02, "embed_tokens.weight": 0.1}
            std = special.get(name, shape[-1] ** -0.5)
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")):
                std *= (2 * c.num_hidden_layers) ** -0.5
            w = torch.empty(shape).normal_(std=std, generator=generator)
        weights[name] = w
    return weights


def is_muon(name: str, w: Tensor) -> bool:
    others = ("embed_tokens.weight", "lm_head.weight", "conv1d.weight", "gate.weight")
    return w.ndim >= 2 and not name.endswith(others)


def orthogonal(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to g [..., N, K], by five Newton-Schulz steps (Muon)."""
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Optimizer:
    """Muon for the matrices, stacked by shape; Adam for embeddings, head, router and vectors."""

    def __init__(self, masters: Weights, t: Training) -> None:
        self.training = t
        self.groups: dict[tuple[int, ...], list[str]] = {}
        for name, w in masters.items():
            if is_muon(name, w):
                self.groups.setdefault(tuple(w.shape), []).append(name)
        self.momentum = {
            shape: torch.zeros(len(names), *shape, device=masters[names[0]].device)
            for shape, names in self.groups.items()
        }
        self.masters = masters
        self.adam_names = [name for name, w in masters.items() if not is_muon(name, w)]
        fused = masters["norm.weight"].is_cuda
        self.adam = torch.optim.AdamW(
            [masters[n] for n in self.adam_names], t.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )

    @torch.no_grad()
    def step(self, gradients: Weights, factor: float) -> None:
        lr = self.training.muon_lr * factor
        for shape, names in self.groups.items():
            g = torch.stack([gradients[n] for n in names]).float()
            momentum = self.momentum[shape].lerp_(g, 0.05)
            update = orthogonal(g.lerp_(momentum, 0.95))
            scale = 0.2 * max(shape[-2:]) ** 0.5  # the size that Adam's updates have
            masters = [self.masters[n] for n in names]
            torch._foreach_mul_(masters, 1 - lr * self.training.weight_decay)
            torch._foreach_add_(masters, list(update.unbind()), alpha=-lr * scale)
        for name in self.adam_names:
            self.masters[name].grad = gradients[name].float()
        for group in self.adam.param_groups:
            group["lr"] = self.training.adam_lr * factor
        self.adam.step()


class Shadow:
    """The tensors that the model computes with: masters, rounded, and quantized when asked.

    They are leaves of their own, so their gradients are the straight-through gradients of the masters.
    """

    def __init__(self, masters: Weights, dtype: torch.dtype) -> None:
        self.masters = masters
        self.leaves: Weights = {}
        for name, w in masters.items():
            is_product = is_muon(name, w) or name.endswith(("lm_head.weight", "gate.weight"))
            leaf = w.to(dtype if is_product else torch.float32, copy=True)
            self.leaves[name] = leaf.requires_grad_(True)
        self.stacks: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, w in masters.items():
            if quant_algo(name) is not None:
                suffix = name.split("layers.")[-1].split(".", 1)[-1]
                self.stacks.setdefault((suffix, tuple(w.shape)), []).append(name)

    @torch.no_grad()
    def refresh(self, quantized: bool) -> None:
        torch._foreach_copy_(list(self.leaves.values()), list(self.masters.values()))
        if quantized:
            for names in self.stacks.values():
                fake = fake_quantize(names[0], torch.stack([self.masters[n] for n in names]))
                torch._foreach_copy_([self.leaves[n] for n in names], list(fake.unbind()))

    def gradients(self) -> Weights:
        found = {}
        for name, leaf in self.leaves.items():
            assert leaf.grad is not None, name
            found[name] = leaf.grad
            leaf.grad = None
        return found


def head_losses(main: Tensor, draft1: Tensor, draft2: Tensor, lm_head: Tensor, targets: Tensor) -> list[Tensor]:
    """Cross entropies of main and both drafts, and the drafts' against the main model's own distribution.

    targets [B, T + 2]: row p of main predicts targets[p], of draft1 targets[p + 1], of draft2 targets[p + 2].
    """
    length = main.shape[1]
    logp = F.linear(main.to(lm_head.dtype), lm_head).float().log_softmax(-1)
    teacher = logp.detach().exp()
    losses = [-logp.gather(-1, targets[:, :length, None]).mean()]
    for shift, draft in ((1, draft1), (2, draft2)):
        logp = F.linear(draft.to(lm_head.dtype), lm_head).float().log_softmax(-1)
        losses.append(-logp.gather(-1, targets[:, shift : shift + length, None]).mean())
        losses.append(-(teacher[:, shift:] * logp[:, :-shift]).sum(-1).mean())
    return losses


class Batches:
    """Rows of length + 3 tokens from anywhere in the stream, some of them from a document's start."""

    def __init__(self, tokens: Tensor, end: int, t: Training) -> None:
        self.tokens, self.t = tokens, t
        starts = (tokens == end).nonzero()[:, 0] + 1
        self.starts = torch.cat([starts.new_zeros(1), starts])
        self.generator = torch.Generator(device=tokens.device).manual_seed(t.seed)
        self.offsets = torch.arange(t.length + 3, device=tokens.device)

    def draw(self) -> Tensor:
        last = len(self.tokens) - self.t.length - 3
        device = self.tokens.device
        at = torch.randint(0, last, (self.t.batch,), device=device, generator=self.generator)
        snapped = self.starts[torch.searchsorted(self.starts, at, right=True) - 1]
        snap = torch.rand(self.t.batch, device=device, generator=self.generator) < self.t.document_starts
        at = torch.where(snap, snapped, at)
        return self.tokens[at[:, None] + self.offsets].long()


def read_tokens(folder: Path, split: str, device: torch.device) -> Tensor:
    packed = folder / f"{split}.bin.xz"
    raw = lzma.decompress(packed.read_bytes()) if packed.exists() else (folder / f"{split}.bin").read_bytes()
    return torch.from_numpy(np.frombuffer(raw, np.uint16).astype(np.int16)).to(device)


def save(weights: Weights, folder: Path) -> None:
    """BF16 shards below 15 MB, named model-N.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Weights] = [{}]
    size = 0
    for name, w in weights.items():
        if size + 2 * w.numel() > 15_000_000:
            shards.append({})
            size = 0
        shards[-1][name] = w.detach().to("cpu", torch.bfloat16).contiguous()
        size += 2 * w.numel()
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}.safetensors")


class Run:
    """One training: state, clock and log."""

    def __init__(self, c: Config, t: Training, tokens: Tensor, heldout: Tensor, masters: Weights, out: Path) -> None:
        self.c, self.t, self.out, self.heldout = c, t, out, heldout
        device = tokens.device
        self.masters = {name: w.to(device) for name, w in masters.items()}
        self.shadow = Shadow(self.masters, torch.bfloat16 if tokens.is_cuda else torch.float32)
        self.optimizer = Optimizer(self.masters, t)
        self.batches = Batches(tokens, c.vocab_size - 5, t)
        self.layers, self.losses = Layers(), head_losses
        if tokens.is_cuda:
            self.layers = Layers(
                torch.compile(linear_layer, dynamic=False), torch.compile(attention_layer, dynamic=False)
            )
            self.losses = torch.compile(head_losses, dynamic=False)
        self.log: list[dict[str, float]] = []

    def step(self, factor: float, quantized: bool) -> Tensor:
        """One optimizer step; the losses [main, draft1, draft1 soft, draft2, draft2 soft, balance]."""
        batch = self.batches.draw()
        self.shadow.refresh(quantized)
        leaves = self.shadow.leaves
        hidden = forward_all(leaves, self.c, batch[:, :-1], self.layers)
        parts = self.losses(hidden.main, hidden.draft1, hidden.draft2, leaves["lm_head.weight"], batch[:, 1:])
        loss = parts[0] + self.t.draft1_weight * (parts[1] + parts[2])
        loss = loss + self.t.draft2_weight * (parts[3] + parts[4]) + self.t.balance_weight * hidden.balance
        loss.backward()
        self.optimizer.step(self.shadow.gradients(), factor)
        return torch.stack([*parts, hidden.balance]).detach()

    def train(self) -> None:
        began = time.monotonic()
        total = self.t.minutes * 60 - self.t.closing_seconds
        clock, step, saved, quantized, last = began, 0, False, False, (began, 0)
        while step < self.t.max_steps:
            progress = (time.monotonic() - clock) / max(total - (clock - began), 1)
            if progress >= 1:
                break
            quantized = progress >= self.t.quantized_from
            factor = min(1.0, (step + 1) / self.t.warmup_steps) * (1 - progress)
            losses = self.step(factor, quantized)
            step += 1
            if step == 3:  # everything is compiled: the schedule starts here
                losses.tolist()
                clock = time.monotonic()
                last = (clock, step)
            if step % 50 == 0:  # reading the losses waits for the GPU, so the clock stays honest
                values = losses.tolist()
                now = time.monotonic()
                speed = (step - last[1]) * self.t.batch * self.t.length / (now - last[0])
                last = (now, step)
                names = ("main", "draft1", "draft1_soft", "draft2", "draft2_soft", "balance")
                entry = {"step": step, "seconds": now - began, "tokens_per_s": speed}
                self.log.append(entry | dict(zip(names, values, strict=True)))
                if step % 200 == 0 or step == 50:
                    print({k: round(v, 4) for k, v in self.log[-1].items()}, flush=True)
                assert math.isfinite(values[0]), f"the loss is {values[0]} at step {step}"
                if progress > 0.5 and not saved:
                    saved = True
                    save(self.masters, self.out)
        self.finish(step, time.monotonic() - began, clock - began)

    def finish(self, steps: int, seconds: float, compile_seconds: float) -> None:
        save(self.masters, self.out)
        tokens = (steps - 3) * self.t.batch * self.t.length
        report = {
            "training": asdict(self.t), "steps": steps, "tokens": steps * self.t.batch * self.t.length,
            "seconds": seconds, "compile_seconds": compile_seconds,
            "tokens_per_s": tokens / (seconds - compile_seconds), "log": self.log,
            "device": torch.cuda.get_device_name() if self.heldout.is_cuda else "cpu",
        }  # fmt: skip
        for quantized in (False, True):
            self.shadow.refresh(quantized)
            result = score(self.shadow.leaves, self.c, self.heldout, self.t.length)
            report["heldout_quantized" if quantized else "heldout_bf16"] = result
            print("quantized" if quantized else "bf16", result, flush=True)
        print({k: v for k, v in report.items() if k not in ("log", "training")}, flush=True)
        (self.out / "log.json").write_text(json.dumps(report, indent=1))


def smoke() -> None:
    """A tiny model on a repeating stream, on a CPU: the loss must fall, through the quantizer too."""
    torch.set_num_threads(1)
    c = smoke_config()
    t = Training(minutes=5, batch=8, length=96, warmup_steps=5, max_steps=30, closing_seconds=0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 59, (37,), generator=generator).repeat(200).to(torch.int16)
    run = Run(c, t, tokens, tokens, initial_weights(c, 0), HERE)
    first = run.step(0.2, False)[0].item()
    values = [run.step(1.0, quantized=step > 20)[0].item() for step in range(30)]
    print(f"main loss {first:.3f} -> {values[20]:.3f} -> {values[-1]:.3f} (the last ten steps quantized)")
    assert values[-1] < 0.7 * first
    print(score(run.shadow.leaves, c, tokens, 96, rows=8, limit=2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demo model and its draft head.")
    parser.add_argument("--smoke", action="store_true", help="a tiny run on a CPU, without files")
    parser.add_argument("--tokens", type=Path, help="folder of train.bin and heldout.bin")
    parser.add_argument("--config", type=Path, default=HERE / "config.json")
    parser.add_argument("--out", type=Path, help="folder for the weights and log.json")
    parser.add_argument("--resume", type=Path, help="start from the weights in this folder")
    for name in (
        "minutes",
        "muon_lr",
        "adam_lr",
        "batch",
        "length",
        "max_steps",
        "seed",
        "quantized_from",
        "closing_seconds",
        "warmup_steps",
        "weight_decay",
    ):
        default = getattr(Training, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    if args.smoke:
        smoke()
        return
    if args.tokens is None or args.out is None:
        parser.error("--tokens and --out are needed (or --smoke)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    given = {name: value for name, value in vars(args).items() if name in Training.__dataclass_fields__}
    t, c = replace(Training(), **given), Config.from_json(args.config)
    tokens, heldout = (read_tokens(args.tokens, split, device) for split in ("train", "heldout"))
    masters = read_trained(args.resume) if args.resume else initial_weights(c, t.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    parameters = sum(w.numel() for w in masters.values())
    print(f"{parameters} parameters, {len(tokens)} tokens, {device}", flush=True)
    Run(c, t, tokens, heldout, masters, args.out).train()


if __name__ == "__main__":
    main()
