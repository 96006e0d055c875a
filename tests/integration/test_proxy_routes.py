"""Which mode serves by default: measured on validation rows, through the proxy's own passes."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from services.proxy_inference.generation import Generation, Weights
from services.proxy_inference.shelf import ModelFile
from services.proxy_inference.speaking import Room
from services.proxy_inference.validating import Scored
from services.proxy_inference.worker import Ticket, Worker
from shared import nats_bus
from shared.adapter import UNIT, Adapter
from shared.codec import encode_manifest
from shared.engine.llama import LlamaEngine
from shared.engine.model import Adaptation, Example
from shared.messages import Block, Manifest, Task
from tests.integration.test_proxy_console import seedwire
from tests.support import tiny_gguf
from tests.support.broker import BrokerProcess
from tests.support.publishing import Publisher, a_manifest
from tests.support.serving import Proxy, a_proxy
from tests.support.waiting import wait_until

BLOCKS = [
    Block("lora_b", f"blk.{layer}.{name}.weight", [64], slot=slot, d_in=64)
    for layer in (0, 1)
    for name in ("attn_q", "attn_output")
    for slot in (0, 1)
]
PROMPT = Block("prompt", "token_embd.weight", [4, 64], rows=[70, 71, 80, 90], unit=1.0)
SCALE = 0.5
"""Of the adapter: so much that the modes answer many rows differently."""
LABELS = {"one": "g", "two": "h", "three": "q", "four": "Z"}
TASK = Task(loss="choices", template="of {text}", labels=LABELS, max_tokens=48)
MODES: dict[str, dict[str, object]] = {
    "small": {"proxy_mode": "small"},
    "large": {"proxy_mode": "large"},
    "ensemble 0.5": {"proxy_mode": "ensemble", "proxy_alpha": 0.5},
    "ensemble 1": {"proxy_mode": "ensemble", "proxy_alpha": 1.0},
    "ensemble 1.5": {"proxy_mode": "ensemble", "proxy_alpha": 1.5},
}
WORDS = ["the", "ear", "begins", "a", "story", "bread", "and", "water", "old", "house", "sea"]
TEXTS = [f"{one} {other}" for one in WORDS for other in WORDS[3:]]


def _models(folder: Path) -> tuple[str, ...]:
    """A proxy's arguments: a small and a large model with the same tokens and nothing else."""
    small = tiny_gguf.write(folder / "small.gguf", quantized=False, seed=1)
    large = tiny_gguf.write(folder / "large.gguf", quantized=False, seed=2)
    return "--model", str(small), "--large", str(large)


@asynccontextmanager
async def a_job(
    broker: BrokerProcess, folder: Path
) -> AsyncGenerator[tuple[Publisher, Manifest], None]:
    """A job with one version of the small model."""
    link = await nats_bus.connect([broker.url], name="publisher")
    try:
        publisher = await Publisher.on(link)
        manifest = a_manifest(folder / "small.gguf", "llama", BLOCKS)
        await publisher.open("job", manifest, TASK)
        await publisher.publish("job", 1, _values(manifest, 1))
        yield publisher, manifest
    finally:
        await link.close()


def _values(manifest: Manifest, seed: int) -> NDArray[np.float64]:
    return SCALE * np.random.default_rng(seed).standard_normal(manifest.d)


async def _answers(proxy: Proxy, body: dict[str, object]) -> list[str]:
    """Each text's label."""
    found: list[str] = []
    for text in TEXTS:
        status, answer = await proxy.post("/v1/classify", {"text": text} | body)
        assert status == 200, answer
        found.append(answer["label"])
    return found


def _rows(path: Path, labels: list[str]) -> Path:
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


async def _measured(proxy: Proxy, version: str) -> Any:
    """What /v1/seedwire/routes says when `version` has been measured."""
    told: dict[str, Any] = {}

    async def there() -> bool:
        told["found"] = (await proxy.get("/v1/seedwire/routes"))[1]
        return version in told["found"]["versions"]

    await wait_until(there, timeout_s=60, what=f"routes of {version}")
    return told["found"]


