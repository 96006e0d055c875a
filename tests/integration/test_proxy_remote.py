"""A large model on llama-cpp-python's own server, against the same model computed here."""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from numpy.typing import NDArray

from services.proxy_inference.batching import Schedule, Sequence
from services.proxy_inference.generation import Generation, Weights
from services.proxy_inference.remote.client import RemoteLarge, opened
from services.proxy_inference.remote.link import Patience
from services.proxy_inference.remote.steering import push
from services.proxy_inference.sampling import Sampling
from services.proxy_inference.shelf import ModelFile
from services.proxy_inference.speaking import Room
from shared import nats_bus
from shared.errors import ConfigError, TransientError
from shared.messages import Block, Task
from tests.support import tiny_gguf
from tests.support.broker import BrokerProcess
from tests.support.llama_cpp_server import LlamaCppServer, a_large_server
from tests.support.near_ties import ALONE, alone, tokens
from tests.support.publishing import Publisher, a_manifest
from tests.support.serving import Proxy, a_proxy

DEMO = Path(__file__).resolve().parents[2] / "deploy/demo/model/seedwire-demo-q8_0.gguf"
TEXTS = (
    "Once upon a time there was a little",
    "The function returns a list of",
    "He went to the market and bought",
    "Category: sports. Text: the team won the",
    "What is the name of the",
    "In the year 1984, the government",
)
SHORT = Patience(answer_s=10.0, give_up_s=1.0)

Row = NDArray[np.float32]


@dataclass
class Three:
    """The large model's file, and all three computed here."""

    file: Path
    large: Generation
    tuned: Generation
    base: Generation

    def rows(self, text: str) -> tuple[list[int], Row, Row, Row]:
        """The text's tokens, and what the large, the tuned and the base model make of them."""
        tokens = self.base.weights.vocabulary.tokenize(text, start=True)
        found = [_row(one, tokens) for one in (self.large, self.tuned, self.base)]
        return tokens, found[0], found[1], found[2]


def _row(generation: Generation, tokens: list[int]) -> Row:
    schedule = Schedule(lanes=1, cells=512, batch_tokens=512, most_reads=1)
    schedule.add(Sequence(tokens))
    row = generation.decode(schedule.next())[-1].copy()
    generation.clear()
    return row


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    """Trained models where they are at hand: random ones agree in nothing."""
    folder = tmp_path_factory.mktemp("models")
    models = Path(os.environ["SEEDWIRE_MODELS"]) if "SEEDWIRE_MODELS" in os.environ else None
    if models is not None:
        files = [models / name for name in ("llama-3m/f16.gguf", "llama-1m/q4_k_m.gguf")]
        files.append(models / "llama-1m/f16.gguf")
    else:
        files = [_tiny(folder / "large.gguf", seed=1)]
        for seed in (2, 3):
            files.append(tiny_gguf.write(folder / f"{seed}.gguf", quantized=False, seed=seed))
    room = Room(512, 1, 1)
    weights = [Weights(ModelFile(file, str(place))) for place, file in enumerate(files)]
    generations = [Generation(one, None, room) for one in weights]
    yield Three(files[0], *generations)
    for generation, one in zip(generations, weights, strict=True):
        generation.close()
        one.close()


def _tiny(path: Path, *, seed: int, more: float = 0.0) -> Path:
    """A random model that hardly ever writes half a character, of which a text says nothing."""
    shape = tiny_gguf.Shape()
    sharper = np.zeros((shape.vocabulary, shape.width), np.float32)
    random = np.random.default_rng(seed)
    sharper[1:95] = 0.4 * random.standard_normal((94, shape.width))
    sharper[1:95] += more * random.standard_normal((94, shape.width))
    return tiny_gguf.write(path, quantized=False, seed=seed, plus={"output.weight": sharper})


@pytest.fixture
async def server(three: Three, tmp_path: Path) -> AsyncGenerator[LlamaCppServer, None]:
    async with a_large_server(three.file, tmp_path / "large.log") as server:
        yield server


