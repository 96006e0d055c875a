"""Serving: tokens a second beside llama-cpp-python's own server, and swaps under load.

Throughput: the same model, prompts, threads and lengths in the same run, by turns, eight clients at
a time; greedy, with the end token biased away so that every answer has its full length. Swaps:
1,000 requests over four swaps; each answer is compared, token by token, with what the version that
it names says alone, and, as a check of the check, with what another version says.

The models' folder is SEEDWIRE_MODELS, or ../shared/models beside the repository; without it the
demo's model is served.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from deploy.demo.processes import ROOT
from services.console.addresses import free_port
from shared import nats_bus
from shared.broker import start_broker
from shared.engine.gguf_file import read_header
from shared.messages import Block, Manifest
from tests.bench.figure import Figure
from tests.support import tiny_gguf
from tests.support.near_ties import ALONE, Alone, alone, tokens
from tests.support.publishing import Publisher, a_manifest
from tests.support.serving import Proxy, a_proxy

MODELS = Path(os.environ.get("SEEDWIRE_MODELS", ROOT.parent / "shared/models"))
CLIENTS = 8
THREADS = 1
ANSWER_TOKENS = 64
TURNS = 5
WORDS = ("the", "a", "cat", "dog", "house", "story", "girl", "went", "to", "found", "and", "day")
SWAP_REQUESTS = 1000
SWAPS = 4


async def figures() -> list[Figure]:
    model = _model()
    with tempfile.TemporaryDirectory() as folder:
        found = await _throughput(Path(folder), model)
        return found + await _swaps(Path(folder), _precise(Path(folder)))


def _model() -> Path:
    theirs = MODELS / "llama-3m/q8_0.gguf"
    return theirs if theirs.exists() else ROOT / "deploy/demo/model/seedwire-demo-q8_0.gguf"


def _precise(folder: Path) -> Path:
    """A model that is not quantized; a random one where there is no other."""
    theirs = MODELS / "llama-3m/f16.gguf"
    return theirs if theirs.exists() else tiny_gguf.write(folder / "tiny.gguf", quantized=False)


def _prompts(count: int) -> list[str]:
    """Texts of some 20 to 60 tokens, each different from its first word on."""
    random = np.random.default_rng(1)
    return [
        f"{number} " + " ".join(random.choice(WORDS, int(random.integers(15, 50))).tolist())
        for number in range(count)
    ]


PROMPTS = _prompts(40)


async def _throughput(folder: Path, model: Path) -> list[Figure]:
    arguments = ("--model", str(model), "--threads", str(THREADS), "--context-tokens", "4096")
    async with a_proxy(folder / "proxy", *arguments) as proxy, _llama_cpp(model) as theirs:
        await proxy.serves("base")
        ours: list[float] = []
        others: list[float] = []
        for turn in range(TURNS):
            prompts = [f"{turn}{prompt}" for prompt in _prompts(4 * CLIENTS)]
            for url, speeds in ((proxy.url, ours), (theirs, others)):
                speeds.append(await _speed(url, prompts))
    alone = statistics.median(others)
    return [Figure("serve.tokens_per_s", statistics.median(ours), "tokens/s", alone)]


async def _speed(url: str, prompts: Sequence[str]) -> float:
    """Tokens written a second by one server with CLIENTS at a time."""
    left = list(prompts)
    written = 0

    async def client(http: aiohttp.ClientSession) -> None:
        nonlocal written
        while left:
            body = {
                "prompt": left.pop(),
                "max_tokens": ANSWER_TOKENS,
                "temperature": 0,
                "logit_bias": {"0": -100},
            }
            async with http.post(f"{url}/v1/completions", json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
                written += answer["usage"]["completion_tokens"]

    async with aiohttp.ClientSession() as http:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(client(http))
        return written / (time.perf_counter() - began)


@asynccontextmanager
async def _llama_cpp(model: Path) -> AsyncGenerator[str, None]:
    """llama-cpp-python's own server."""
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model)]
    command += ["--port", str(port), "--n_threads", str(THREADS)]
    command += ["--n_threads_batch", str(THREADS), "--n_ctx", "1024", "--verbose", "false"]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(60):
            while not await _answers(http, url):
                if process.returncode is not None:
                    raise SystemExit("serve: llama_cpp.server ended; it needs its extra `server`")
                await asyncio.sleep(0.2)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/v1/models") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def _swaps(folder: Path, model: Path) -> list[Figure]:
    """How many of the requests got no answer, and how many one that is not their version's."""
    manifest = _lora(model)
    async with start_broker(folder / "broker") as broker:
        link = await nats_bus.connect([broker.url], name="bench")
        publisher = await Publisher.on(link)
        await publisher.open("bench", manifest)
        arguments = ("--model", str(model), "--threads", str(THREADS), "--servers", broker.url)
        arguments += ("--keep-versions", str(SWAPS + 1))
        async with a_proxy(folder / "swapped", *arguments) as proxy:
            for round in range(1, SWAPS + 2):
                await publisher.publish("bench", round, _values(manifest, round))
                await proxy.serves(f"bench@{round}")
            measures = await _alone(proxy)

            async def swap(number: int) -> None:
                """The same numbers again, as a version of a later round."""
                later = number + SWAPS + 1
                await publisher.publish("bench", later, _values(manifest, number))

            await swap(1)
            await proxy.serves(f"bench@{SWAPS + 2}")
            told = await _asked(proxy, swap)
        await link.close()
    mixed = [row for row in told if not measures[row[:2]].explains(row[2])]
    exact = [row for row in told if measures[row[:2]].tokens == row[2]]
    wrong = [row for row in told if not measures[row[0] % (SWAPS + 1) + 1, row[1]].explains(row[2])]
    of_all = f"of {SWAP_REQUESTS} requests"
    return [
        Figure("serve.swap_dropped", SWAP_REQUESTS - len(told), of_all, target=0),
        Figure("serve.swap_mixed", len(mixed), of_all, target=0),
        Figure("serve.swap_versions", len({row[0] for row in told}), "versions", target=SWAPS + 1),
        Figure("serve.swap_identical", len(exact), "answers alike to the last token"),
        Figure("serve.swap_seen", len(wrong) / len(told), "of another version's answers found out"),
    ]


