"""An independent decoder: transformers' model, and an MTP head built from transformers' own decoder layer.

No caches anywhere: every step runs the whole sequence again, so nothing can be left behind by a rejected draft.

    rounds = Reference(config, state).rounds(prompt, max_new_tokens=64, mtp_k=2)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from tests.checkpoints import State, text_config, transformers_model


class Reference:
    """Greedy decoding with the float32 weights `state` (Hugging Face names)."""

    def __init__(self, config: dict[str, Any], state: State) -> None:
        self.model = transformers_model(config, state)
        self.text = self.model.config
        if "mtp.fc.weight" in state:
            self._build_head(config, state)

    def _build_head(self, config: dict[str, Any], state: State) -> None:
        family = text_config(config)["model_type"].removesuffix("_text")
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        name = {"qwen3_5_moe": "Qwen3_5Moe", "qwen3_5": "Qwen3_5", "qwen3_next": "Qwen3Next"}[family]
        index = self.text.layer_types.index("full_attention")
        self.layer = getattr(module, f"{name}DecoderLayer")(self.text, index).float().eval()
        prefix = "mtp.layers.0."
        self.layer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        norm = getattr(module, f"{name}RMSNorm")
        self.norms = {}
        for part in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            self.norms[part] = norm(self.text.hidden_size, eps=self.text.rms_norm_eps).float()
            self.norms[part].load_state_dict({"weight": state[f"mtp.{part}.weight"]})
        self.fc = state["mtp.fc.weight"]

    @torch.no_grad()
    def forward(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden after the final norm [T, H], logits [T, V]."""
        hidden = self.model.model(torch.tensor([tokens])).last_hidden_state
        return hidden[0], self.model.lm_head(hidden)[0]

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.forward(tokens)[1][-1].argmax()))
        return tokens[len(prompt) :]

    @torch.no_grad()
    def head(self, hidden: torch.Tensor, following: list[int]) -> torch.Tensor:
        """Rows p = 0.. of the head on hidden [T, H] and the tokens p + 1 -> its hidden states [T, H]."""
        embedding = self.model.model.embed_tokens(torch.tensor(following))
        x = torch.cat(
            [self.norms["pre_fc_norm_embedding"](embedding), self.norms["pre_fc_norm_hidden"](hidden)], dim=-1
        )
        x = (x @ self.fc.T)[None]
        rows = x.shape[1]
        positions = torch.arange(rows)[None]
        mask = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
        # Qwen3.5 counts positions on three axes, for text three times the same; older transformers want all three.
        axes = positions.expand(3, 1, rows) if "mrope_section" in self.text.rope_parameters else positions
        rotary = self.model.model.rotary_emb(x, axes)
        x = self.layer(x, position_embeddings=rotary, attention_mask=mask, position_ids=positions)
        return self.norms["norm"](x[0] if isinstance(x, tuple) else x)[0]

    @torch.no_grad()
    def drafts(self, tokens: list[int], hidden: torch.Tensor, count: int) -> list[int]:
        """The `count` tokens that the head proposes after `tokens`; hidden: the main model's, of all but the last."""
        drafts: list[int] = []
        hidden, following = hidden[: len(tokens) - 1], list(tokens[1:])
        for _ in range(count):
            out = self.head(hidden, following)[-1:]
            drafts.append(int(self.model.lm_head(out)[0].argmax()))
            hidden, following = torch.cat([hidden, out]), [*following, drafts[-1]]
        return drafts

    def rounds(self, prompt: list[int], max_new_tokens: int, mtp_k: int) -> list[tuple[list[int], int]]:
        """(drafts, how many of them are right) per round, and with them the positions of every round."""
        sequence = [*prompt, *self.greedy(prompt, max_new_tokens)]
        hidden, _ = self.forward(sequence)
        rounds, done = [], len(prompt) + 1
        while done < len(sequence):
            drafts = self.drafts(sequence[:done], hidden, min(mtp_k, len(sequence) - done - 1))
            right = 0
            while right < len(drafts) and drafts[right] == sequence[done + right]:
                right += 1
            rounds.append((drafts, right))
            done += right + 1
        return rounds
