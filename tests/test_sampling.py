"""Noise and filters against independent sources: Random123's vectors, transformers' warpers, softmax itself.

pytest tests/test_sampling.py
"""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from export.errors import UserError
from runtime.sampling import Sampler, SamplingConfig, all_gumbel, gumbel, philox

# Known answers of Philox4x32-10 published with Random123 (kat_vectors): counter, key, result.
NO_IDS = torch.LongTensor()
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_values(counter, key, expected) -> None:  # type: ignore[no-untyped-def]
    assert philox(np.array(counter, np.uint64)[:, None], key)[:, 0].tolist() == list(expected)


def test_noise_is_gumbel_and_depends_on_nothing_but_seed_and_position() -> None:
    entries = np.arange(20_000)
    noise = gumbel(7, 3, entries)
    assert noise.dtype == np.float32 and np.isfinite(noise).all()
    assert kstest(noise, "gumbel_r").pvalue > 1e-3  # fixed seed: cannot flake
    some = np.array([19_999, 5, 0, 6])
    np.testing.assert_array_equal(gumbel(7, 3, some), noise[some])
    np.testing.assert_array_equal(all_gumbel(7, 3, 19_999), noise[:19_999])
    for other in (gumbel(8, 3, entries), gumbel(7, 4, entries), gumbel(7 + 2**32, 3, entries)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.05


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}]
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_filters_keep_what_transformers_keeps(filters: dict[str, float], temperature: float) -> None:
    sampler = Sampler(SamplingConfig(temperature=temperature, **filters))  # type: ignore[arg-type]
    for _ in range(20):
        scaled = torch.randn(1, 50) * 3 / temperature
        kept = scaled
        if "top_k" in filters:
            kept = TopKLogitsWarper(int(filters["top_k"]))(NO_IDS, kept)
        if "top_p" in filters:
            kept = TopPLogitsWarper(filters["top_p"])(NO_IDS, kept)
        if "min_p" in filters:
            kept = MinPLogitsWarper(filters["min_p"])(NO_IDS, kept)
        expected = torch.isfinite(kept[0]).nonzero()[:, 0].tolist()
        assert sampler._survivors(scaled[0].numpy()).tolist() == expected


def test_samples_follow_the_softmax() -> None:
    logits = np.random.default_rng().standard_normal(12).astype(np.float32)
    config = SamplingConfig(temperature=0.7, seed=11)
    counts = np.bincount([Sampler(config).sample(logits, position) for position in range(20_000)], minlength=12)
    expected = torch.from_numpy(logits / np.float32(0.7)).softmax(-1).double().numpy()
    assert chisquare(counts, expected / expected.sum() * counts.sum()).pvalue > 1e-6  # logits are fresh each run


def test_temperature_zero_is_argmax() -> None:
    logits = np.random.default_rng().standard_normal(100).astype(np.float32)
    assert Sampler(SamplingConfig()).sample(logits, 3) == logits.argmax()


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.5}, {"seed": -1}],
)
def test_values_out_of_range_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="--" + next(iter(bad)).replace("_", "-")):
        SamplingConfig(**bad)  # type: ignore[arg-type]