def chances(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return weights / weights.sum()


def apart(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Total variation."""
    return 0.5 * float(np.abs(one - other).sum())


async def test_what_is_pulled_makes_the_ensemble_that_is_computed_here(
    three: Three, server: LlamaCppServer
) -> None:
    vocabulary = three.base.weights.vocabulary
    distances: dict[int, list[float]] = {20: [], 1000: []}
    alike: list[bool] = []
    for most, found in distances.items():
        async with opened(server.url, vocabulary, most=most) as large:
            can = large.capabilities
            assert can.pulls
            assert not can.takes_ids  # llama_cpp.server tokenizes anew
            assert (can.before_temperature, can.before_bias) == (True, True)
            assert any("/extras/tokenize" in how for how in can.agreement)
            assert any("prompt_tokens" in how for how in can.agreement)
            for text in TEXTS:
                tokens, l_large, l_tuned, l_base = three.rows(text)
                pulled = await large.logits(tokens, l_base)
                exact = l_large + (l_tuned - l_base)
                combined = pulled.logits + (l_tuned - l_base)
                found.append(apart(chances(combined), chances(exact)))
                if most == 1000:
                    alike.append(int(combined.argmax()) == int(exact.argmax()))
                assert 0.0 <= pulled.missing < 1.0
    assert np.mean(distances[1000]) < 0.05
    assert np.mean(distances[20]) < 0.25
    assert np.mean(distances[1000]) <= np.mean(distances[20])
    assert all(alike)


async def test_what_is_pushed_draws_from_the_ensemble_that_is_computed_here(
    three: Three, server: LlamaCppServer
) -> None:
    tokens, l_large, l_tuned, l_base = three.rows(TEXTS[0])
    exact = chances((l_large + (l_tuned - l_base)) / 0.7)
    plain = chances(l_large / 0.7)
    count = 400
    drawn: Counter[int | None] = Counter()
    async with opened(server.url, three.base.weights.vocabulary) as large:
        can = large.capabilities
        sent = push(l_tuned, l_base, 1.0, most=can.entries, reach=can.reach)
        assert sent.clipped < 0.05
        for seed in range(count):
            sampling = Sampling(temperature=0.7)
            drawn[await large.token(tokens, sent.bias, sampling, seed=seed)] += 1
    share = np.array([drawn[token] / count for token in range(len(exact))])
    noise = 0.5 * np.sqrt(2 * exact * (1 - exact) / np.pi / count).sum()
    distance = apart(share, exact)
    assert distance < noise + sent.clipped + 0.08, f"{distance:.3f}, of noise {noise:.3f}"
    if apart(exact, plain) > 0.3:  # and not from the large model alone
        assert apart(share, plain) > distance + 0.1


async def test_a_server_without_log_probabilities_is_pushed(three: Three, tmp_path: Path) -> None:
    tokens, _, l_tuned, l_base = three.rows(TEXTS[1])
    vocabulary = three.base.weights.vocabulary
    log = tmp_path / "mute.log"
    async with (
        a_large_server(three.file, log, "--logits_all", "false") as mute,
        opened(mute.url, vocabulary) as large,
    ):
        assert not large.capabilities.pulls
        assert "logits_all" in large.capabilities.without
        wanted = int(_row(three.large, tokens).argmax())
        greedy = await large.token(tokens, {}, Sampling(temperature=0.0))
        assert greedy == (None if large.nameless[wanted] else wanted)
        sent = push(l_tuned, l_base, 4.0, most=1000, reach=100.0)
        steered = await large.token(tokens, sent.bias, Sampling(temperature=0.0))
        wanted = int((_row(three.large, tokens) + 4.0 * (l_tuned - l_base)).argmax())
        assert steered == (None if large.nameless[wanted] else wanted)


async def test_a_server_of_another_tokenizer_is_refused(three: Three, tmp_path: Path) -> None:
    async with a_large_server(DEMO, tmp_path / "other.log") as server:
        with pytest.raises(ConfigError, match=f"{server.url}: its tokenizer is not this model's"):
            async with opened(server.url, three.base.weights.vocabulary):
                pass


async def test_a_server_that_dies_in_the_middle_of_an_answer_is_named_and_found_again(
    three: Three, server: LlamaCppServer
) -> None:
    vocabulary = three.base.weights.vocabulary
    tokens, _, _, l_base = three.rows(TEXTS[0])
    async with opened(server.url, vocabulary, patience=SHORT) as large:
        before = await large.logits(tokens, l_base)
        asking = [asyncio.create_task(_many(large, tokens, l_base)) for _ in range(4)]
        await asyncio.sleep(0.1)
        await server.kill()
        began = time.monotonic()
        for told in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(told, TransientError)
            assert server.url in str(told)
        assert time.monotonic() - began < 5.0
        await server.start()
        after = await large.logits(tokens, l_base)
        np.testing.assert_allclose(after.logits, before.logits, atol=1e-3)


async def _many(large: RemoteLarge, tokens: list[int], base: Row) -> None:
    while True:
        await large.logits(tokens, base)


async def test_a_server_that_is_only_restarted_costs_time_and_no_answer(
    three: Three, server: LlamaCppServer
) -> None:
    tokens, _, _, l_base = three.rows(TEXTS[0])
    async with opened(server.url, three.base.weights.vocabulary) as large:
        await server.kill()
        asking = asyncio.create_task(large.logits(tokens, l_base))
        await server.start()
        assert (await asking).k > 0
        assert large.retries > 0


LORA = [
    Block("lora_b", f"blk.{layer}.{name}.weight", [rows], slot=slot, d_in=64)
    for layer in (0, 1)
    for name, rows in (("attn_q", 64), ("attn_v", 32))
    for slot in (0, 1)
]
LABELS = {"one": "g", "two": "h", "three": "q", "four": "Z"}
TASK = Task(loss="choices", template="Of {text}\nit is ", labels=LABELS, max_tokens=48)
ENDLESS = {"0": -100}


@pytest.fixture
async def small(broker: BrokerProcess, tmp_path: Path) -> AsyncGenerator[tuple[str, ...], None]:
    """The arguments of a proxy over a small model with one version."""
    path = _tiny(tmp_path / "small.gguf", seed=1)
    link = await nats_bus.connect([broker.url], name="publisher")
    publisher = await Publisher.on(link)
    manifest = a_manifest(path, "llama", LORA)
    await publisher.open("job", manifest, TASK)
    values = 0.5 * np.random.default_rng(1).standard_normal(manifest.d)
    await publisher.publish("job", 1, values)
    yield ("--servers", broker.url, "--model", str(path))
    await link.close()


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """It says much of what the small one says."""
    return _tiny(tmp_path / "large.gguf", seed=1, more=0.05)


async def test_a_proxy_answers_as_if_the_large_model_were_its_own(
    small: tuple[str, ...], large_file: Path, tmp_path: Path
) -> None:
    body: dict[str, object] = {"max_tokens": 12, "logit_bias": ENDLESS, "logprobs": ALONE}
    prompts = ["the inner ear", "a story of", "in the beginning there was", "it is the end"]
    modes = ({"proxy_mode": "large"}, {"proxy_alpha": 1.0}, {"proxy_alpha": 2.5})
    asked = [(prompt, body | mode) for prompt in prompts for mode in modes]
    labelled = [{"text": "a story of the ear"} | mode for mode in modes]

    async def told(large: str, folder: str) -> tuple[list[Any], list[Any], Proxy]:
        async with a_proxy(tmp_path / folder, *small, "--large", large) as proxy:
            await proxy.serves("job@1")
            answers = await asyncio.gather(*(proxy.complete(p, **b) for p, b in asked))
            labels = [(await proxy.post("/v1/classify", one))[1] for one in labelled]
            return answers, labels, proxy

    own, own_labels, _ = await told(str(large_file), "own")
    async with a_large_server(large_file, tmp_path / "large.log") as server:
        far, far_labels, _ = await told(server.url, "far")
    for mine, theirs in zip(own, far, strict=True):
        said = theirs["proxy"]
        assert said["exact"] is False
        assert said["way"] == "pull"
        assert said["k"] > 50
        assert 0.0 < said["missing_mass"] < 0.2
        assert (said["mode"], said["alpha"]) == (mine["proxy"]["mode"], mine["proxy"]["alpha"])
        assert mine["proxy"]["exact"] is True
    pairs = [(a["choices"][0], b["choices"][0]) for a, b in zip(own, far, strict=True)]
    same = [alone(mine).explains(tokens(theirs)) for mine, theirs in pairs]
    assert np.mean(same) >= 0.75  # half characters are filled, not known
    for mine, theirs in zip(own_labels, far_labels, strict=True):
        assert theirs["proxy"]["exact"] is False
        for label in LABELS:
            exact = mine["probabilities"][label]
            assert theirs["probabilities"][label] == pytest.approx(exact, abs=0.02)


async def test_while_the_server_is_away_everything_else_answers_and_then_it_answers_again(
    small: tuple[str, ...], large_file: Path, tmp_path: Path
) -> None:
    body: dict[str, object] = {"max_tokens": 8, "logit_bias": ENDLESS}
    async with (
        a_large_server(large_file, tmp_path / "large.log") as server,
        a_proxy(tmp_path / "proxy", *small, "--large", server.url) as proxy,
    ):
        await proxy.serves("job@1")
        await proxy.complete("a story of", **body, proxy_mode="ensemble")
        await server.kill()
        waiting = asyncio.create_task(proxy.complete("a story of", **body, proxy_mode="ensemble"))
        began = time.monotonic()
        for _ in range(5):
            answer = await proxy.complete("a story of", **body, proxy_mode="small")
            assert answer["proxy"]["exact"] is True
        assert time.monotonic() - began < 2.0, "nobody else waits for the server"
        assert not waiting.done()
        assert await proxy.metric("seedwire_proxy_sequences_running") == 1
        assert await proxy.metric("seedwire_proxy_requests_waiting") == 0
        await server.start()
        assert (await waiting)["usage"]["completion_tokens"] == 8
        spelled = "say <|end|> now"  # as text, what its server would read as a control token
        status, refused = await proxy.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": spelled}]}
        )
        assert (status, "control token" in str(refused)) == (400, True)
        assert (await proxy.complete("a story of", **body))["proxy"]["mode"] == "ensemble"


async def test_a_stream_says_at_its_end_how_far_off_it_may_be(
    small: tuple[str, ...], large_file: Path, tmp_path: Path
) -> None:
    async with (
        a_large_server(large_file, tmp_path / "large.log") as server,
        a_proxy(tmp_path / "proxy", *small, "--large", server.url) as proxy,
    ):
        await proxy.serves("job@1")
        body = {"prompt": "a story of", "max_tokens": 6, "logit_bias": ENDLESS, "stream": True}
        async with proxy.http.post(proxy.url + "/v1/completions", json=body) as response:
            lines = (await response.text()).split("\n\n")
    last = json.loads(lines[-3].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["proxy"]["exact"] is False
    assert 0.0 < last["proxy"]["missing_mass"] < 0.2


async def test_a_proxy_is_stopped_while_it_waits_for_a_server_that_is_gone(
    small: tuple[str, ...], large_file: Path, tmp_path: Path
) -> None:
    more = ("--drain-s", "0.5")
    async with a_large_server(large_file, tmp_path / "large.log") as server:
        async with a_proxy(tmp_path / "proxy", *small, "--large", server.url, *more) as proxy:
            await proxy.serves("job@1")
            await server.kill()
            waiting = asyncio.create_task(proxy.complete("a story of"))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            began = time.monotonic()
        assert time.monotonic() - began < 8.0
        with pytest.raises((AssertionError, aiohttp.ClientError)):
            await waiting


async def test_a_proxy_draws_where_its_server_tells_no_log_probabilities(
    small: tuple[str, ...], large_file: Path, tmp_path: Path
) -> None:
    body: dict[str, object] = {"max_tokens": 12, "logit_bias": ENDLESS}
    async with (
        a_large_server(large_file, tmp_path / "large.log", "--logits_all", "false") as server,
        a_proxy(tmp_path / "proxy", *small, "--large", server.url) as proxy,
    ):
        await proxy.serves("job@1")
        answer = await proxy.complete("a story of", **body, proxy_alpha=1.0)
        assert answer["usage"]["completion_tokens"] == 12
        assert answer["proxy"]["way"] == "push"
        assert answer["proxy"]["exact"] is False
        assert 0.0 <= answer["proxy"]["clipped"] < 0.1
        again = await proxy.complete("a story of", **body, temperature=1.0, seed=7)
        more = await proxy.complete("a story of", **body, temperature=1.0, seed=7)
        assert again["choices"][0]["text"] == more["choices"][0]["text"]
        status, refused = await proxy.post(
            "/v1/completions", {"prompt": "a", "logprobs": 3, "proxy_mode": "ensemble"}
        )
        assert (status, refused["error"]["param"]) == (400, "logprobs")
        status, refused = await proxy.post("/v1/classify", {"text": "a", "proxy_mode": "ensemble"})
        assert status == 500
        assert "log-probabilities" in refused["error"]["message"]


async def test_a_proxy_does_not_start_with_a_large_model_that_it_cannot_use(
    small: tuple[str, ...], tmp_path: Path
) -> None:
    async with a_large_server(DEMO, tmp_path / "other.log") as server:
        with pytest.raises(AssertionError, match="its tokenizer is not this model's"):
            async with a_proxy(tmp_path / "proxy", *small, "--large", server.url):
                pass
