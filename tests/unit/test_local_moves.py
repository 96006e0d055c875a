"""Rounds of local steps: the close rebuilds the fleet's mean move from its products."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from services.aggregator.opening import open_job
from shared import directions
from shared.adapter import UNIT
from shared.codec import encode_manifest
from shared.errors import RejectError
from shared.messages import (
    Block,
    LocalSteps,
    Manifest,
    ProbeResult,
    SubmitJob,
    SubmitUpdate,
    UpdateKey,
    Variant,
)
from tests.support.jobs import a_job, adapter_after
from tests.support.runs import Run

D, SEED, SCALE = 24, 7, 2
Vector = NDArray[np.float64]


def a_manifest(*blocks: Block) -> bytes:
    rows = [Block("output_rows", "output.weight", [2, D // 2], rows=[5, 9], scale=SCALE)]
    d = sum(int(np.prod(block.shape)) for block in blocks or rows)
    variants = [Variant("a" * 64, 1, "tiny.gguf")]
    return encode_manifest(Manifest(0, "llama", SEED, list(blocks) or rows, variants, d))


def a_submission(
    directions: int, *, devices: int = 2, rounds: int = 3, **tuning: object
) -> SubmitJob:
    """A job of local steps over D entries of output rows."""
    job = a_job(
        rounds=rounds,
        directions=directions,
        enough_devices=devices,
        enough_probes=directions * devices,
    )
    usual = {"how": "exact", "local_steps": 5, "local_rate": 0.04, "step": 1.0} | tuning
    spec = replace(job.spec, tuning=replace(job.spec.tuning, **usual))
    return replace(job, spec=spec, manifest=a_manifest())


def moved_by(run: Run, device: str, move: Vector, weight: int, count: int = 0) -> SubmitUpdate:
    """What a device says that would move theta by `move` (D,); of the first `count` directions."""
    opened = run.opened
    ranges = [(0, count or opened.directions)]
    products = directions.dots(SEED, opened.stream_round, ranges, move / 2.0**SCALE, 0, "signs")
    told = np.rint(-products * weight * 2 * opened.eps * 2**20).astype("<i4")
    result = ProbeResult("exact", ranges, told.tobytes(), b"", weight << 20, weight)
    key = UpdateKey(opened.job, opened.epoch, opened.round, device, 0)
    return SubmitUpdate(key=key, digest=opened.digest, result=result, work_s=0.1)


def theta(run: Run) -> Vector:
    return adapter_after(run.submit.manifest, run.log).theta.astype(np.float64) * UNIT


def z(stream_round: int, count: int) -> Vector:
    """Directions in units of theta: (count, D)."""
    made = [directions.one(SEED, stream_round, j, 0, D, "signs") for j in range(count)]
    return np.array(made, np.float64) * 2.0**SCALE


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    weights=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    step=st.sampled_from([0.5, 1.0]),
)
def test_a_close_is_its_share_of_the_weighted_mean_move_as_its_directions_see_it(
    seed: int, weights: list[int], step: float
) -> None:
    run = Run(a_submission(48, devices=len(weights), step=step))
    moves = np.random.default_rng(seed).normal(size=(len(weights), D)) * 0.3
    z_j = z(run.opened.stream_round, 48)
    run.send(*(moved_by(run, f"d{n}", moves[n], weight) for n, weight in enumerate(weights)))
    mean = np.average(moves, axis=0, weights=weights)
    seen = (z_j @ mean) @ z_j / 48 / 4.0**SCALE
    assert theta(run) == pytest.approx(step * 48 / (48 + D - 1) * seen, abs=1e-4)


def test_with_many_directions_the_move_is_rebuilt() -> None:
    run = Run(a_submission(8192))
    moves, weights = np.random.default_rng(1).normal(size=(2, D)) * 0.3, (30, 10)
    run.send(*(moved_by(run, f"d{n}", moves[n], weights[n]) for n in range(2)))
    mean = np.average(moves, axis=0, weights=weights)
    chance = np.sqrt(D / 8192) * np.linalg.norm(mean)
    assert np.linalg.norm(theta(run) - mean) < 1.5 * chance


@pytest.mark.parametrize("measured", [0, 6])
def test_in_expectation_a_round_makes_its_share_of_the_move_and_errs_least(measured: int) -> None:
    rounds, directions_a_round = 600, 12
    run = Run(a_submission(directions_a_round, devices=1, rounds=rounds, final_step=1.0))
    move = np.random.default_rng(2).normal(size=D) * 0.1  # theta ends at 128
    places = [np.zeros(D)]
    adapter = adapter_after(run.submit.manifest, [])
    for number in range(rounds):
        run.send(moved_by(run, "a", move, 20, measured))
        if measured:
            run.overdue()
        close = run.closes()[number]
        adapter.apply(close.round, close.commit)
        places.append(adapter.theta.astype(np.float64) * UNIT)
    made = np.diff(places, axis=0)
    count = measured or directions_a_round
    share = count / (count + D - 1)
    along = made @ move / (move @ move)
    assert along.mean() == pytest.approx(share, abs=5 * float(along.std()) / np.sqrt(rounds))
    across = made.mean(axis=0) - along.mean() * move
    assert np.linalg.norm(across) < 0.1 * np.linalg.norm(move)
    errors = [np.square(factor * made - move).sum(axis=1).mean() for factor in (0.8, 1.0, 1.25)]
    assert min(errors) == errors[1], "neither more nor less of it is nearer to the move"


def test_the_rate_falls_with_the_commits_and_the_step_does_not() -> None:
    run = Run(a_submission(16, devices=1, rounds=5, final_step=0.2))
    move, before = np.full(D, 0.1), np.zeros(D)
    while run.state.ended is None:
        z_j = z(run.opened.stream_round, 16)
        run.send(moved_by(run, "a", move, 8))
        seen = (z_j @ move) @ z_j / 16 / 4.0**SCALE
        assert theta(run) - before == pytest.approx(16 / (16 + D - 1) * seen, abs=1e-4)
        before = theta(run)
    told = [opened.local for opened in run.opened_rounds() if opened.local is not None]
    rates = [0.04 * share for share in (1.0, 0.8, 0.6, 0.4, 0.2)]
    assert [local.rate for local in told] == pytest.approx(rates)
    assert {replace(local, rate=0.0) for local in told} == {LocalSteps(5, 64, 0.0)}


def test_without_local_steps_devices_are_asked_for_their_gradient() -> None:
    run = Run(a_submission(16, local_steps=0))
    assert run.opened.local is None


def test_a_restart_goes_on_with_the_same_steps() -> None:
    run = Run(a_submission(16, devices=1, rounds=3, final_step=0.2))
    run.send(moved_by(run, "a", np.full(D, 0.1), 8))
    assert run.restarted().opened == run.opened


LORA = Block("lora_b", "blk.1.attn_q.weight", [D], d_in=D)


@pytest.mark.parametrize(
    ("tuning", "blocks", "why"),
    [
        ({"how": "probe"}, [], "local_steps need how 'exact' and normalise 'none'"),
        ({"normalise": "rms"}, [], "local_steps need how 'exact' and normalise 'none'"),
        ({}, [LORA, replace(LORA, tensor="blk.0.attn_q.weight")], "use how 'probe'"),
        ({"local_steps": 0}, [LORA, replace(LORA, tensor="blk.0.attn_v.weight")], "the last block"),
        ({}, [replace(LORA, tensor="output.weight")], "use how 'probe'"),
        ({}, [LORA, Block("control", "blk.1", [D], layer=1)], "use how 'probe'"),
    ],
)
def test_what_has_no_closed_form_is_refused(
    tuning: dict[str, Any], blocks: list[Block], why: str
) -> None:
    job = a_submission(16, **tuning)
    with pytest.raises(RejectError, match=re.escape(why)):
        open_job(replace(job, manifest=a_manifest(*blocks)))


def test_lora_of_one_block_beside_output_rows_is_taken() -> None:
    both = [replace(LORA, tensor=f"blk.1.{name}.weight") for name in ("attn_q", "ffn_up")]
    rows = Block("output_rows", "output.weight", [2, D], rows=[3, 4])
    assert open_job(replace(a_submission(16), manifest=a_manifest(*both, rows)))
