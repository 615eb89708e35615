"""How often drafts are right, by position and by kind of text: a part of `python -m runtime.bench`.

Where the model writes the text, a round is one sample. Where a text is the context, every position of it is one, and
its rounds start from the text. A share counts a draft only where those before it in the round were right as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

from runtime.sampling import SamplingConfig

if TYPE_CHECKING:
    from runtime.bench import Bench

MTP_K = 4
# Chapters of Python's reference manual that are prose for the most part: English, which the demo knows less well.
PROSE = ("assignment", "calls", "comparisons", "execmodel", "import", "objects", "try", "types")


def kinds(
    bench: Bench, chats: list[list[int]], modules: tuple[str, ...], prose: Sequence[str] = PROSE, count: int = 300
) -> list[dict[str, Any]]:
    """One entry a kind: `kind`, `how` it was measured, and `acceptance`: share of the samples in which the first i
    drafts all are right, for i from 1 to MTP_K. chats: prompts as token ids, perhaps none. modules, prose: names of
    modules and of pydoc's topics, of which `count` tokens each are followed."""
    prompts = f"{len(bench.prompts)} prompts, up to {bench.count} tokens each"
    sampled = SamplingConfig(temperature=1.0, seed=1)
    found = [("code, greedy", prompts, bench.decode(MTP_K, SamplingConfig())["acceptance"])]
    if chats:
        talk = type(bench)(bench.engine, chats, bench.count)
        how = f"{len(chats)} requests, up to {bench.count} tokens each"
        found.append(("chat, greedy", how, talk.decode(MTP_K, SamplingConfig())["acceptance"]))
    found += [
        ("code, temperature 1", f"{prompts}; drafts share the noise", bench.decode(MTP_K, sampled)["acceptance"]),
        (
            *("code, temperature 1, greedy drafts", prompts),
            bench.decode(MTP_K, sampled, drafting=SamplingConfig())["acceptance"],
        ),
        (
            "library code as context",
            f"{len(modules)} modules of Python's standard library, {count} tokens each",
            bench.text_as_context(modules, MTP_K, count),
        ),
        (
            "prose as context",
            f"{len(prose)} chapters of Python's reference manual, {count} tokens each",
            bench.as_context([topics[name] for name in prose], MTP_K, count),
        ),
    ]
    return [{"kind": kind, "how": how, "acceptance": acceptance} for kind, how, acceptance in found]
