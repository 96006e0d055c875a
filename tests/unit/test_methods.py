"""Each paper's method does what its paper says: trajectories against plain numpy on a quadratic."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.aggregator.methods.fedkseed_pro import LEAST, weighed
from services.aggregator.methods.fwdllm import cosines
from services.aggregator.opening import open_job
from shared import directions
from shared.engine.drawing import batch, draws, mini_batches
from shared.errors import EngineError, RejectError
from shared.messages import (
    Importance,
    ProbeResult,
    RoundClosed,
    WalkResult,
)
from shared.messages.jobs import Distribution
from tests.support.quadratic_fleet import SEED, D, Device, a_submission
from tests.support.runs import Run, words


def z(stream_round: int, index: int) -> NDArray[np.float64]:
    return directions.one(SEED, stream_round, index, 0, D, "gauss8").astype(np.float64)


def commit(theta: NDArray[np.int64], stream_round: int, exact: NDArray[np.float64]) -> None:
    """theta (D,) += sum_k round(2^24 exact_k) z_k in fixed point, as plainly as it can be said."""
    moved = np.zeros(D, np.int64)
    for index, value in enumerate(np.rint(exact * 2**24).astype(np.int64).tolist()):
        packed = directions.group_bytes(SEED, stream_round, index, 0, D)
        moved += value * directions.GAUSS8[packed].astype(np.int64)
    theta += moved >> 12


def test_mezo_is_a_constant_step_along_n_estimates(tmp_path: Path) -> None:
    n, step = 4, 0.03
    run = Run(
        a_submission("mezo", 1, n, rounds=40, directions=n, step=step, final_step=1.0, batch_rows=8)
    )
    device = Device("a", tmp_path, 20)
    centres, theta = device.centres, np.zeros(D, np.int64)
    while run.state.ended is None:
        opened = run.opened
        mean = centres[batch(SEED, opened.round, "a", 20, 8)].mean(axis=0)
        slopes = np.array([(theta / 2**24 - mean) @ z(opened.round, j) for j in range(n)])
        told = np.rint(slopes * 2 * opened.eps * 8 * 2**20) / (2 * opened.eps * 8 * 2**20)
        update = device.probes(opened, [(0, n)])
        assert isinstance(update.result, ProbeResult)
        found = np.frombuffer(update.result.differences, "<i4") / (2 * opened.eps * 8 * 2**20)
        # theta reaches the engine as float32, so that a unit of the last place may differ
        assert found == pytest.approx(told, abs=1e-4)
        run.send(update)
        device.follow(run)
        commit(theta, opened.round, -step * found / n)
        assert (device.job.adapter.theta == theta).all()
    best = centres.mean(axis=0)
    assert np.square(theta / 2**24 - best).sum() < np.square(best).sum() / 3


def test_fedkseed_is_the_papers_recurrence(tmp_path: Path) -> None:
    pool, tau, step, rounds = 48, 10, 0.02, 9
    run = Run(
        a_submission(
            "fedkseed",
            3,
            3 * tau,
            rounds=rounds,
            directions=pool,
            local_steps=tau,
            step=step,
            final_step=1.0,
            batch_rows=2,
        )
    )
    held = {"a": 5, "b": 9, "c": 14}
    fleet = {name: Device(name, tmp_path, rows) for name, rows in held.items()}
    eps = run.opened.eps
    theta, accumulated = np.zeros(D, np.int64), np.zeros(pool)
    while run.state.ended is None:
        opened = run.opened
        assert opened.stream_round == 0
        added = np.zeros(pool)
        for name, rows in held.items():
            centres, local = fleet[name].centres, (theta / 2**24).astype(np.float64)
            material = (
                SEED.to_bytes(8, "little")
                + opened.round.to_bytes(4, "little")
                + bytes(4)
                + name.encode()
            )
            drawn, picked = (
                np.random.Philox(key=np.frombuffer(hashed[:16], "<u8").astype(np.uint64))
                for hashed in (
                    hashlib.sha256(b"seedwire walk " + what + b"\0" + material).digest()
                    for what in (b"directions", b"rows")
                )
            )
            batches = mini_batches(picked, rows, 2)
            for index in draws(drawn, pool, b"", tau).tolist():
                rho = (local - centres[next(batches)].mean(axis=0)) @ z(0, index)
                rho = round(rho * 2 * eps * 2**20) / (2 * eps * 2**20)
                local -= step * rho * z(0, index)
                added[index] += rows / sum(held.values()) * rho
        accumulated += added
        run.send(*(device.walks(opened) for device in fleet.values()))
        for device in fleet.values():
            device.follow(run)
        commit(theta, 0, -step * added)
        ours = fleet["a"].job.adapter.theta
        # theta reaches the engine as float32: a slope may be rounded the other way, 5e-5 each
        assert np.abs(ours - theta).max() < 2**24 * step * 1e-3
        theta[:] = ours
    seeds = np.array([z(0, k) for k in range(pool)])
    final = fleet["a"].job.adapter.values()
    assert final == pytest.approx(-step * accumulated @ seeds, abs=1e-4)  # w0 - eta sum A_k z_k
    best = sum(rows * fleet[name].centres.mean(axis=0) for name, rows in held.items()) / 28
    assert np.square(final - best).sum() < np.square(best).sum() / 3


def test_a_late_walk_weighs_its_share_in_the_next_close(tmp_path: Path) -> None:
    run = Run(
        a_submission(
            "fedkseed", 1, 6, rounds=3, directions=16, local_steps=6, final_step=1.0, batch_rows=2
        )
    )
    early, slow = Device("a", tmp_path, 6), Device("b", tmp_path, 12)
    first = run.opened
    late = slow.walks(first)
    assert isinstance(late.result, WalkResult)
    run.send(early.walks(first))
    assert words(run.send(late)) == ["late"]
    early.follow(run)
    run.send(early.walks(run.opened))
    close = run.closes()[1]
    assert close.late == 1
    assert close.commit is not None
    term = close.commit.terms[-1]
    assert term.stream_round == 0
    slopes = np.frombuffer(late.result.differences, "<i4") / (2 * first.eps * 2**20)
    expected = -run.submit.spec.tuning.step * slopes * 12 / (6 + 12) / 2 * 2**24
    assert np.frombuffer(term.coefficients, "<i4") == pytest.approx(expected, abs=1)


def test_fedkseed_pro_draws_what_mattered_more_often(tmp_path: Path) -> None:
    tau = 40
    run = Run(
        a_submission(
            "fedkseed-pro",
            2,
            2 * tau,
            rounds=3,
            directions=8,
            local_steps=tau,
            step=0.001,
            final_step=1.0,
            batch_rows=2,
        )
    )
    fleet = [Device(name, tmp_path, 9) for name in ("a", "b")]
    sizes, visits = np.zeros(8), np.zeros(8)
    while run.state.ended is None:
        opened = run.opened
        assert opened.walk is not None
        if visits.any():
            mean = sizes / (visits + 1)
            likely = np.exp((mean - mean.min()) / np.ptp(mean))
            given_weights = np.frombuffer(opened.walk.weights, "<u2")
            assert given_weights / given_weights.min() == pytest.approx(likely, rel=1e-3)
        updates = [device.walks(opened) for device in fleet]
        for update in updates:
            assert isinstance(update.result, WalkResult)
            indices = [i + first for first, count in update.result.ranges for i in range(count)]
            sizes[indices] += np.frombuffer(update.result.sizes, "<i8")
            visits[indices] += np.frombuffer(update.result.visits, "<u2")
        run.send(*updates)
        for device in fleet:
            device.follow(run)
    assert visits.sum() == 2 * 3 * tau


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 1000)), min_size=1, max_size=40),
    st.integers(0, 2**32),
)
def test_seed_probabilities_are_within_e_of_each_other(
    history: list[tuple[int, int]], seed: int
) -> None:
    sizes, visits = np.array(history, "<i8").T
    weights = weighed(Importance(sizes.tobytes(), visits.tobytes())).astype(np.int64)
    assert weights.min() == LEAST
    assert weights.max() <= np.e * LEAST
    order = np.argsort(sizes / (visits + 1), kind="stable")
    assert (np.diff(weights[order]) >= 0).all()
    drawn = draws(np.random.Philox(seed), len(weights), weights.astype("<u2").tobytes(), 50)
    assert ((drawn >= 0) & (drawn < len(weights))).all()


def test_draws_follow_their_weights_and_batches_take_all_rows_in_turn() -> None:
    weights = np.array([1, 0, 3], "<u2").tobytes()
    drawn = np.bincount(draws(np.random.Philox(1), 3, weights, 8000), minlength=3)
    assert drawn[1] == 0
    assert drawn[2] / drawn[0] == pytest.approx(3, rel=0.1)
    batches = mini_batches(np.random.Philox(2), 10, 3)
    for _ in range(4):
        taken = np.concatenate([next(batches) for _ in range(3)])
        assert len(set(taken.tolist())) == 9
    with pytest.raises(EngineError, match="2 weights for a pool of 3"):
        draws(np.random.Philox(1), 3, weights[:4], 5)


def halves(
    parts: list[tuple[int, int, NDArray[np.float64]]], block: slice
) -> tuple[float, NDArray[np.float64]]:
    """The paper's variance over a block, and the mean of all f = rho z, from first principles.

    `parts`: each update's stream round, first direction and slopes, in order of arrival.
    """
    sums, counts = [np.zeros(D), np.zeros(D)], [0, 0]
    for number, (stream_round, first, slopes) in enumerate(parts):
        for at, slope in enumerate(slopes.tolist()):
            sums[number % 2] += slope * z(stream_round, first + at)
            counts[number % 2] += 1
    apart = (sums[0] / counts[0] - sums[1] / counts[1])[block]
    return float(np.mean(apart**2 / 2)), (sums[0] + sums[1]) / sum(counts)


def test_fwdllm_measures_a_batch_again_until_the_halves_agree(tmp_path: Path) -> None:
    n, step, rounds = 8, 0.05, 6
    run = Run(
        a_submission(
            "fwdllm",
            2,
            n,
            rounds=rounds,
            directions=n,
            step=step,
            final_step=0.0,
            threshold=0.25,
            monitored=1,
            batch_rows=4,
        )
    )
    fleet = [Device(name, tmp_path, 30) for name in ("a", "b")]
    parts: list[tuple[int, int, NDArray[np.float64]]] = []
    theta, more = np.zeros(D), 0
    begun = 0
    while run.state.ended is None:
        opened = run.opened
        assert opened.batch_round == (begun if parts else 0)
        begun = begun if parts else opened.round
        for number, device in enumerate(fleet):
            update = device.probes(opened, [(4 * number, 4)])
            assert isinstance(update.result, ProbeResult)
            drawn = batch(SEED, begun, device.name, 30, 4)
            mean = device.centres[drawn].mean(axis=0)
            exact = [(theta - mean) @ z(opened.round, 4 * number + j) for j in range(4)]
            slopes = np.frombuffer(update.result.differences, "<i4") / (2 * 0.01 * 4 * 2**20)
            assert slopes == pytest.approx(np.array(exact), abs=2e-4)
            parts.append((opened.round, 4 * number, slopes))
            run.send(update)
        variance, mean = halves(parts, slice(D // 2, D))
        close = run.closes()[-1]
        assert close.variance == pytest.approx(variance, rel=1e-3)
        assert close.more == (variance > 0.25)
        assert (close.commit is None) == close.more
        if not close.more:
            theta -= step * (1 - opened.commits / rounds) * mean
            parts = []
        more += close.more
        for device in fleet:
            device.follow(run)
        assert fleet[0].job.adapter.values() == pytest.approx(theta, abs=1e-5)
    assert more > 2
    assert len(run.closes()) == rounds + more


def test_fwdllm_takes_the_candidates_most_like_the_last_commit(tmp_path: Path) -> None:
    n, times = 6, 10
    run = Run(
        a_submission(
            "fwdllm",
            1,
            n,
            rounds=5,
            directions=n,
            candidates=times,
            step=0.05,
            final_step=0.0,
            threshold=1e9,
            most_more=0,
        )
    )
    device = Device("a", tmp_path, 10)
    before, moved = np.zeros(D), np.zeros(D)
    while run.state.ended is None:
        opened = run.opened
        if opened.commits % 2:
            assert opened.directions == n * times
            alike = [
                (-moved) @ z(opened.round, j) / np.sqrt(z(opened.round, j) @ z(opened.round, j))
                for j in range(n * times)
            ]
            best = set(np.argsort(alike)[-n:].tolist())
            assert {i + a for a, count in opened.survivors for i in range(count)} == best
            assert cosines(device.job.adapter, opened.round, n * times, -moved) == pytest.approx(
                np.array(alike) / np.sqrt(moved @ moved), abs=1e-6
            )
        else:
            assert (opened.directions, opened.survivors) == (n, [])
        run.send(device.probes(opened, opened.survivors or [(0, n)]))
        device.follow(run)
        moved = device.job.adapter.values() - before
        before = before + moved


def test_of_a_batch_that_never_settles_the_cap_makes_a_commit(tmp_path: Path) -> None:
    run = Run(
        a_submission(
            "fwdllm",
            1,
            4,
            rounds=1,
            directions=4,
            final_step=0.0,
            threshold=1e-9,
            most_more=3,
        )
    )
    device = Device("a", tmp_path, 10)
    early = run.opened
    rounds: list[int] = []
    while run.state.ended is None:
        rounds.append(run.opened.round)
        run.send(device.probes(run.opened, [(0, 2), (2, 2)]))
        if len(rounds) == 2:  # the first round's sums still wait: who was slow is not late
            slow = device_of("slow", tmp_path).probes(early, [(0, 4)])
            assert words(run.send(slow)) == ["folded"]
        device.follow(run)
    closes = run.closes()
    assert [close.more for close in closes] == [True] * 3 + [False]
    assert closes[-1].commit is not None
    terms = closes[-1].commit.terms
    assert [term.stream_round for term in terms] == rounds
    assert closes[-1].frozen is not None
    assert closes[-1].frozen.normaliser == 4 * 10 * 5  # five updates of four probes on ten rows


def test_sums_that_wait_outlive_an_abandoned_round_and_go_with_a_stopped_job(
    tmp_path: Path,
) -> None:
    submit = a_submission(
        "fwdllm", 1, 4, rounds=2, directions=4, final_step=0.0, threshold=1e-9, most_more=2
    )
    run = Run(submit)
    device = Device("a", tmp_path, 10)
    first = run.opened
    run.send(device.probes(first, [(0, 4)]))
    run.overdue()  # the second round brings nothing
    assert [(close.reason, close.more) for close in run.closes()] == [
        ("enough", True),
        ("abandoned", False),
    ]
    for _ in range(2):
        device.follow(run)
        assert run.opened.batch_round == first.round
        assert run.restarted().state.carried == run.state.carried
        run = run.restarted()
        run.send(device.probes(run.opened, [(0, 4)]))
    close = run.closes()[-1]
    assert not close.more
    assert close.commit is not None
    assert [term.stream_round for term in close.commit.terms] == [1, 3, 4]
    device.follow(run)
    run.send(device.probes(run.opened, [(0, 4)]))
    for event in run.state.decide_close(stop=True):
        assert isinstance(event, RoundClosed)
        assert (event.reason, event.commit) == ("stopped", None)
        run.state.evolve(event, len(run.log) + 1)
    assert run.state.carried == []
    assert run.state.finished


def device_of(name: str, folder: Path) -> Device:
    return Device(name, folder, 10)


@pytest.mark.parametrize("distribution", ["signs", "gauss8"])
@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_the_estimate_is_unbiased(distribution: Distribution, seed: int) -> None:
    """Of a known gradient: slope 1 within its own spread, cosine as theory says."""
    rng = np.random.default_rng(seed)
    gradient, count = rng.normal(size=D), 4000
    slopes = directions.dots(seed, 3, [(0, count)], gradient, 0, distribution)
    ones = np.full(count, 2**20, np.int32)
    estimate = np.zeros(D)
    for first in range(0, count, 1000):
        chunk = np.rint(ones[:1000] * slopes[first : first + 1000] / 8).astype(np.int32)
        estimate += directions.total(seed, 3, [(first, 1000)], chunk, 0, D, distribution)
    estimate *= 8 / 2**20 / count
    power = float(gradient @ gradient)
    assert float(estimate @ gradient) / power == pytest.approx(1, abs=5 * np.sqrt(2 / count))
    cosine = float(estimate @ gradient) / np.sqrt(power * float(estimate @ estimate))
    assert cosine == pytest.approx(np.sqrt(count / (count + D)), abs=0.01)


@pytest.mark.parametrize(
    ("method", "change", "why"),
    [
        ("mezo", {"final_step": 0.1}, "final_step is 0.1, it must be 1.0"),
        ("mezo", {"normalise": "rms"}, "normalise is 'rms', it must be 'none'"),
        ("fwdllm", {"final_step": 0.0, "monitored": 2}, "monitored block 2 of an adapter of 2"),
        ("fwdllm", {"final_step": 0.0, "candidates": 64}, "32768 directions do not fit"),
        ("fedkseed", {"final_step": 1.0}, "local_steps is 0"),
        ("fedkseed", {"final_step": 1.0, "directions": 20_000}, "20000 directions do not fit"),
    ],
)
def test_numbers_that_a_method_has_no_place_for_are_refused(
    method: str, change: dict[str, object], why: str
) -> None:
    with pytest.raises(RejectError, match=why):
        open_job(a_submission(method, 1, 1, None, **change))


def test_the_events_say_why_a_round_closed_and_with_what_signal(tmp_path: Path) -> None:
    run = Run(
        a_submission(
            "fwdllm",
            2,
            8,
            rounds=1,
            directions=8,
            final_step=0.0,
            variance="normalised",
            threshold=1.0,
            most_more=20,
        )
    )
    fleet = [Device(name, tmp_path, 10) for name in ("a", "b")]
    while run.state.ended is None:
        opened = run.opened
        for number, device in enumerate(fleet):
            device.follow(run)
            run.send(device.probes(opened, [(4 * number, 4)]))
    for close in run.closes():
        assert isinstance(close, RoundClosed)
        assert close.signal is not None
        assert close.variance is not None
        assert close.more == (close.signal < 1.0)
    assert run.closes()[0].more
