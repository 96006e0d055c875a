"""How fast the proxy writes: large alone, the plain ensemble, and the ensemble with drafts.

One small model (llama-1m, tuned by the fleet on stories) steers one large model (llama-3m, F16) at
three cost ratios. The large one is made dearer by layers that add nothing: its logits stay as they
are, its costs are real. Greedy answers of fixed length to the same prompts, by turns in one run,
one thread each; prompts are in the cache before the clock starts. `stock` is the large model in
llama-cpp-python's own server. What the formula promises is in prediction.py.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from shared import nats_bus
from shared.adapter import Adapter
from shared.broker import start_broker
from shared.messages import Task
from tests.bench.figure import Figure
from tests.bench.proxy.plan import LARGE, SMALL, gguf, plan, rows
from tests.bench.proxy.prediction import Measured, measured
from tests.bench.proxy.quality import made
from tests.bench.proxy.steps import adapted
from tests.support.llama_cpp_server import a_large_server
from tests.support.longer_gguf import lengthen
from tests.support.publishing import Publisher
from tests.support.serving import Proxy, a_proxy

DATASET = "tinystories"
LAYERS = {"0.05": 53, "0.1": 24, "0.25": 4}
"""Appended to the large model, for a cost ratio c near this one."""
ANSWER_TOKENS = 64
PROMPTS = 6
TURNS = 7
CLIENTS = (1, 4, 16)
LANES = 16
ENDLESS = {"0": -100}
PLAIN, DRAFTING = "plain", "drafting"


@dataclass
class _Turns:
    """Tokens a second by mode, a turn each."""

    speeds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def add(self, mode: str, speed: float) -> None:
        self.speeds.setdefault(mode, []).append(speed)

    def median(self, mode: str) -> float:
        return statistics.median(self.speeds[mode])


async def figures() -> list[Figure]:
    wanted = plan(DATASET, quick=False)
    await made(wanted, "tuned")
    prompts = [str(row["prompt"]) for row in rows(wanted).task.heldout]
    adapter = adapted("tuned", wanted).adapter
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for ratio, layers in LAYERS.items():
            large = lengthen(gguf(LARGE, "f16"), Path(folder) / f"large-{ratio}.gguf", layers)
            told = measured(large, gguf(SMALL), adapter, prompts[:PROMPTS], ANSWER_TOKENS)
            async with _servers(Path(folder) / ratio, large, adapter) as servers:
                found += await _at(ratio, servers, told, prompts)
                if ratio == "0.05":
                    found += await _together(servers, prompts)
    return found


@dataclass
class _Servers:
    plain: Proxy
    drafting: Proxy
    stock: str

    def url(self, mode: str) -> str:
        if mode == "stock":
            return self.stock
        return f"{(self.drafting if mode == DRAFTING else self.plain).url}/v1"


@asynccontextmanager
async def _servers(folder: Path, large: Path, adapter: Adapter) -> AsyncGenerator[_Servers, None]:
    """A proxy that drafts, one that does not, and llama-cpp-python's."""
    small = str(gguf(SMALL))
    async with start_broker(folder / "broker") as broker:
        link = await nats_bus.connect([broker.url], name="bench")
        publisher = await Publisher.on(link)
        await publisher.open("stories", adapter.manifest, Task(loss="tokens"))
        await publisher.publish("stories", 1, adapter.values().astype("f8"))
        more = ("--servers", broker.url, "--model", small, "--large", str(large))
        more += ("--sequences", str(LANES), "--context-tokens", "4096", "--mode", "ensemble")
        async with (
            a_proxy(folder / "plain", *more, "--speculate", "false") as plain,
            a_proxy(folder / "drafting", *more) as drafting,
            a_large_server(large, folder / "stock.log") as stock,
        ):
            for proxy in (plain, drafting):
                await proxy.serves("stories@1")
            yield _Servers(plain, drafting, stock.url)
        await link.close()


async def _at(
    ratio: str, servers: _Servers, told: Measured, prompts: Sequence[str]
) -> list[Figure]:
    greedy, sampled = _Turns(), _Turns()
    for turn in range(TURNS):
        chosen = [prompts[(turn * PROMPTS + n) % len(prompts)] for n in range(PROMPTS)]
        for mode in ("stock", "large", PLAIN, DRAFTING):
            greedy.add(mode, await _speed(servers, mode, chosen))
        for mode in (PLAIN, DRAFTING):
            sampled.add(mode, await _speed(servers, mode, chosen, temperature=1.0))
    fast = greedy.median(DRAFTING)
    predicted, drafts = told.gain(told.greedy)
    name = f"proxy.c{ratio}"
    unit = "tokens/s"
    return [
        Figure(f"{name}.cost_ratio", told.c, "small pass / large pass"),
        Figure(f"{name}.v3", told.v(3), "large passes of 1 token"),
        Figure(f"{name}.v5", told.v(5), "large passes of 1 token"),
        Figure(f"{name}.acceptance", told.greedy, "of drafts, greedy"),
        Figure(f"{name}.acceptance_sampled", told.sampled, "of drafts, temperature 1"),
        Figure(f"{name}.predicted_drafts", drafts, "drafts a pass"),
        Figure(f"{name}.vs_large", fast, unit, greedy.median("large")),
        Figure(f"{name}.vs_naive", fast, unit, greedy.median(PLAIN)),
        Figure(f"{name}.vs_stock", fast, unit, greedy.median("stock")),
        Figure(
            f"{name}.vs_predicted",
            fast / greedy.median(PLAIN),
            "times the plain ensemble",
            predicted,
            target=0.9,
        ),
        Figure(f"{name}.sampled_vs_naive", sampled.median(DRAFTING), unit, sampled.median(PLAIN)),
    ]


async def _together(servers: _Servers, prompts: Sequence[str]) -> list[Figure]:
    """So many clients at a time, each with prompts of its own."""
    found: list[Figure] = []
    for clients in CLIENTS:
        turns = _Turns()
        for turn in range(3):
            first = turn * 2 * clients
            chosen = [prompts[(first + n) % len(prompts)] for n in range(2 * clients)]
            for mode in (PLAIN, DRAFTING):
                turns.add(mode, await _speed(servers, mode, chosen, clients=clients))
        fast, plain = turns.median(DRAFTING), turns.median(PLAIN)
        found.append(Figure(f"proxy.concurrent{clients}.tokens_per_s", fast, "tokens/s", plain))
    return found


async def _speed(
    servers: _Servers, mode: str, prompts: Sequence[str], *, clients: int = 1, **more: float
) -> float:
    """Tokens written a second, by `clients` at a time; the first token of each is not timed."""
    url = f"{servers.url(mode)}/completions"
    body: dict[str, object] = {"temperature": 0, "logit_bias": ENDLESS}
    body |= more
    if mode != "stock":
        body["proxy_mode"] = "large" if mode == "large" else "ensemble"
    async with aiohttp.ClientSession() as http:

        async def ask(prompt: str, tokens: int) -> int:
            asked = body | {"prompt": prompt, "max_tokens": tokens}
            async with http.post(url, json=asked) as response:
                answer = await response.json()
                assert response.status == 200, answer
                return int(answer["usage"]["completion_tokens"])

        seconds, written = 0.0, 0
        for first in range(0, len(prompts), clients):
            some = prompts[first : first + clients]
            await asyncio.gather(*(ask(prompt, 1) for prompt in some))
            began = time.perf_counter()
            written += sum(await asyncio.gather(*(ask(prompt, ANSWER_TOKENS) for prompt in some)))
            seconds += time.perf_counter() - began
    return written / seconds
