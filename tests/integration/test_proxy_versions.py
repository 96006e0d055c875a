"""Versions in the proxy: followed, swapped under load, rolled back, refused; over a real broker."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared import blobs, nats_bus
from shared.dataset import Row, split_template
from shared.engine import last_layer
from shared.engine.examples import choice_tokens, example
from shared.engine.llama import LlamaEngine
from shared.engine.model import Adaptation, Example
from shared.messages import Block, Manifest, Task
from tests.support import tiny_gguf
from tests.support.broker import BrokerProcess
from tests.support.near_ties import ALONE, Alone, alone, tokens
from tests.support.publishing import Publisher, a_manifest
from tests.support.serving import Proxy, a_proxy

LORA = [
    Block("lora_b", f"blk.{layer}.{name}.weight", [rows], slot=slot, d_in=64)
    for layer in (0, 1)
    for name, rows in (("attn_q", 64), ("attn_v", 32))
    for slot in (0, 1)
]
CONTROL = [Block("control", "blk.1", [64], layer=1)]
ROWS = [Block("output_rows", "output.weight", [4, 64], rows=[70, 71, 72, 80])]
KINDS = {"lora": LORA, "control": CONTROL, "rows": ROWS, "all": [*LORA, *CONTROL, *ROWS]}
PROMPT = "the inner ear"


def values_for(manifest: Manifest, seed: int, scale: float = 0.5) -> NDArray[np.float64]:
    return scale * np.random.default_rng(seed).standard_normal(manifest.d)


@dataclass
class Fleet:
    """A log to publish to, and the model that its jobs are over."""

    broker: BrokerProcess
    publisher: Publisher
    model: Path

    def proxy(self, folder: Path, *more: str) -> Any:
        return a_proxy(folder, "--servers", self.broker.url, *more)


@asynccontextmanager
async def a_fleet(broker: BrokerProcess, model: Path) -> AsyncGenerator[Fleet, None]:
    link = await nats_bus.connect([broker.url], name="publisher")
    try:
        yield Fleet(broker, await Publisher.on(link), model)
    finally:
        await link.close()


@pytest.fixture
async def fleet(broker: BrokerProcess, tmp_path: Path) -> AsyncGenerator[Fleet, None]:
    sure = np.random.default_rng(2).standard_normal((320, 64), np.float32)  # few near ties
    plus = {"output.weight": sure}
    model = tiny_gguf.write(tmp_path / "tiny.gguf", quantized=False, plus=plus)
    async with a_fleet(broker, model) as fleet:
        yield fleet


async def texts(proxy: Proxy, model: str = "") -> str:
    answer = await proxy.complete(PROMPT, **({"model": model} if model else {}))
    return answer["choices"][0]["text"]


async def test_the_newest_version_is_fetched_and_served_with_its_model(
    fleet: Fleet, tmp_path: Path
) -> None:
    manifest = a_manifest(fleet.model, "llama", LORA)
    await fleet.publisher.open("job", manifest)
    for round in (1, 2):
        await fleet.publisher.publish("job", round, values_for(manifest, round))
    async with fleet.proxy(tmp_path / "proxy") as proxy:
        await asyncio.sleep(0.5)
        status, answer = await proxy.get("/health")
        assert status == 503
        assert "tiny.gguf" in answer["reason"]  # the store does not have it yet
        await blobs.put(fleet.publisher.link, fleet.model)
        await proxy.serves("job@2")
        assert {path.name for path in (tmp_path / "proxy/state/versions").iterdir()} == {
            "job@2.version"
        }, "what was overtaken before it could serve is not fetched"
        adapter = await fleet.publisher.publish("job", 3, values_for(manifest, 3))
        await proxy.serves("job@3")
        answer = await proxy.complete(PROMPT)
        assert answer["model"] == "job@3"
        assert answer["system_fingerprint"] == f"job@3-{adapter.digest()[:12]}"
        base = await proxy.complete(PROMPT, model="base")
        digest = blobs.reference(fleet.model).digest
        assert base["system_fingerprint"] == f"base-{digest[:12]}"
        said = {await texts(proxy, model) for model in ("job@2", "job", "base")}
        assert len(said) == 3
        assert await texts(proxy, "job@3") == await texts(proxy)
        names = [model["id"] for model in (await proxy.get("/v1/models"))[1]["data"]]
        assert names == ["job", "job@3", "job@2", "base"]
        assert await proxy.metric("seedwire_proxy_swaps_total") == 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
async def test_the_numbers_are_those_that_the_devices_tune_by(
    broker: BrokerProcess, tmp_path: Path, kind: str, tied: bool
) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf", tied=tied, quantized=False)
    manifest = a_manifest(model, "llama", KINDS[kind])
    values = values_for(manifest, 5, scale=0.2)
    task = Task(
        loss="choices",
        template="Of {text}\nit is ",
        labels={"one": "g", "two": "h", "three": "q", "four": "Z"},
        max_tokens=48,
    )
    text = "a long story about the inner ear and what is within it"
    shown = [[7, 8, 9, 70, 71, 80, 72, 12, 70], [100, 101, 102, 72, 80]]
    async with a_fleet(broker, model) as fleet:
        await fleet.publisher.open("job", manifest, task)
        adapter = await fleet.publisher.publish("job", 1, values)
        async with fleet.proxy(tmp_path / "proxy", "--model", str(model)) as proxy:
            await proxy.serves("job@1")
            options = {"max_tokens": 0, "echo": True, "logprobs": 1}
            told = await proxy.complete(shown, **options)
            base = await proxy.complete(shown, model="base", **options)
            _, classified = await proxy.post("/v1/classify", {"text": text})
            _, untuned = await proxy.post("/v1/classify", {"text": text, "model": "base"})
    losses = [-sum(choice["logprobs"]["token_logprobs"][1:]) for choice in told["choices"]]
    plain = [-sum(choice["logprobs"]["token_logprobs"][1:]) for choice in base["choices"]]
    assert np.abs(np.array(losses) - plain).min() > 0.01

    blocks, offsets = manifest.blocks, adapter.layout.offsets
    adaptation = Adaptation("llama", manifest.seed, manifest.epoch, blocks, offsets)
    engine = LlamaEngine().open(str(model), adaptation, 1, 64)
    numbers = adapter.values()
    examples = [Example(np.array(t[:-1], np.int32), np.array(t[1:], np.int32)) for t in shown]
    # The engine's attention is computed by `flash`, which rounds otherwise; the proxy's is not.
    assert losses == pytest.approx(measured(engine, adaptation, numbers, examples), rel=3e-4)

    choices = choice_tokens(task, engine)
    engine.choose_among(choices)
    head, tail = split_template(task.template)
    asked = [
        example(Row(head, text, tail, word, index), task, engine)
        for index, word in enumerate(task.labels.values())
    ]
    assert len(asked[0].tokens) == 48  # the text was shortened as devices shorten it
    shares = np.exp(-measured(engine, adaptation, numbers, asked))
    assert list(classified["probabilities"]) == list(task.labels)
    assert list(classified["probabilities"].values()) == pytest.approx(shares, abs=1e-3)
    assert classified["label"] == list(task.labels)[int(shares.argmax())]
    assert classified["model"] == "job@1"
    shares = np.exp(-measured(engine, adaptation, np.zeros_like(numbers), asked))
    assert list(untuned["probabilities"].values()) == pytest.approx(shares, abs=1e-3)
    assert untuned["model"] == "base"
    engine.close()


def measured(
    engine: Any, adaptation: Adaptation, numbers: NDArray[np.float32], examples: list[Example]
) -> NDArray[np.float64]:
    """The examples' losses by the engine that devices run: in closed form where there are rows."""
    rows = [n for n, block in enumerate(adaptation.blocks) if block.kind == "output_rows"]
    if not rows:
        engine.stand(numbers)
        return engine.measure(examples).loss
    deeper = numbers.copy()
    for n in rows:
        deeper[adaptation.offsets[n] : adaptation.offsets[n + 1]] = 0.0
    engine.stand(deeper)
    deltas = np.concatenate([adaptation.part(n, numbers) for n in rows]).astype(np.float64)
    return last_layer.losses(engine.sites(examples), deltas).loss


