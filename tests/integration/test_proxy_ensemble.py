"""A large model steered by a small one, through the real llama.cpp: what it says, and how fast."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared import nats_bus
from shared.messages import Block, Manifest, Task
from tests.support import tiny_gguf
from tests.support.broker import BrokerProcess
from tests.support.near_ties import ALONE, alone, tokens
from tests.support.publishing import Publisher, a_manifest
from tests.support.serving import Proxy, a_proxy
from tests.support.tiny_gguf import Shape

LORA = [
    Block("lora_b", f"blk.{layer}.{name}.weight", [rows], slot=slot, d_in=64)
    for layer in (0, 1)
    for name, rows in (("attn_q", 64), ("attn_v", 32))
    for slot in (0, 1)
]
PROMPTS = ["the inner ear", "a story of", "in the beginning there was", "it is the end"]
LABELS = {"one": "g", "two": "h", "three": "q", "four": "Z"}
TASK = Task(loss="choices", template="Of {text}\nit is ", labels=LABELS, max_tokens=48)
NOISE = 6.0
"""Of P = L + alpha (M+ - M-) against one model's, at alpha 2.5."""
ENDLESS = {"0": -100}
"""The bias that lets no answer end before its length."""


def _models(folder: Path) -> tuple[Path, Path]:
    """A small model, and a larger one that says much the same."""
    random = np.random.default_rng(2)
    sure = np.float32(0.6) * random.standard_normal((320, 64), np.float32)
    small = tiny_gguf.write(folder / "small.gguf", quantized=False, plus={"output.weight": sure})
    other = (sure + 0.03 * random.standard_normal(sure.shape)).astype(np.float32)
    large = tiny_gguf.write(folder / "large.gguf", quantized=False, plus={"output.weight": other})
    return small, large


@asynccontextmanager
async def a_job(
    broker: BrokerProcess, small: Path, blocks: list[Block] = LORA, scale: float = 0.3
) -> AsyncGenerator[tuple[Publisher, Manifest], None]:
    """A job with one version; what its adapter moves is small."""
    link = await nats_bus.connect([broker.url], name="publisher")
    try:
        publisher = await Publisher.on(link)
        manifest = a_manifest(small, "llama", blocks)
        await publisher.open("job", manifest, TASK)
        await publisher.publish("job", 1, _values(manifest, 1, scale))
        yield publisher, manifest
    finally:
        await link.close()


def _values(manifest: Manifest, seed: int, scale: float = 0.3) -> NDArray[np.float64]:
    return scale * np.random.default_rng(seed).standard_normal(manifest.d)


@asynccontextmanager
async def a_pair(broker: BrokerProcess, folder: Path, *more: str) -> AsyncGenerator[Proxy, None]:
    small, large = _models(folder)
    async with a_job(broker, small):
        arguments = ("--servers", broker.url, "--model", str(small), "--large", str(large))
        async with a_proxy(folder / "proxy", *arguments, *more) as proxy:
            await proxy.serves("job@1")
            yield proxy


async def _taken(proxy: Proxy) -> float:
    return await proxy.metric("seedwire_proxy_drafts_total")


async def test_drafts_change_no_greedy_answer(broker: BrokerProcess, tmp_path: Path) -> None:
    body = {"max_tokens": 40, "logit_bias": ENDLESS, "proxy_mode": "ensemble"}
    small, large = _models(tmp_path)
    told: dict[str, list[Any]] = {}
    async with a_job(broker, small):
        for speculate in ("false", "true"):
            more = ("--servers", broker.url, "--large", str(large), "--speculate", speculate)
            async with a_proxy(tmp_path / speculate, *more, "--model", str(small)) as proxy:
                await proxy.serves("job@1")
                alone_first = [await proxy.complete(PROMPTS[0], **body, logprobs=ALONE)]
                together = [proxy.complete(one, **body, logprobs=ALONE) for one in PROMPTS]
                told[speculate] = alone_first + await asyncio.gather(*together)
                if speculate == "true":
                    assert await _taken(proxy) > 20
                    written = await proxy.metric("seedwire_proxy_ensemble_tokens_total")
                    passes = await proxy.metric("seedwire_proxy_ensemble_passes_total")
                    assert passes < 0.9 * written, "several tokens came of a pass"
                    assert await proxy.metric("seedwire_proxy_ensemble_kl_large_nats_total") > 0
                else:
                    assert await proxy.metric("seedwire_proxy_drafts_total") == 0
    for plain, fast in zip(told["false"], told["true"], strict=True):
        assert alone(plain["choices"][0]).explains(tokens(fast["choices"][0]), times=NOISE)
        assert fast["proxy"] == {"mode": "ensemble", "alpha": 1.0, "exact": True}


