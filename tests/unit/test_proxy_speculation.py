"""Speculation: drafts change how fast tokens come, never how they are distributed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.proxy_inference.batching import Sequence
from services.proxy_inference.ensemble.combining import divergence, steer
from services.proxy_inference.ensemble.costs import Curve
from services.proxy_inference.ensemble.drafting import Acceptance, Prices, least
from services.proxy_inference.running import Answer, Piece
from services.proxy_inference.sampling import Draft, Sampler, Sampling, candidates

DRAWS = 20_000

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.6, top_k=5),
    Sampling(temperature=1.5, top_p=0.8),
    Sampling(min_p=0.2, bias={3: 2.0}),
    Sampling(presence_penalty=1.0, frequency_penalty=0.5),
]


def _logits(seed: int, count: int = 12) -> NDArray[np.float32]:
    return 2 * np.random.default_rng(seed).standard_normal(count, np.float32)


def _shares(
    sampler: Sampler, sampling: Sampling, logits: NDArray[np.float32]
) -> NDArray[np.float64]:
    biased = logits.copy()
    for token, bias in sampling.bias.items():
        biased[token] += np.float32(bias)
    tokens, weights = candidates(biased, sampling)
    shares = np.zeros(len(logits))
    shares[tokens] = weights / weights.sum()
    return shares


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_token_that_was_drafted_is_distributed_as_one_that_was_not(sampling: Sampling) -> None:
    large, small = _logits(1), _logits(2)
    sampler = Sampler(sampling, seed=7)
    found: Counter[int] = Counter()
    drafted = 0
    for draw in range(DRAWS):
        one = Sampler(sampling, seed=draw)
        draft = one.drafter().propose(small)
        token = one.choose(large, draft)
        found[token] += 1
        drafted += token == draft.token
    wanted = _shares(sampler, sampling, large)
    shares = np.array([found[token] / DRAWS for token in range(len(large))])
    assert np.abs(shares - wanted).sum() / 2 < 0.02
    overlap = np.minimum(wanted, _shares(sampler, sampling, small)).sum()
    assert abs(drafted / DRAWS - overlap) < 0.02, "a draft is taken with the overlap's probability"


def test_a_wrong_claim_of_what_a_draft_was_drawn_by_is_found_out() -> None:
    """The check of the check: were q not the draft's own, the distribution would move."""
    large, small = _logits(1), _logits(2)
    found: Counter[int] = Counter()
    for draw in range(DRAWS):
        one = Sampler(Sampling(), seed=draw)
        draft = one.drafter().propose(small)
        lie = Draft(draft.token, draft.sure, draft.tokens, np.full(len(small), 1 / len(small)))
        found[one.choose(large, lie)] += 1
    shares = np.array([found[token] / DRAWS for token in range(len(large))])
    wanted = _shares(Sampler(Sampling(), 0), Sampling(), large)
    assert np.abs(shares - wanted).sum() / 2 > 0.05