async def test_the_mode_that_answers_the_validation_rows_best_serves_by_default(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    more = ("--servers", broker.url, *_models(tmp_path))
    async with a_job(broker, tmp_path):
        async with a_proxy(tmp_path / "plain", *more) as proxy:
            await proxy.serves("job@1")
            answers = {name: await _answers(proxy, body) for name, body in MODES.items()}
        for truth in ("small", "large", "ensemble 1.5"):
            share = {
                name: float(np.mean([a == b for a, b in zip(found, answers[truth], strict=True)]))
                for name, found in answers.items()
            }
            assert sorted(share.values())[-2] < 0.9, "the modes differ enough to be told apart"
            rows = _rows(tmp_path / f"{truth}.jsonl", answers[truth])
            folder = tmp_path / truth.replace(" ", "-")
            async with a_proxy(folder, *more, "--validation", str(rows)) as proxy:
                told = await _measured(proxy, "job@1")
                mode, _, alpha = truth.partition(" ")
                assert told["mode"] == mode
                assert told["alpha"] == (float(alpha) if alpha else None)
                table = told["versions"]["job@1"]
                assert table["rows"] == len(TEXTS)
                assert table["judged_by"] == "accuracy"
                named = {_name(line): line["accuracy"] for line in table["routes"]}
                assert named == pytest.approx(share)
                assert await _answers(proxy, {}) == answers[truth]
                answer = await proxy.complete("the inner ear")
                assert answer["proxy"]["mode"] == mode
                _, versions = await proxy.get("/v1/seedwire/versions")
                assert versions["versions"][0]["routes"] == table
                assert await proxy.metric("seedwire_proxy_route_best") == 1
                accuracies = await proxy.metric("seedwire_proxy_route_accuracy")
                assert accuracies == pytest.approx(sum(share.values()))


def _name(line: dict[str, Any]) -> str:
    return line["mode"] if line["alpha"] is None else f"{line['mode']} {line['alpha']:g}"


async def test_what_the_operator_or_a_request_asks_for_comes_before_what_was_measured(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    more = ("--servers", broker.url, *_models(tmp_path))
    rows = _rows(tmp_path / "rows.jsonl", [list(LABELS)[n % 4] for n in range(len(TEXTS))])
    more += ("--validation", str(rows), "--mode", "large")
    async with (
        a_job(broker, tmp_path) as (publisher, manifest),
        a_proxy(tmp_path / "proxy", *more) as proxy,
    ):
        told = await _measured(proxy, "job@1")
        assert told["mode"] == "large"
        assert told["set_by_operator"]
        assert (await proxy.complete("a"))["proxy"]["mode"] == "large"
        asked = await proxy.complete("a", proxy_mode="ensemble", proxy_alpha=2.0)
        assert asked["proxy"] == {"mode": "ensemble", "alpha": 2.0, "exact": True}
        await publisher.publish("job", 2, _values(manifest, 2))
        told = await _measured(proxy, "job@2")
        assert set(told["versions"]) == {"job@1", "job@2"}, "each version is measured"
        code, text = await seedwire(proxy, "serve", "routes")
        assert code == 0, text
        assert sum("job@1" in line and "ensemble" in line for line in text.splitlines()) == 3
        assert sum("best" in line for line in text.splitlines()) == 2
        assert "job@2: large answers, by --mode" in text


async def test_rows_that_a_job_cannot_use_are_told_and_stop_nothing(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "of the ear", "label": "unheard of"}\n', encoding="utf-8")
    more = ("--servers", broker.url, *_models(tmp_path))
    async with a_job(broker, tmp_path):
        async with a_proxy(tmp_path / "proxy", *more, "--validation", str(rows)) as proxy:
            await proxy.serves("job@1")

            async def told() -> bool:
                _, answer = await proxy.get("/v1/seedwire/routes")
                return "label is not one of this job's" in (answer["problem"] or "")

            await wait_until(told, timeout_s=15, what="the problem with the rows")
            assert (await proxy.complete("a"))["proxy"]["mode"] == "ensemble"
        with pytest.raises(AssertionError, match=r"--validation .*nowhere"):
            async with a_proxy(tmp_path / "none", *more, "--validation", str(tmp_path / "nowhere")):
                pass


@pytest.mark.parametrize("choices", [None, [5, 9, 40]])
@pytest.mark.parametrize("blocks", [BLOCKS, [PROMPT]])
async def test_a_row_scored_by_the_proxy_has_the_loss_that_a_device_measures(
    tmp_path: Path, choices: list[int] | None, blocks: list[Block]
) -> None:
    """Rows too long for one pass among them, several at once, a soft prompt before the answer."""
    path = tiny_gguf.write(tmp_path / "m.gguf", quantized=False)
    manifest = a_manifest(path, "llama", blocks)
    adapter = Adapter(encode_manifest(manifest))
    adapter.theta = np.round(_values(manifest, 3) / UNIT).astype(np.int32)
    offsets = adapter.layout.offsets
    random = np.random.default_rng(4)
    rows: list[Example] = []
    for asked, answers in ((3, 1), (40, 30), (700, 250)):
        count = 1 if choices else answers
        tokens = random.integers(5, 200, asked + count - 1)
        targets = random.integers(0, 3 if choices else 200, count)
        rows.append(Example(tokens.astype(np.int32), targets.astype(np.int32)))
    among = np.array(choices, np.int64) if choices else None
    adaptation = Adaptation("llama", manifest.seed, manifest.epoch, blocks, offsets)
    model = LlamaEngine().open(str(path), adaptation, 1, 1024)
    model.stand(adapter.values())
    model.choose_among(choices or [])
    wanted = [model.measure([row]) for row in rows]
    model.close()
    weights = Weights(ModelFile(path, "a" * 64))
    generation = Generation(weights, adapter, Room(cells=1200, lanes=4, threads=1))
    worker = Worker()
    worker.attach(generation)
    runs = [Scored(row, among, generation.prompt, 0.0) for row in rows]
    pieces: asyncio.Queue[Any] = asyncio.Queue()
    for number, run in enumerate(runs):
        worker.submit(generation, Ticket(run, number, pieces))
    for _ in runs:
        await pieces.get()
    worker.stop()
    await worker.ended
    generation.close()
    weights.close()
    for run, losses in zip(runs, wanted, strict=True):
        assert run.loss == pytest.approx(float(losses.loss[0]), rel=1e-3, abs=5e-3)
        assert run.right == bool(losses.right[0])
