"""Data that grows under a job: a round keeps its rows, the next one takes what has come."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from shared.codec import encode_manifest
from shared.engine.evaluating import evaluate
from shared.engine.fake import FakeEngine
from shared.engine.job import Job
from shared.engine.probing import probe
from shared.engine.protocol import Evaluate, OpenJob, Probe
from shared.errors import EngineError
from shared.messages import Block, Manifest, ProbeResult, Task, Variant
from shared.messages.jobs import How

TASK = Task("choices", "{text} is", {"up": "alpha", "down": "beta"}, max_tokens=64)
OUTPUT_ROWS, CONTROL = (
    Block("output_rows", "output.weight", [2, 32], rows=[5, 9]),
    Block("control", "l_out-0", [32], layer=0),
)


def a_job(block: Block, data: Path) -> Job:
    d = int(np.prod(block.shape))
    manifest = Manifest(0, "fake", 7, [block], [Variant("0" * 64, 1, "fake")], d)
    request = OpenJob(
        "j", encode_manifest(manifest), TASK, "fake", str(data), str(data), device="dev"
    )
    return Job(request, FakeEngine())


def measured(job: Job, round: int, how: How, *, batch_rows: int = 4096) -> ProbeResult:
    digest = job.adapter.digest()
    request = Probe("j", round, round, how, [(0, 4)], 0.01, batch_rows, (0, 1), digest)
    return probe(job, request)


def write(path: Path, numbers: Iterable[int]) -> None:
    rows = [{"text": f"word{n} more", "label": ["up", "down"][n % 2]} for n in numbers]
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("how", ["exact", "probe"])
def test_all_parts_of_a_round_measure_the_rows_of_its_first(tmp_path: Path, how: How) -> None:
    job = a_job(OUTPUT_ROWS if how == "exact" else CONTROL, tmp_path)
    with pytest.raises(EngineError, match="no usable row yet in"):
        measured(job, 1, how)
    write(tmp_path / "b.jsonl", range(5))
    first = measured(job, 1, how)
    write(tmp_path / "a.jsonl", range(5, 9))
    assert job.look().rows == 9
    second = measured(job, 1, how)
    assert (second.loss, second.weight) == (first.loss, first.weight)
    assert first.weight == 5
    assert measured(job, 2, how).weight == 9
    (tmp_path / "b.jsonl").unlink()
    assert measured(job, 2, how).weight == 9
    assert measured(job, 3, how).weight == 4
    assert evaluate(job, Evaluate("j", job.adapter.digest())).examples == 4


def test_a_drawn_batch_is_the_same_in_all_parts_of_a_round(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", range(50))
    job = a_job(CONTROL, tmp_path)
    first = measured(job, 1, "probe", batch_rows=8)
    write(tmp_path / "a.jsonl", range(50, 90))
    assert measured(job, 1, "probe", batch_rows=8).loss == first.loss
    reopened = a_job(CONTROL, tmp_path)
    later = measured(job, 2, "probe", batch_rows=8)
    assert later == measured(reopened, 2, "probe", batch_rows=8), "of seed, round, device and rows"


def test_only_what_is_new_is_sent_through_the_model(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    write(path, range(40))
    job = a_job(OUTPUT_ROWS, tmp_path)
    measured(job, 1, "exact")
    before = job.model.forwarded
    write(tmp_path / "a.jsonl", range(40, 42))
    measured(job, 2, "exact")
    per_row = before // 40
    assert job.model.forwarded - before == 2 * per_row
    path.rename(tmp_path / "z.jsonl")
    measured(job, 3, "exact")
    write(tmp_path / "again.jsonl", range(40))
    assert measured(job, 4, "exact").weight == 82
    assert job.model.forwarded - before == 2 * per_row, "kept by what a row says"
