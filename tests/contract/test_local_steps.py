"""Local steps in closed form: the same everywhere and every time, plain Adam, and no token sent."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shared import directions
from shared.engine.closed_form import ClosedForm
from shared.engine.drawing import mini_batches
from shared.engine.job import Job
from shared.engine.probing import NAT, probe
from shared.engine.protocol import Probe
from shared.errors import EngineError
from shared.messages import LocalSteps, ProbeResult
from tests.support import tiny_gguf
from tests.support.last_block import ROWS, SEED, a_job, a_probe, last_block

LOCAL = LocalSteps(steps=7, rows=4, rate=0.01)


@pytest.fixture(params=["choices", "tokens"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    path = tiny_gguf.write(tmp_path / "model.gguf", "qwen3")
    return a_job(path, request.param, last_block(path, rows=ROWS[request.param]), spread=0.05)


def closed_of(job: Job) -> ClosedForm:
    assert job.closed is not None
    return job.closed


def told(result: ProbeResult, request: Probe) -> NDArray[np.float64]:
    """Slopes per unit of weight: (n,)."""
    return np.frombuffer(result.differences, "<i4") / NAT / (2 * request.eps) / result.weight


def walked(job: Job, local: LocalSteps) -> NDArray[np.float64]:
    """By how much plain Adam moves theta down the device's loss from where it stands: (d,)."""
    closed, rows = closed_of(job), job.rows_of(1)
    sites = job.sites(closed, rows)
    numbers = SEED.to_bytes(8, "little") + (1).to_bytes(4, "little") + bytes(4)
    key = hashlib.sha256(b"seedwire walk steps\0" + numbers + b"a").digest()[:16]
    generator = np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64))
    batches = mini_batches(generator, len(rows), local.rows)
    start = job.adapter.values().astype(np.float64)
    theta, m, v = start.copy(), np.zeros(len(start)), np.zeros(len(start))
    for t in range(1, local.steps + 1):
        chosen = [sites[number] for number in next(batches)]
        losses, gradient = closed.gradient(chosen, theta.astype(np.float32))
        g = gradient / losses.weight.sum()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        theta = theta - local.rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    return theta - start


def test_what_a_device_tells_is_the_move_of_plain_adam(job: Job) -> None:
    move = walked(job, LOCAL)
    request = a_probe(job, local=LOCAL)
    result = probe(job, request)
    wanted = -directions.dots(SEED, 1, [(0, 24)], move / job.layout.magnitudes, 0, "signs")
    assert told(result, request) == pytest.approx(wanted, abs=2e-3 * float(np.abs(wanted).max()))
    closed, rows = closed_of(job), job.rows_of(1)
    base = closed.losses(job.sites(closed, rows), job.adapter.values())
    assert result.loss / NAT == pytest.approx(base.loss.sum(), abs=1e-5)  # where it stood
    after = closed.losses(job.sites(closed, rows), (job.adapter.values() + move).astype(np.float32))
    assert after.loss.sum() < 0.9 * base.loss.sum()


def test_a_scope_moves_alone(job: Job) -> None:
    first, blocks = 2, 6
    start, count = job.layout.span((first, blocks))
    closed = closed_of(job)
    request = a_probe(job, local=LocalSteps(1, 64, 0.01), scope=(first, blocks))
    _, gradient = closed.gradient(job.sites(closed, job.rows_of(1)), job.adapter.values())
    part = gradient[start : start + count]
    move = -0.01 * np.sign(part) * (np.abs(part) > 1e-6)  # Adam's first step
    scaled = move / job.layout.magnitudes[start : start + count]
    wanted = -directions.dots(SEED, 1, [(0, 24)], scaled, start, "signs")
    assert told(probe(job, request), request) == pytest.approx(wanted, abs=5e-3)


def test_steps_repeat_themselves_whole_or_in_parts_and_send_nothing(job: Job) -> None:
    whole = probe(job, a_probe(job, local=LOCAL))
    sent = job.model.forwarded
    assert probe(job, a_probe(job, local=LOCAL)) == whole
    parts = [probe(job, a_probe(job, local=LOCAL, ranges=[each])) for each in ((0, 10), (10, 14))]
    assert parts[0].differences + parts[1].differences == whole.differences
    assert {part.loss for part in parts} == {whole.loss}
    assert {part.weight for part in parts} == {whole.weight}
    assert job.model.forwarded == sent
    fresh = a_job(
        Path(job.request.model),
        job.request.task.loss,
        job.adapter.manifest.blocks,
        spread=0.05,
    )
    assert probe(fresh, a_probe(fresh, local=LOCAL)) == whole
    other = probe(job, a_probe(job, local=LOCAL, round=2))
    assert other.differences != whole.differences  # other mini-batches


def test_without_local_steps_the_gradient_is_sent(job: Job) -> None:
    request = a_probe(job)
    closed = closed_of(job)
    losses, gradient = closed.gradient(job.sites(closed, job.rows_of(1)), job.adapter.values())
    mean = gradient * job.layout.magnitudes / losses.weight.sum()
    wanted = directions.dots(SEED, 1, [(0, 24)], mean, 0, "signs")
    assert told(probe(job, request), request) == pytest.approx(
        wanted, abs=1e-3 * float(np.abs(wanted).max())
    )


def test_fewer_rows_than_a_mini_batch_are_all_taken_at_each_step(job: Job) -> None:
    exactly = LocalSteps(steps=5, rows=len(job.rows_of(1)), rate=0.01)
    more = LocalSteps(steps=5, rows=1000, rate=0.01)
    request = a_probe(job, local=more)
    assert probe(job, request) == probe(job, a_probe(job, local=exactly))
    few = probe(job, a_probe(job, local=more, batch_rows=3))
    assert few.weight < probe(job, request).weight
    assert np.frombuffer(few.differences, "<i4").any()


def test_steps_that_diverge_are_an_error_that_names_the_mend(job: Job) -> None:
    with np.errstate(all="ignore"), pytest.raises(EngineError, match="lower the job's local rate"):
        probe(job, a_probe(job, local=LocalSteps(20, 4, 1e30)))
