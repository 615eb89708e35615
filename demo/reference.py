"""transformers' own Qwen3.5 MoE with the demo's weights: the oracle of demo.model, and what calibration runs.

Contract: `transformers_model` takes a config.json and weights under demo.model's names, and returns the text
model in float32 on the CPU with every tensor loaded; `mtp.*` has no place there and is left out.

    python -m demo.evaluate --check
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from demo.model import Weights


def transformers_model(config: Path, weights: Weights) -> nn.Module:
    # imported here, so that training needs no transformers
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    text = json.loads(config.read_text())["text_config"]
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**text)).float().eval()
    named = {name if name == "lm_head.weight" else f"model.{name}": w for name, w in weights.items()}
    kept = {name: w for name, w in named.items() if not name.startswith("model.mtp.")}
    model.load_state_dict(kept, strict=True)
    return model