def test_which_drafts_are_sent_moves_no_distribution() -> None:
    """Sent are those that pay, by how sure the drafter is: of its row, not of what it drew."""
    sampling, prices = Sampling(), Prices([1.0, 1.5, 2.0, 2.5], token=1.0)
    large, rows = _logits(1, 6), [0.6 * _logits(seed, 6) for seed in range(2, 8)]
    wanted = _shares(Sampler(sampling, 0), sampling, large)
    sent = 0
    for row in rows:
        found: Counter[int] = Counter()
        acceptance = Acceptance()
        for draw in range(DRAWS // 2):
            one = Sampler(sampling, seed=draw)
            draft = one.drafter().propose(row)
            pays = acceptance.chance(draft.sure) > least(acceptance.mean, prices)
            found[one.choose(large, draft if pays else None)] += 1
            sent += pays
        shares = np.array([found[token] / (DRAWS // 2) for token in range(len(large))])
        assert np.abs(shares - wanted).sum() / 2 < 0.02
    assert 0 < sent < len(rows) * (DRAWS // 2)


class Letters:
    def bytes_of(self, token: int) -> bytes:
        return b"abcdefghijklmnop"[token : token + 1]


def _answer(sampling: Sampling, seed: int = 1, **more: object) -> Answer:
    wanted: dict[str, object] = {"max_tokens": 30, "stops": [], "ends": frozenset({0}), "marks": 2}
    return Answer(Sequence([1]), Letters(), Sampler(sampling, seed), **(wanted | more))  # pyright: ignore[reportArgumentType]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 20),
    stop=st.sampled_from([[], ["fc"], ["b", "ddd"]]),
    penalty=st.sampled_from([0.0, 1.5]),
    length=st.integers(1, 9),
)
def test_a_greedy_answer_is_the_same_with_any_drafts(
    seed: int, tokens: int, stop: list[str], penalty: float, length: int
) -> None:
    """Text, log-probabilities, stops and lengths: nothing shows whether tokens were drafted."""
    random = np.random.default_rng(seed)
    table = 3 * random.standard_normal((12, 12)).astype(np.float32)  # by the token before
    guesses = table + random.choice([0.0, 2.0]) * random.standard_normal((12, 12))
    sampling = Sampling(temperature=0.0, frequency_penalty=penalty)
    plain = _answer(sampling, max_tokens=tokens, stops=stop)
    told_plain: list[Piece] = []
    while not told_plain or not told_plain[-1].finish:
        piece = plain.take(table[plain.sequence.tokens[-1]][None])
        told_plain += [piece] if piece else []
    fast = _answer(sampling, max_tokens=tokens, stops=stop)
    told_fast: list[Piece] = []
    passes = 0
    while not told_fast or not told_fast[-1].finish:
        drafts: list[Draft] = []
        drafter = fast.drafter()
        last = fast.sequence.tokens[-1]
        while drafter is not None and len(drafts) < min(length, fast.left - 1):
            draft = drafter.propose(guesses[last].astype(np.float32))
            drafts.append(draft)
            last = draft.token
        read = [fast.sequence.tokens[-1], *(draft.token for draft in drafts)]
        piece = fast.take(table[read], drafts)
        told_fast += [piece] if piece else []
        passes += 1
    assert fast.sequence.tokens == plain.sequence.tokens
    assert fast.written == plain.written
    texts = ["".join(piece.text for piece in told) for told in (told_plain, told_fast)]
    marks = [[mark for piece in told for mark in piece.marks] for told in (told_plain, told_fast)]
    assert texts[0] == texts[1]
    assert marks[0] == marks[1]
    assert told_fast[-1].finish == told_plain[-1].finish
    assert passes <= plain.written


def test_what_steers_is_the_difference_of_the_small_models() -> None:
    large, tuned, base = (_logits(seed, 8)[None] for seed in (1, 2, 3))
    wanted = large + 1.5 * (tuned - base)
    steered = large.copy()
    steer(steered, tuned, base, 1.5)
    np.testing.assert_allclose(steered, wanted, rtol=1e-6)
    wide = np.concatenate([large, [[9.0, 9.0]]], axis=1, dtype=np.float32)
    steer(wide, tuned, base, 1.5)
    np.testing.assert_allclose(wide[:, :8], wanted, rtol=1e-6)
    assert wide[0, 8:].tolist() == [9.0, 9.0]
    assert divergence(large[0], large[0]) == 0.0
    assert divergence(large[0], tuned[0]) > 0.1


def test_a_pass_costs_what_trials_and_service_say() -> None:
    curve = Curve()
    for size, seconds in ((1, 1.0), (4, 4.0), (1, 1.5), (8, 4.4)):
        curve.tried(size, seconds)
    assert [curve.seconds(size) for size in (1, 2, 4, 6, 8, 16)] == pytest.approx(
        [1.0, 2.0, 4.0, 4.2, 4.4, 8.8]
    )
    for _ in range(100):
        curve.measured(1, 2.0)
    assert curve.seconds(1) == pytest.approx(2.0, rel=0.01)
    assert curve.seconds(4) == pytest.approx(8.0, rel=0.01), "all sizes get slower together"
    for _ in range(100):
        curve.measured(1, 2.0)
        curve.measured(4, 4.0)
    assert curve.seconds(1) > 1.8, "but what was measured of a size counts more for it"
    assert curve.seconds(4) < 5.2
    assert curve.seconds(4) / 4.0 < curve.seconds(3) / 3.0 < curve.seconds(1)


def test_a_pass_that_was_held_up_does_not_spoil_the_curve() -> None:
    curve = Curve()
    curve.tried(2, 1.0)
    for _ in range(20):
        curve.measured(2, 1.0)
    curve.measured(2, 50.0)
    assert curve.seconds(2) < 1.5
    for _ in range(200):
        curve.measured(2, 3.0)
    assert curve.seconds(2) == pytest.approx(3.0, rel=0.05), "a lasting change is followed"


def test_drafting_pays_where_verifying_is_cheap_and_stops_where_it_is_not() -> None:
    free = Prices([1.0, 1.05, 1.1, 1.15], token=1.0)
    linear = Prices([1.0, 2.0, 3.0, 4.0], token=1.0)
    stair = Prices([1.0, 1.9, 2.0, 2.1], token=1.0)  # the second token costs, those after it hardly
    assert least(0.1, free) < 0.1
    assert least(0.99, linear) > 0.99
    assert least(0.8, stair) < 0.8, "two drafts together pay where one alone would not"
    assert least(0.5, stair) > 0.3


def test_how_often_drafts_are_taken_is_learnt_by_how_sure_the_drafter_was() -> None:
    acceptance = Acceptance()
    assert acceptance.chance(0.95) > acceptance.chance(0.05)
    for _ in range(2000):
        acceptance.learn(0.95, 0.0)
        acceptance.learn(0.05, 1.0)
    assert acceptance.chance(0.95) < 0.05
    assert acceptance.chance(0.05) > 0.95
    for _ in range(3000):
        acceptance.learn(0.95, 1.0)
    assert acceptance.chance(0.95) > 0.9, "and learnt anew when it changes"