async def test_drafts_change_no_distribution(broker: BrokerProcess, tmp_path: Path) -> None:
    """Of the second and third token together, over many answers."""
    found: dict[str, Counter[str]] = {}
    body: dict[str, Any] = {"prompt": PROMPTS[0], "max_tokens": 6, "top_k": 4, "logprobs": 0}
    body |= {"temperature": 1.3, "logit_bias": ENDLESS, "proxy_mode": "ensemble", "n": 16}
    small, large = _models(tmp_path)
    async with a_job(broker, small):
        for speculate in ("false", "true"):
            more = ("--servers", broker.url, "--large", str(large), "--speculate", speculate)
            more += ("--sequences", "16", "--queue", "1000")
            async with a_proxy(tmp_path / speculate, *more, "--model", str(small)) as proxy:
                await proxy.serves("job@1")
                answers = [await proxy.post("/v1/completions", body) for _ in range(40)]
                choices = [one for _, answer in answers for one in answer["choices"]]
                found[speculate] = Counter("".join(tokens(one)[1:3]) for one in choices)
                drafts = await proxy.metric("seedwire_proxy_drafts_total")
                assert (drafts > 100) == (speculate == "true")
    plain, fast = found["false"], found["true"]
    total = sum(plain.values())
    assert total == sum(fast.values()) == 640
    frequent = [pair for pair, count in plain.items() if count >= 20]
    assert len(frequent) >= 3
    for pair in frequent:
        p = (plain[pair] + fast[pair]) / (2 * total)
        deviation = (2 * p * (1 - p) / total) ** 0.5
        assert abs(plain[pair] - fast[pair]) / total < 4 * deviation, pair


async def test_an_answer_that_names_a_seed_repeats(broker: BrokerProcess, tmp_path: Path) -> None:
    """It is written without drafts: how much is drafted hangs on what it costs at the time."""
    body = {"prompt": PROMPTS[0], "max_tokens": 30, "temperature": 1.0, "logit_bias": ENDLESS}
    async with a_pair(broker, tmp_path) as proxy:
        told = [await proxy.post("/v1/completions", body | {"seed": 5}) for _ in range(8)]
        assert len({answer["choices"][0]["text"] for _, answer in told}) == 1
        assert await _taken(proxy) == 0
        others = [await proxy.post("/v1/completions", body) for _ in range(8)]
        assert len({answer["choices"][0]["text"] for _, answer in others}) > 1
        assert await _taken(proxy) > 0


async def odds(proxy: Proxy, model: str = "", **more: object) -> NDArray[np.float64]:
    """Log-odds of the labels against the first, of one text."""
    body = {"text": "a long story of the ear"} | more | ({"model": model} if model else {})
    status, answer = await proxy.post("/v1/classify", body)
    assert status == 200, answer
    logs = np.log([answer["probabilities"][label] for label in LABELS])
    return logs - logs[0]