async def test_swaps_under_load_drop_and_mix_nothing(fleet: Fleet, tmp_path: Path) -> None:
    manifest = a_manifest(fleet.model, "llama", LORA)
    await fleet.publisher.open("job", manifest)
    await fleet.publisher.publish("job", 1, values_for(manifest, 1))
    prompts = [f"number {number} of the inner" for number in range(12)]
    measures: dict[tuple[str, str], Alone] = {}
    length: dict[str, object] = {"max_tokens": 16, "logit_bias": {"0": -100}}
    told: list[tuple[str, str, list[str]]] = []
    done = asyncio.Event()

    async def ask(proxy: Proxy) -> None:
        number = 0
        while not done.is_set():
            prompt = prompts[number % len(prompts)]
            answer = await proxy.complete(prompt, logprobs=0, **length)
            told.append((answer["model"], prompt, tokens(answer["choices"][0])))
            number += 1

    async with fleet.proxy(tmp_path / "proxy", "--model", str(fleet.model)) as proxy:
        await proxy.serves("job@1")
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(ask(proxy))
            for round in (2, 3, 4):
                await asyncio.sleep(0.4)
                await fleet.publisher.publish("job", round, values_for(manifest, round))
                await proxy.serves(f"job@{round}")
            await asyncio.sleep(0.4)
            done.set()
        await proxy.until("seedwire_proxy_versions_loaded", 1, 1)
        for version in ("job@1", "job@2", "job@3", "job@4"):
            for prompt in prompts:
                answer = await proxy.complete(prompt, model=version, logprobs=ALONE, **length)
                measures[version, prompt] = alone(answer["choices"][0])
    versions = {version for version, _ in measures}
    assert {version for version, _, _ in told} == versions
    assert [row for row in told if not measures[row[:2]].explains(row[2])] == []
    for version, prompt, said in told:  # and it would be seen if one were another's
        others = [measures[other, prompt] for other in versions - {version}]
        assert not any(other.tokens == said for other in others)


