"""A device's walk over real rows and blocks: it lowers the loss, repeats itself, and adds up."""

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from shared.adapter import term
from shared.codec import encode_manifest
from shared.engine.evaluating import evaluate
from shared.engine.examples import choice_tokens
from shared.engine.fake import FakeEngine, Words
from shared.engine.job import Job
from shared.engine.model import Example, Losses
from shared.engine.protocol import Evaluate, OpenJob
from shared.engine.protocol import Walk as WalkRequest
from shared.engine.walking import walk
from shared.errors import EngineError
from shared.messages import Block, Commit, Manifest, Task, Variant, Walk, WalkResult

WIDTH, POOL, EPS, STEP = 32, 128, 0.01, 0.05
TASK = Task("choices", "{text}\nAnswer:", {"0": " dull", "1": " fine", "2": " odd"})
ROWS = choice_tokens(TASK, Words(1024))
BLOCKS = {
    "output rows": [Block("output_rows", "output.weight", [3, WIDTH], rows=ROWS)],
    "lora": [
        Block("lora_b", "blk.0.mix.weight", [WIDTH], slot=slot, d_in=WIDTH, scale=1)
        for slot in range(2)
    ],
    "control": [Block("control", "", [WIDTH], layer=1)],
}


def a_job(folder: Path, blocks: list[Block], task: Task = TASK) -> Job:
    data = folder / "rows.jsonl"
    said = ["grey flat slow", "good bright quick", "strange bent loose"]
    rows = [{"text": f"{said[n % 3]} item{n % 17}", "label": str(n % 3)} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    d = sum(int(np.prod(block.shape)) for block in blocks)
    made = Manifest(0, "fake", 11, blocks, [Variant("0" * 64, 1, "fake")], d, "gauss8")
    request = OpenJob("j", encode_manifest(made), task, "fake", str(data), str(data), device="dev")
    return Job(request, FakeEngine())


def a_walk(job: Job, *, held: float = 0.0, **changes: object) -> WalkRequest:
    request = WalkRequest(
        job="j",
        round=3,
        part=0,
        stream_round=0,
        directions=POOL,
        walk=Walk(steps=80, step=STEP, held=held),
        eps=EPS,
        batch_rows=8,
        scope=job.layout.everything,
        digest=job.adapter.digest(),
    )
    return msgspec.structs.replace(request, **changes)


def slopes(result: WalkResult) -> NDArray[np.float64]:
    return np.frombuffer(result.differences, "<i4") / 2**20 / (2 * EPS)


def loss_of(job: Job) -> float:
    return evaluate(job, Evaluate(job="j", digest=job.adapter.digest())).loss


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_a_walk_reports_moves_the_adapter_where_it_went(tmp_path: Path, kind: str) -> None:
    job = a_job(tmp_path, BLOCKS[kind])
    before, digest = loss_of(job), job.adapter.digest()
    result = walk(job, a_walk(job))
    assert job.adapter.digest() == digest, "the adapter itself stays"
    assert (result.steps, result.share, result.dropped) == (80, 60, 0)
    assert result.weight == 80 * 8
    coefficients = np.rint(-STEP * slopes(result) * 2**24).astype(np.int64)
    moved = term(0, job.layout.everything, list(result.ranges), coefficients)
    job.adapter.apply(3, Commit(0, [moved]))
    assert loss_of(job) < before * 0.97


def test_a_walk_repeats_itself_and_another_part_goes_elsewhere(tmp_path: Path) -> None:
    job = a_job(tmp_path, BLOCKS["control"])
    first = walk(job, a_walk(job))
    assert walk(a_job(tmp_path, BLOCKS["control"]), a_walk(job)) == first
    assert walk(job, a_walk(job, part=1)).ranges != first.ranges
    assert walk(job, a_walk(job, round=4)).ranges != first.ranges


def test_sizes_are_held_and_counted_by_visit(tmp_path: Path) -> None:
    job = a_job(tmp_path, BLOCKS["control"])
    free = walk(job, a_walk(job, held=1e6))
    held = walk(job, a_walk(job, held=0.05))
    assert walk(job, a_walk(job)).visits == b""
    visits = np.frombuffer(free.visits, "<u2")
    assert visits.sum() == free.steps == 80
    assert held.visits == free.visits
    assert held.differences == free.differences
    sizes = np.frombuffer(held.sizes, "<i8") / 2**20 / (2 * EPS)
    assert (sizes <= 0.05 * visits + 1e-4).all()
    assert (np.frombuffer(free.sizes, "<i8") >= np.abs(slopes(free)) * 2 * EPS * 2**20 - 1).all()


def test_a_walk_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job(tmp_path, BLOCKS["control"])
    with pytest.raises(EngineError, match="the work is for adapter ffff"):
        walk(job, a_walk(job, digest="f" * 64))
    with pytest.raises(EngineError, match="2 weights for a pool of 128"):
        walk(job, a_walk(job, walk=Walk(steps=3, step=STEP, weights=b"\1\0\2\0")))
    ones = np.ones(8, np.int64)
    lost = Losses(np.full(8, np.inf), ones, ones > 0)

    def measure(examples: Sequence[Example]) -> Losses:
        return lost

    monkeypatch.setattr(job.model, "measure", measure)
    with pytest.raises(EngineError, match="no step of the walk had a finite loss"):
        walk(job, a_walk(job))


def test_a_walk_over_tokens_is_per_token(tmp_path: Path) -> None:
    job = a_job(tmp_path, BLOCKS["lora"], msgspec.structs.replace(TASK, loss="tokens"))
    result = walk(job, a_walk(job))
    assert result.weight >= result.steps * 8
    assert 0 < result.loss / 2**20 / result.weight < 12
