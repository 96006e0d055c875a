"""Slopes of a small softmax model: probes and closed form agree, and tuning lowers the loss."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from shared import adapter, directions
from shared.codec import encode_manifest
from shared.dataset import Row
from shared.engine.drawing import batch
from shared.engine.evaluating import evaluate
from shared.engine.examples import choice_tokens, example
from shared.engine.fake import FakeEngine, Words
from shared.engine.job import Job
from shared.engine.layout import batches
from shared.engine.model import Example
from shared.engine.probing import NAT, kept_ranges, probe
from shared.engine.protocol import Evaluate, OpenJob, Probe
from shared.errors import EngineError
from shared.messages import Block, Commit, Manifest, ProbeResult, Task, Variant
from shared.messages.jobs import Distribution

WIDTH = 32
TASK = Task("choices", "{text}\nAnswer:", {"0": " dull", "1": " fine", "2": " odd"})
ROWS = choice_tokens(TASK, Words(1024))
OUTPUT_ROWS = Block("output_rows", "output.weight", [3, WIDTH], rows=ROWS)
LORA = [Block("lora_b", "blk.0.mix.weight", [WIDTH], slot=slot, d_in=WIDTH) for slot in range(2)]
CONTROL = Block("control", "", [WIDTH], layer=1)


def a_manifest(*blocks: Block, distribution: Distribution = "signs") -> bytes:
    return encode_manifest(
        Manifest(
            epoch=0,
            architecture="fake",
            seed=11,
            blocks=list(blocks),
            variants=[Variant("0" * 64, 1, "fake")],
            d=sum(int(np.prod(block.shape)) for block in blocks),
            distribution=distribution,
        )
    )


@pytest.fixture
def a_job(tmp_path: Path) -> Callable[..., Job]:
    data = tmp_path / "rows.jsonl"
    words = ["grey flat slow", "good bright quick", "strange bent loose"]
    data.write_bytes(
        b"\n".join(
            msgspec.json.encode({"text": f"{words[n % 3]} item{n % 17}", "label": n % 3})
            for n in range(120)
        )
    )

    def build(*blocks: Block, task: Task = TASK, distribution: Distribution = "signs") -> Job:
        request = OpenJob(
            job="j",
            manifest=a_manifest(*blocks, distribution=distribution),
            task=task,
            model="fake",
            data=str(data),
            heldout=str(data),
            device="dev",
        )
        return Job(request, FakeEngine())

    return build


def a_request(job: Job, **changes: object) -> Probe:
    request = Probe(
        job="j",
        round=3,
        stream_round=3,
        how="probe",
        ranges=[(5, 4), (100, 12)],
        eps=2e-4,
        batch_rows=32,
        scope=job.layout.everything,
        digest=job.adapter.digest(),
    )
    return msgspec.structs.replace(request, **changes)


def differences(result: ProbeResult) -> NDArray[np.int32]:
    return np.frombuffer(result.differences, "<i4")


@pytest.mark.parametrize("distribution", ["signs", "gauss8"])
@pytest.mark.parametrize("loss", ["choices", "tokens"])
def test_probes_and_the_closed_form_agree(
    a_job: Callable[..., Job], loss: str, distribution: Distribution
) -> None:
    rows = msgspec.structs.replace(OUTPUT_ROWS, scale=2)
    task = msgspec.structs.replace(TASK, loss=loss)
    job = a_job(*LORA, rows, CONTROL, task=task, distribution=distribution)
    job.adapter.theta += (
        np.random.default_rng(1).integers(-(2**20), 2**20, job.layout.d).astype("i4")
    )
    probed = probe(job, a_request(job, scope=(2, 1)))
    exact = probe(job, a_request(job, scope=(2, 1), how="exact"))
    assert exact.bends == b""
    assert len(probed.bends) == len(probed.differences) == 4 * 16
    assert probed.weight == exact.weight == 32
    assert probed.loss == pytest.approx(exact.loss, abs=64)
    assert differences(probed) == pytest.approx(differences(exact), rel=1e-3, abs=60)


def test_the_closed_form_covers_rows_that_are_only_some_of_the_choices(
    a_job: Callable[..., Job],
) -> None:
    some = msgspec.structs.replace(OUTPUT_ROWS, rows=[ROWS[1], 7], shape=[2, WIDTH])
    job = a_job(some)
    probed = probe(job, a_request(job))
    exact = probe(job, a_request(job, how="exact"))
    assert differences(probed) == pytest.approx(differences(exact), rel=1e-3, abs=60)


@pytest.mark.parametrize("blocks", [[OUTPUT_ROWS], LORA, [CONTROL]])
def test_tuning_lowers_the_loss(a_job: Callable[..., Job], blocks: list[Block]) -> None:
    job = a_job(*blocks)
    before = evaluate(job, Evaluate(job="j", digest=job.adapter.digest()))
    for round in range(10):
        request = a_request(job, round=round, stream_round=round, ranges=[(0, 64)])
        result = probe(job, request)
        slopes = differences(result) / NAT / (2 * request.eps) / result.weight
        step = -slopes / len(slopes) / adapter.UNIT * 0.5
        term = adapter.term(round, request.scope, result.ranges, np.rint(step).astype(np.int64))
        job.adapter.apply(round, Commit(0, [term]))
    after = evaluate(job, Evaluate(job="j", digest=job.adapter.digest()))
    assert after.loss < 0.9 * before.loss
    assert after.correct > before.correct or OUTPUT_ROWS not in blocks


def test_the_same_work_twice_gives_the_same_integers(a_job: Callable[..., Job]) -> None:
    job = a_job(*LORA, CONTROL)
    assert probe(job, a_request(job)) == probe(job, a_request(job))


def test_parts_of_a_round_share_their_batch(a_job: Callable[..., Job]) -> None:
    job = a_job(CONTROL)
    whole = probe(job, a_request(job, ranges=[(0, 16)]))
    second = probe(job, a_request(job, ranges=[(8, 8)]))
    assert second.loss == whole.loss
    assert second.differences == whole.differences[32:]


def test_a_second_exact_round_over_the_same_rows_sends_nothing_forward(
    a_job: Callable[..., Job],
) -> None:
    job = a_job(OUTPUT_ROWS)
    probe(job, a_request(job, how="exact"))
    sent = job.model.forwarded
    job.adapter.apply(3, Commit(0, [adapter.term(3, (0, 1), [(0, 1)], np.array([2**20]))]))
    moved = probe(job, a_request(job, how="exact"))
    assert job.model.forwarded == sent
    fresh = a_job(OUTPUT_ROWS)
    fresh.restore(job.adapter.to_bytes())
    assert probe(fresh, a_request(fresh, how="exact")) == moved


def test_sites_are_measured_again_when_a_deeper_block_has_moved(a_job: Callable[..., Job]) -> None:
    job = a_job(CONTROL, OUTPUT_ROWS)
    probe(job, a_request(job, how="exact", scope=(1, 1)))
    job.adapter.theta[:WIDTH] += 2**22
    job.adapter.apply(3, None)
    moved = probe(job, a_request(job, how="exact", scope=(1, 1)))
    fresh = a_job(CONTROL, OUTPUT_ROWS)
    fresh.restore(job.adapter.to_bytes())
    assert probe(fresh, a_request(fresh, how="exact", scope=(1, 1))) == moved


def test_a_probe_that_is_not_finite_or_too_large_is_dropped_and_its_range_split(
    a_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(OUTPUT_ROWS)
    whole = probe(job, a_request(job))
    ordinary = directions.one

    def one(seed: int, round: int, index: int, *rest: object) -> NDArray[np.float32]:
        factor = {6: np.nan, 104: 1e7}.get(index, 1.0)
        return ordinary(seed, round, index, *rest) * np.float32(factor)  # type: ignore[arg-type]

    monkeypatch.setattr(directions, "one", one)
    result = probe(job, a_request(job))
    assert result.dropped == 2
    assert result.ranges == [(5, 1), (7, 2), (100, 4), (105, 7)]
    kept = [n for n in range(16) if n not in (1, 8)]
    assert differences(result).tolist() == differences(whole)[kept].tolist()
    assert len(result.bends) == len(result.differences)


def test_ranges_that_touch_stay_apart() -> None:
    kept = np.array([True, True, True, False])
    assert kept_ranges([(0, 2), (2, 2)], kept) == [(0, 2), (2, 1)]


def test_a_loss_at_theta_that_is_not_finite_is_an_error(a_job: Callable[..., Job]) -> None:
    job = a_job(OUTPUT_ROWS)
    job.layout.magnitudes[:] = np.nan
    result = probe(job, a_request(job))
    assert (result.ranges, result.dropped, result.differences) == ([], 16, b"")

    def values() -> NDArray[np.float32]:
        return np.full(job.layout.d, np.nan, np.float32)

    job.adapter.values = values
    job.adapter.apply(4, None)
    with pytest.raises(EngineError, match="not finite; the adapter has diverged"):
        probe(job, a_request(job))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"digest": "0" * 64}, "catch up first"),
        ({"how": "exact", "scope": (0, 2)}, "closed form alone; use how: probe"),
    ],
)
def test_work_that_does_not_fit_is_refused(
    a_job: Callable[..., Job], changes: dict[str, object], why: str
) -> None:
    job = a_job(CONTROL, OUTPUT_ROWS)
    with pytest.raises(EngineError, match=why):
        probe(job, a_request(job, **changes))


def test_label_words_that_begin_alike_are_refused(a_job: Callable[..., Job]) -> None:
    twins = {"0": " same start", "1": " same end"}
    with pytest.raises(EngineError, match="' same start' and ' same end' begin with the same"):
        a_job(CONTROL, task=msgspec.structs.replace(TASK, labels=twins))


def test_the_batch_is_a_function_of_seed_round_and_device() -> None:
    drawn = batch(1, 2, "a", 1000, 32)
    assert drawn == batch(1, 2, "a", 1000, 32) == sorted(set(drawn))
    assert len(drawn) == 32
    others = [batch(2, 2, "a", 1000, 32), batch(1, 3, "a", 1000, 32), batch(1, 2, "b", 1000, 32)]
    assert all(other != drawn for other in others)
    assert batch(1, 2, "a", 7, 32) == list(range(7))
    assert drawn[:6] == [56, 78, 157, 163, 213, 221]  # pinned: every version draws the same


def test_every_row_is_drawn_equally_often() -> None:
    counts = np.zeros(50)
    for round in range(400):
        counts[batch(9, round, "a", 50, 10)] += 1
    assert abs(counts - 80).max() < 5 * np.sqrt(80 * 0.8)


def test_a_long_text_loses_its_beginning_and_keeps_the_template() -> None:
    task = Task("choices", "Please say : {text} Answer :", {"0": " a", "1": " b"}, max_tokens=9)
    words = Words(1024)
    row = Row("Please say : ", " ".join(f"w{n}" for n in range(30)), " Answer :", " a", 0)
    found = example(row, task, words)
    wanted = words.tokenize("Please say : w27 w28 w29 Answer :", start=True)
    assert found.tokens.tolist() == wanted
    tiny = msgspec.structs.replace(task, max_tokens=2)
    assert example(row, tiny, words).tokens.tolist() == words.tokenize("Answer :", start=False)


def test_a_completion_ends_with_the_model_s_end_and_is_cut_last() -> None:
    task, words = Task("tokens", max_tokens=8), Words(1024)
    short = example(Row("", "one two", "", "three", -1), task, words)
    assert short.targets.tolist() == [*words.tokenize("three", start=False), words.end]
    assert short.tokens.tolist() == words.tokenize("one two three", start=True)
    long = " ".join(f"w{n}" for n in range(30))
    both = example(Row("", long, "", long, -1), task, words)
    assert len(both.tokens) == 8
    assert both.targets.tolist() == words.tokenize("w0 w1 w2 w3", start=False)
    assert both.tokens[-3:].tolist() == both.targets[:-1].tolist()


def test_batches_keep_the_order_and_every_limit() -> None:
    lengths = [(5, 1), (6, 3), (2, 2), (9, 9), (1, 1), (1, 1), (1, 1), (1, 1)]
    examples = [
        Example(np.arange(tokens, dtype=np.int32), np.arange(read, dtype=np.int32))
        for tokens, read in lengths
    ]
    packed = batches(examples, max_tokens=12, max_sequences=3, max_read=4)
    assert [len(one.tokens) for one in packed] == [11, 2, 9, 3, 1]
    assert [int(one.read.sum()) for one in packed] == [4, 2, 9, 3, 1]
    assert np.concatenate([one.owners for one in packed]).tolist() == [
        number for number, (_, read) in enumerate(lengths) for _ in range(read)
    ]
    assert packed[0].positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert packed[0].read.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1]
    assert packed[0].sequences.tolist() == [0] * 5 + [1] * 6