async def test_an_operator_rolls_back_and_follows_again(fleet: Fleet, tmp_path: Path) -> None:
    manifest = a_manifest(fleet.model, "llama", LORA)
    await fleet.publisher.open("job", manifest)
    options = ("--model", str(fleet.model), "--keep-versions", "2")
    async with fleet.proxy(tmp_path / "proxy", *options) as proxy:
        for round in (1, 2, 3):
            await fleet.publisher.publish("job", round, values_for(manifest, round))
            await proxy.serves(f"job@{round}")
        status, answer = await proxy.post("/v1/seedwire/rollback")
        assert (status, answer["serving"], answer["pinned"]) == (200, "job@2", "job@2")
        await fleet.publisher.publish("job", 4, values_for(manifest, 4))
        await asyncio.sleep(0.3)
        assert (await proxy.get("/health"))[1]["model"] == "job@2"
        status, answer = await proxy.post("/v1/seedwire/rollback", {"round": 1})
        assert status == 404
        assert "no version of round 1 is kept" in answer["error"]["message"]
    async with fleet.proxy(tmp_path / "proxy", *options) as proxy:
        await proxy.serves("job@2")  # the operator's word outlives a restart
        status, answer = await proxy.post("/v1/seedwire/follow")
        assert (status, answer["serving"], answer["pinned"]) == (200, "job@4", None)


async def test_a_version_that_is_not_what_was_published_is_refused_and_said(
    fleet: Fleet, tmp_path: Path
) -> None:
    manifest = a_manifest(fleet.model, "llama", LORA)
    await fleet.publisher.open("job", manifest)
    await fleet.publisher.publish("job", 1, values_for(manifest, 1))
    async with fleet.proxy(tmp_path / "proxy", "--model", str(fleet.model)) as proxy:
        await proxy.serves("job@1")
        before = await texts(proxy)
        await fleet.publisher.publish("job", 2, values_for(manifest, 2), digest="ab" * 32)
        await proxy.until("seedwire_proxy_versions_refused_total", 1)
        (why,) = (await proxy.get("/v1/seedwire/versions"))[1]["refused"].values()
        assert "published was abababababab" in why
        assert await texts(proxy, "job@1") == before
        status, answer = await proxy.post("/v1/completions", {"prompt": "a", "model": "job@2"})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        await fleet.publisher.publish("job", 4, values_for(manifest, 4))
        await proxy.serves("job@4")


async def test_after_a_restart_without_a_broker_the_last_version_serves_from_disk(
    fleet: Fleet, tmp_path: Path
) -> None:
    manifest = a_manifest(fleet.model, "llama", LORA)
    await blobs.put(fleet.publisher.link, fleet.model)
    await fleet.publisher.open("job", manifest)
    await fleet.publisher.publish("job", 1, values_for(manifest, 1))
    async with fleet.proxy(tmp_path / "proxy") as proxy:
        await proxy.serves("job@1")
        before = await texts(proxy)
    fleet.model.unlink()
    async with a_proxy(tmp_path / "proxy") as proxy:
        await proxy.serves("job@1")
        assert await texts(proxy) == before


async def test_a_job_that_was_named_is_served_whatever_others_publish(
    fleet: Fleet, tmp_path: Path
) -> None:
    manifest = a_manifest(fleet.model, "llama", CONTROL)
    for job in ("mine", "other"):
        await fleet.publisher.open(job, manifest)
        await fleet.publisher.publish(job, 1, values_for(manifest, len(job)))
    options = ("--model", str(fleet.model), "--job", "mine")
    async with fleet.proxy(tmp_path / "proxy", *options) as proxy:
        await proxy.serves("mine@1")
        assert (await proxy.complete(PROMPT, model="other"))["model"] == "other@1"
        await fleet.publisher.publish("other", 2, values_for(manifest, 9))
        await asyncio.sleep(0.3)
        assert (await proxy.get("/health"))[1]["model"] == "mine@1"


async def test_swaps_that_come_faster_than_answers_end_are_skipped_not_stacked(
    fleet: Fleet, tmp_path: Path
) -> None:
    manifest = a_manifest(fleet.model, "llama", CONTROL)
    await fleet.publisher.open("job", manifest)
    await fleet.publisher.publish("job", 1, values_for(manifest, 1))
    async with fleet.proxy(tmp_path / "proxy", "--model", str(fleet.model)) as proxy:
        await proxy.serves("job@1")
        body = {"prompt": "a", "max_tokens": 900, "logit_bias": {"0": -100}}
        answers: list[asyncio.Task[tuple[int, Any]]] = []
        for round in range(2, 12):
            answers += [asyncio.create_task(proxy.post("/v1/completions", body))]
            await fleet.publisher.publish("job", round, values_for(manifest, round))
            await asyncio.sleep(0.05)
            assert await proxy.metric("seedwire_proxy_versions_loaded") <= 3
        await proxy.serves("job@11")
        for status, answer in await asyncio.gather(*answers):
            assert status == 200
            assert answer["usage"]["completion_tokens"] == 900
