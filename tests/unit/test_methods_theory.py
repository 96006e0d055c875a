"""Each paper's method where its mathematics is known: on a quadratic, and with directions alone.

Of d parameters and n directions of independent +-1 entries, the two-point estimate g' of a gradient
g has E g' = g and E |g'|^2 = (d + n - 1) / n |g|^2 (Malladi et al., lemma 2, is the same for a
sphere); one entry of one direction's estimate has variance |g|^2 - g_i^2.
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from services.aggregator.methods import METHODS, Past
from services.aggregator.methods.fwdllm import cosines
from shared.adapter import Adapter, term
from shared.directions import one
from shared.messages import RoundClosed, Tuning
from tests.support.quadratic_fleet import SEED, Device, a_manifest, a_submission
from tests.support.runs import Run

ROWS = 20


def followed(
    run: Run, device: Device, directions: int
) -> tuple[NDArray[np.float64], list[RoundClosed]]:
    """Squared distance from the best before and after each commit, with one device, and the closes.

    The device measures all of its rows each round, so that the loss is one quadratic throughout.
    """
    best = device.centres.mean(axis=0)
    away = [float(best @ best)]
    while run.state.ended is None:
        opened = run.opened
        run.send(device.probes(opened, opened.survivors or [(0, directions)]))
        device.follow(run)
        if not run.closes()[-1].more:
            apart = device.job.adapter.values() - best
            away.append(float(apart @ apart))
    return np.array(away), run.closes()


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [1, 8])
def test_mezo_goes_by_the_factor_that_its_theory_gives(
    tmp_path: Path, n: int, times: float
) -> None:
    """1 - 2 step + step^2 (d + n - 1) / n: least at step n / (d + n - 1), 1 at twice that.

    There one direction mirrors theta, and its distance stays to the last place.
    """
    d = 128
    step, rounds = times * n / (d + n - 1), 200
    manifest = a_manifest("signs", d)
    submit = a_submission(
        "mezo",
        1,
        n,
        manifest,
        rounds=rounds,
        directions=n,
        step=step,
        final_step=1.0,
        batch_rows=ROWS,
    )
    device = Device("a", tmp_path, ROWS, manifest)
    away, _ = followed(Run(submit), device, n)
    near = (away[:-1] > 1e-3 * away[0]) & (away[:-1] < 2 * away[0])  # coefficients are bounded
    ratios = (away[1:] / away[:-1])[near]
    spread = float(ratios.std() / np.sqrt(len(ratios)))
    factor = 1 - 2 * step + step**2 * (d + n - 1) / n
    assert len(ratios) > 20
    assert ratios.mean() == pytest.approx(factor, abs=4 * spread + 1e-6)
    assert spread < 0.2 * max(step, abs(1 - factor))


def test_fwdllm_s_variance_and_signal_are_those_of_its_estimates(tmp_path: Path) -> None:
    """With m directions in each half: sum_i Var_i / (count m), and 2 m |g|^2 / sum_i Var_i."""
    d, n = 600, 8
    manifest = a_manifest("signs", d)
    submit = a_submission(
        "fwdllm",
        2,
        2 * n,
        manifest,
        rounds=1,
        directions=2 * n,
        final_step=0.0,
        threshold=1e-9,
        monitored=1,
        batch_rows=ROWS,
    )
    run = Run(submit)
    fleet = [Device("a", tmp_path, ROWS, manifest), Device("b", tmp_path, ROWS, manifest)]
    fleet[1].job = fleet[0].job  # the same rows: what differs between the halves is chance alone
    while run.state.ended is None:
        opened = run.opened
        for number, device in enumerate(fleet):
            run.send(device.probes(opened, [(n * number, n)]))
        fleet[0].follow(run)
    gradient = fleet[0].centres.mean(axis=0)
    power, own = float(gradient @ gradient), gradient[d // 2 :]
    noise = float((power - own**2).sum())
    closes = run.closes()
    assert len(closes) == 41
    for number, close in list(enumerate(closes, 1))[10:]:
        m = number * n
        assert close.variance == pytest.approx(noise / (len(own) * m), rel=0.25)
        signal = 2 * m * float(own @ own) / noise
        assert close.signal == pytest.approx(signal, abs=5 * np.sqrt(2 / len(own)))


def test_the_best_tenth_of_the_candidates_are_as_alike_as_order_statistics_say() -> None:
    """The mean of the top tenth of normal numbers is 1.755, and a cosine's deviation 1/sqrt(d)."""
    d, n, times = 400, 200, 10
    adapter = Adapter.fresh(a_manifest("gauss8", d))
    newest = term(3, (0, 2), [(0, 16)], np.arange(-8, 8) * 2**16)
    tuning = Tuning(method="fwdllm", directions=n, candidates=times, how="probe")
    plan = METHODS["fwdllm"].plan(tuning, adapter, 4, Past(commits=1, terms=[newest]))
    assert (plan.stream_round, plan.directions) == (4, n * times)
    chosen = [first + i for first, count in plan.survivors for i in range(count)]
    assert len(chosen) == n
    aggregate = -adapter.total([newest]).astype(np.float64)
    alike = cosines(adapter, 4, n * times, aggregate)
    assert alike.mean() == pytest.approx(0, abs=4 / np.sqrt(d * n * times))
    assert alike[chosen].mean() * np.sqrt(d) == pytest.approx(1.755, abs=0.06)
    every_second = METHODS["fwdllm"].plan(tuning, adapter, 5, Past(commits=2, terms=[newest]))
    assert (every_second.directions, every_second.survivors) == (n, [])


@pytest.mark.parametrize("method", ["fedkseed", "fedkseed-pro"])
def test_walks_end_at_the_point_of_the_pool_s_span_that_is_nearest_to_the_best(
    tmp_path: Path, method: str
) -> None:
    """There no direction has a slope, however it is drawn; outside the span nothing ever moves."""
    d, pool, tau = 96, 32, 80
    manifest = a_manifest("signs", d)
    submit = a_submission(
        method,
        1,
        tau,
        manifest,
        rounds=25,
        directions=pool,
        local_steps=tau,
        step=1 / d,
        final_step=1.0,
        batch_rows=ROWS,
    )
    run, device = Run(submit), Device("a", tmp_path, ROWS, manifest)
    while run.state.ended is None:
        run.send(device.walks(run.opened))
        device.follow(run)
    best = device.centres.mean(axis=0)
    span = np.array([one(SEED, 0, index, 0, d, "signs") for index in range(pool)]).T
    nearest = span @ np.linalg.lstsq(span, best)[0]
    assert np.square(nearest).sum() < 0.7 * np.square(best).sum()
    assert device.job.adapter.values() == pytest.approx(nearest, abs=1e-3)