def _lora(model: Path) -> Manifest:
    """A LoRA on the attention of each layer."""
    header = read_header(str(model))
    blocks = [
        Block("lora_b", name, [shape[1]], slot=slot, d_in=shape[0])
        for name, shape in header.tensors.items()
        if name.endswith(("attn_q.weight", "attn_v.weight"))
        for slot in range(4)
    ]
    return a_manifest(model, header.architecture, blocks)


def _values(manifest: Manifest, round: int) -> Any:
    """Large enough that each version says something else."""
    return 0.3 * np.random.default_rng(round).standard_normal(manifest.d)


def _body(prompt: str) -> dict[str, object]:
    body: dict[str, object] = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
    return body | {"logit_bias": {"0": -100}, "logprobs": 0}


async def _alone(proxy: Proxy) -> dict[tuple[int, int], Alone]:
    """What each version says to each prompt, one question at a time."""
    found: dict[tuple[int, int], Alone] = {}
    for version in range(1, SWAPS + 2):
        for number, prompt in enumerate(PROMPTS):
            status, answer = await proxy.post(
                "/v1/completions", _body(prompt) | {"model": f"bench@{version}", "logprobs": ALONE}
            )
            assert status == 200, answer
            found[version, number] = alone(answer["choices"][0])
    return found


async def _asked(
    proxy: Proxy, swap: Callable[[int], Awaitable[None]]
) -> list[tuple[int, int, list[str]]]:
    """(version, prompt, tokens) of each answer, while the versions are swapped."""
    told: list[tuple[int, int, list[str]]] = []
    left = list(range(SWAP_REQUESTS))
    share = SWAP_REQUESTS // (SWAPS + 1)

    async def client() -> None:
        while left:
            prompt = left.pop() % len(PROMPTS)
            status, answer = await proxy.post("/v1/completions", _body(PROMPTS[prompt]))
            if status == 200:
                version = answer["system_fingerprint"].partition("-")[0]
                number = int(version.partition("@")[2]) - SWAPS - 1
                told.append((number, prompt, tokens(answer["choices"][0])))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CLIENTS):
            tasks.create_task(client())
        for number in range(2, SWAPS + 2):
            while len(left) > SWAP_REQUESTS - share * (number - 1):
                await asyncio.sleep(0.005)
            await swap(number)
    return told
