"""The sampler, against distributions written down the slow way."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.proxy_inference.sampling import (
    Sampler,
    Sampling,
    candidates,
    log_probabilities,
    top,
)

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, 3.0], np.float32)


def reference(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Filtered probabilities, token by token."""
    weights = {t: np.exp((x - max(logits)) / sampling.temperature) for t, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: (-weights[token], token))
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    mass = sum(weights[token] for token in ranked)
    kept: list[int] = []
    for token in ranked:
        kept.append(token)
        if sum(weights[one] for one in kept) >= sampling.top_p * mass:
            break
    kept = [token for token in kept if weights[token] >= sampling.min_p * weights[kept[0]]]
    mass = sum(weights[token] for token in kept)
    return {token: weights[token] / mass for token in kept}


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=30),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)
def test_the_candidates_are_those_of_the_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, weights = candidates(np.array(logits, np.float32), sampling)
    wanted = reference(logits, sampling)
    got = dict(zip(tokens.tolist(), (weights / weights.sum()).tolist(), strict=True))
    if got.keys() != wanted.keys():  # a float's last bit decided at the very border of top_p
        assert abs(len(got) - len(wanted)) <= 1
        assert len(got.keys() & wanted.keys()) >= min(len(got), len(wanted))
    else:
        assert got == pytest.approx(wanted, abs=1e-9)


def test_drawn_tokens_follow_the_distribution() -> None:
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.95, min_p=0.02)
    sampler = Sampler(sampling, seed=3)
    drawn = Counter(sampler.choose(LOGITS) for _ in range(40_000))
    wanted = reference(LOGITS.tolist(), sampling)
    assert drawn.keys() == wanted.keys()
    distance = sum(abs(drawn[token] / 40_000 - share) for token, share in wanted.items()) / 2
    assert distance < 0.01


def test_top_p_over_a_large_vocabulary_sorts_few_and_keeps_the_same() -> None:
    random = np.random.default_rng(0)
    for scale in (0.1, 1.0, 4.0):
        logits = (scale * random.standard_normal(20_000)).astype(np.float32)
        tokens, _ = candidates(logits, Sampling(top_p=0.9))
        weights = np.exp(logits.astype(np.float64) - logits.max())
        order = np.argsort(-weights, kind="stable")
        end = int(np.searchsorted(np.cumsum(weights[order]), 0.9 * weights.sum())) + 1
        assert set(tokens.tolist()) == set(order[:end].tolist())


def test_one_seed_gives_one_text_and_each_answer_of_a_request_its_own() -> None:
    def text(seed: int, stream: int = 0) -> list[int]:
        sampler = Sampler(Sampling(), seed, stream)
        return [sampler.choose(LOGITS) for _ in range(40)]

    assert text(5) == text(5)
    assert text(5) != text(6)
    assert text(5, 0) != text(5, 1)
    assert text(-1) == text(2**64 - 1)


def test_temperature_zero_takes_the_likeliest_after_bias_and_penalties() -> None:
    assert Sampler(Sampling(temperature=0), 0).choose(LOGITS) == 5
    assert Sampler(Sampling(temperature=0, bias={5: -100.0}), 0).choose(LOGITS) == 0
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.6), 0)
    assert [sampler.choose(LOGITS) for _ in range(4)] == [5, 5, 0, 5]
    sampler = Sampler(Sampling(temperature=0, presence_penalty=1.5), 0)
    assert [sampler.choose(LOGITS) for _ in range(4)] == [5, 0, 5, 5]
    assert LOGITS[5] == 3.0  # the model's logits are not touched


def test_log_probabilities_are_the_models_own() -> None:
    values = log_probabilities(LOGITS)
    assert np.exp(values).sum() == pytest.approx(1.0)
    assert values[5] - values[0] == pytest.approx(1.0)
    assert top(values, 3) == [5, 0, 1]
    assert top(values, 0) == []
    assert len(top(values, 99)) == 6