async def test_the_ensemble_is_the_large_model_plus_what_tuning_added(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    """Log-odds of the labels add up: P = L + alpha (M+ - M-)."""
    async with a_pair(broker, tmp_path) as proxy:
        large = await odds(proxy, proxy_mode="large")
        tuned = await odds(proxy, proxy_mode="small")
        base = await odds(proxy, "base")
        assert np.abs(tuned - base).max() > 0.05
        for alpha in (0.5, 1.0, 3.0):
            steered = await odds(proxy, proxy_mode="ensemble", proxy_alpha=alpha)
            np.testing.assert_allclose(steered, large + alpha * (tuned - base), atol=2e-3)
        np.testing.assert_allclose(await odds(proxy, proxy_alpha=0.0), large, atol=2e-3)
        np.testing.assert_allclose(await odds(proxy), large + tuned - base, atol=2e-3)


async def test_a_distilled_version_steers_by_what_the_fleet_added_since(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    """Its epoch's anchor is in M- as well; the proxy keeps it, for a start without a broker."""
    small, large = _models(tmp_path)
    more = ("--model", str(small), "--large", str(large))
    async with a_job(broker, small) as (publisher, manifest):
        anchor, tuned = _values(manifest, 2), _values(manifest, 3)
        await publisher.open("anchor", manifest, TASK)
        await publisher.publish("anchor", 1, anchor)
        await publisher.open("distilled", manifest, TASK, anchor)
        await publisher.publish("distilled", 1, tuned)
        async with a_proxy(tmp_path / "proxy", "--servers", broker.url, *more) as proxy:
            await proxy.serves("distilled@1")
            wanted = await odds(proxy, proxy_mode="large")
            wanted += await odds(proxy, proxy_mode="small")
            wanted -= await odds(proxy, "anchor", proxy_mode="small")
            np.testing.assert_allclose(await odds(proxy), wanted, atol=2e-3)
    async with a_proxy(tmp_path / "proxy", *more) as proxy:
        await proxy.serves("distilled@1")
        np.testing.assert_allclose(await odds(proxy), wanted, atol=2e-3)


async def test_a_request_that_cannot_be_answered_so_is_told_why(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    async with a_pair(broker, tmp_path) as proxy:
        for body, words in (
            ({"proxy_mode": "huge"}, "proxy_mode"),
            ({"proxy_alpha": 11}, "proxy_alpha"),
            ({"proxy_mode": "large", "proxy_alpha": 2}, "ensemble's"),
            ({"proxy_mode": "ensemble", "model": "base"}, "nothing to steer with"),
        ):
            status, answer = await proxy.post("/v1/completions", {"prompt": "a"} | body)
            assert status == 400
            assert words in answer["error"]["message"]
        assert (await proxy.complete("a", model="base"))["proxy"]["mode"] == "small"
        assert (await proxy.complete("a", model="base", proxy_mode="large"))["proxy"]["alpha"] == 0
    async with a_proxy(tmp_path / "alone", "--model", str(tmp_path / "small.gguf")) as proxy:
        await proxy.serves("base")
        status, answer = await proxy.post(
            "/v1/completions", {"prompt": "a", "proxy_mode": "ensemble"}
        )
        assert status == 400
        assert "--large" in answer["error"]["message"]
        assert "proxy" not in await proxy.complete("a"), "without a large model nothing is new"


async def test_answers_are_right_when_modes_mix_and_the_cache_is_too_small(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    """Lanes change hands between steered and plain sequences, and sequences are preempted."""
    small, large = _models(tmp_path)
    modes: list[dict[str, object]] = [
        {"proxy_mode": "large"},
        {"proxy_mode": "ensemble"},
        {"proxy_mode": "ensemble", "proxy_alpha": 2.5},
        {"proxy_mode": "small"},
    ]
    more = ("--servers", broker.url, "--large", str(large), "--model", str(small))
    more += ("--context-tokens", "256", "--sequences", "8")
    async with a_job(broker, small), a_proxy(tmp_path / "proxy", *more) as proxy:
        await proxy.serves("job@1")
        asked = [
            (prompt, mode | {"max_tokens": 80, "logit_bias": ENDLESS})
            for prompt in PROMPTS
            for mode in modes
        ]
        measures = [
            alone((await proxy.complete(p, **b, logprobs=ALONE))["choices"][0]) for p, b in asked
        ]
        for _ in range(3):
            calls = [proxy.complete(p, **b, logprobs=0) for p, b in asked]
            for measure, answer in zip(measures, await asyncio.gather(*calls), strict=True):
                assert measure.explains(tokens(answer["choices"][0]), times=NOISE)
        assert await proxy.metric("seedwire_proxy_preemptions_total") > 0


@pytest.mark.parametrize(("tuned", "steered"), [(320, 384), (384, 320)])
async def test_what_pads_one_model_beyond_the_other_is_neither_written_nor_taken(
    broker: BrokerProcess, tmp_path: Path, tuned: int, steered: int
) -> None:
    small = tiny_gguf.write(tmp_path / "small.gguf", shape=Shape(vocabulary=tuned))
    large = tiny_gguf.write(tmp_path / "large.gguf", shape=Shape(vocabulary=steered))
    more = ("--servers", broker.url, "--large", str(large), "--model", str(small))
    body = {"max_tokens": 40, "n": 8, "logprobs": 20, "presence_penalty": 0.5, "temperature": 50}
    async with a_job(broker, small), a_proxy(tmp_path / "proxy", *more) as proxy:
        await proxy.serves("job@1")
        for mode in ("large", "ensemble"):
            await proxy.complete(PROMPTS[0], **body, logit_bias=ENDLESS, proxy_mode=mode)
            status, answer = await proxy.post(
                "/v1/completions", {"prompt": [5, 350, 7], "proxy_mode": mode}
            )
            assert status == 400
            assert "350 is no token" in answer["error"]["message"]


async def test_a_new_version_takes_over_in_the_midst_of_steered_answers(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    small, large = _models(tmp_path)
    more = ("--servers", broker.url, "--large", str(large), "--model", str(small))
    async with a_job(broker, small) as (publisher, manifest):
        async with a_proxy(tmp_path / "proxy", *more) as proxy:
            await proxy.serves("job@1")
            body = {"max_tokens": 40, "logit_bias": ENDLESS}
            told: list[Any] = []
            over = asyncio.Event()

            async def client() -> None:
                while not over.is_set():
                    told.append(await proxy.complete(PROMPTS[1], **body, logprobs=0))

            async with asyncio.TaskGroup() as tasks:
                for _ in range(4):
                    tasks.create_task(client())
                for round in (2, 3, 4):
                    await publisher.publish("job", round, _values(manifest, round))
                    await proxy.serves(f"job@{round}")
                over.set()
            await proxy.complete(PROMPTS[1], **body)
            measures = {
                name: alone(
                    (await proxy.complete(PROMPTS[1], **body, model=name, logprobs=ALONE))[
                        "choices"
                    ][0]
                )
                for name in {answer["model"] for answer in told} | {"job@4"}
            }
        assert len(measures) >= 3
        for answer in told:
            assert answer["proxy"]["mode"] == "ensemble"
            assert measures[answer["model"]].explains(tokens(answer["choices"][0]), times=NOISE)


async def test_models_whose_tokens_mean_other_things_are_refused(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    small = tiny_gguf.write(tmp_path / "small.gguf")
    other = tiny_gguf.write(tmp_path / "other.gguf", shape=Shape(vocabulary=512), controls=["<x>"])
    with pytest.raises(AssertionError, match="tokenizers differ"):
        async with a_proxy(tmp_path / "both", "--model", str(small), "--large", str(other)):
            pass
    async with a_job(broker, small) as (publisher, _):
        from shared import blobs

        await blobs.put(publisher.link, small)
        more = ("--servers", broker.url, "--large", str(other))
        async with a_proxy(tmp_path / "fetched", *more) as proxy:
            await proxy.serves("job@1")  # alone
            status, answer = await proxy.post(
                "/v1/completions", {"prompt": "a", "proxy_mode": "ensemble"}
            )
            assert status == 400
            assert "tokenizers differ" in answer["error"]["message"]
            assert (await proxy.complete("a"))["proxy"]["mode"] == "small"
