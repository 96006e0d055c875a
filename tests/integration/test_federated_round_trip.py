"""The whole way round: a fleet tunes a small model, it steers a large one, and learns from both.

Real processes and the models and rows that the project keeps beside the repository: of llama-1m
the fleet's file is Q8_0, what is distilled is its float checkpoint; llama-3m is the large one.
"""

import asyncio
import json
import os
import sys
from math import log
from pathlib import Path
from typing import Any

import pytest

from deploy.demo.processes import ROOT, Child
from shared.broker import BrokerProcess
from shared.messages import (
    AdapterEvaluated,
    EpochOpened,
    JobEnded,
    ModelPublished,
    RoundClosed,
)
from tests.support.fleet import Fleet, fleet_on, write_rows
from tests.support.serving import Proxy, a_proxy
from tests.support.waiting import wait_until

for _name in ("torch", "peft", "transformers"):
    pytest.importorskip(_name, reason=f"{_name} is not installed: it needs the extra `distil`")

DATA = Path(os.environ.get("SEEDWIRE_DATA", ROOT.parent / "shared/data")) / "ag_news"
MODELS = Path(os.environ.get("SEEDWIRE_MODELS", ROOT.parent / "shared/models"))
SMALL, LARGE = MODELS / "llama-1m", MODELS / "llama-3m" / "q8_0.gguf"
pytestmark = [
    pytest.mark.skipif(
        not all(path.exists() for path in (DATA, SMALL, LARGE)),
        reason="the models or ag_news are not there: set SEEDWIRE_MODELS and SEEDWIRE_DATA",
    ),
    pytest.mark.timeout(240),
]

LABELS = "World,Sports,Business,Sci/Tech=Technology"
DEVICES, PRIVATE, PUBLIC, HELDOUT = 2, 80, 240, 60
"""Rows of each device, of everybody, and those that all are judged by."""
SPEC = """epochs = 2
[task]
max_tokens = 48
"""


def rows(file: str, first: int, count: int) -> list[dict[str, str]]:
    with (DATA / f"{file}.jsonl").open(encoding="utf-8") as lines:
        found = [json.loads(line) for _, line in zip(range(first + count), lines, strict=False)]
    return [{"text": row["text"], "label": row["label_name"]} for row in found[first:]]


async def console(fleet: Fleet, *arguments: str) -> str:
    """What the console prints; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.console", *arguments, "--servers", fleet.broker.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "SEEDWIRE_DISTILLER_THREADS": "2"},
    )
    said, complained = await process.communicate()
    assert process.returncode == 0, said.decode() + complained.decode()
    return said.decode()


async def start_devices(fleet: Fleet) -> None:
    model = SMALL / "q8_0.gguf"
    heldout = write_rows(fleet.folder / "heldout.jsonl", rows("test", 0, HELDOUT))
    for number in range(DEVICES):
        name = f"d{number}"
        data = fleet.folder / f"{name}.jsonl"
        write_rows(data, rows("train", PUBLIC + PRIVATE * number, PRIVATE))
        arguments = ["--device", name, "--servers", fleet.broker.url, "--models", str(model)]
        arguments += ["--data", str(data), "--state-dir", str(fleet.folder / "state" / name)]
        if not number:
            arguments += ["--heldout", str(heldout), "--trusted", "true"]
        fleet.devices[name] = Child(name, "edge_client", arguments, fleet.folder / f"{name}.log")
        await fleet.devices[name].start()


async def loss_by_mode(proxy: Proxy) -> dict[str, float]:
    """Mean loss on the held-out rows, nats, of each way to answer."""

    async def loss(row: dict[str, str], mode: str) -> float:
        body = {"text": row["text"], "proxy_mode": mode}
        status, answer = await proxy.post("/v1/classify", body)
        assert status == 200, answer
        return -log(answer["probabilities"][row["label"]])

    found: dict[str, float] = {}
    for mode in ("small", "large", "ensemble"):
        losses = [await loss(row, mode) for row in rows("test", 0, HELDOUT)]
        found[mode] = sum(losses) / len(losses)
    return found


def evaluations(events: list[Any], epoch: int) -> list[float]:
    """What the trusted device measured on the held-out rows in an epoch, nats, in order."""
    found = [one for one in events if isinstance(one, AdapterEvaluated) and one.epoch == epoch]
    return [one.loss / one.weight for one in found]


async def test_what_fleet_and_large_model_know_comes_back_to_the_devices(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    public = write_rows(tmp_path / "public.jsonl", rows("train", 0, PUBLIC))
    proxied = ("--model", str(SMALL / "q8_0.gguf"), "--large", str(LARGE))
    async with fleet_on(broker, tmp_path) as fleet:
        await start_devices(fleet)
        line = f"job submit --name news --model {SMALL / 'q8_0.gguf'} --labels {LABELS}"
        line += f" --rounds 3 --enough-devices {DEVICES} --deadline 30 --evaluate-every 3"
        await console(fleet, *line.split(), "--spec", str(tmp_path / "spec.toml"))
        async with asyncio.timeout(60):
            events = await fleet.events_until(
                "news",
                lambda event: isinstance(event, ModelPublished)
                and event.round == 4,
            )  # fmt: skip
        tuned = events[-1]
        assert isinstance(tuned, ModelPublished), fleet.logs()
        async with a_proxy(
            tmp_path / "proxy", *proxied, "--servers", broker.url, "--job", "news"
        ) as proxy:
            await proxy.serves("news@4")
            before = await loss_by_mode(proxy)
            assert before["ensemble"] < before["large"] - 0.1, before

            told = await console(
                fleet,
                *("distil", "news", "--small", str(SMALL), "--large", str(LARGE)),
                *("--public", str(public), "--heldout", str(tmp_path / "heldout.jsonl")),
                *("--steps", "60", "--batch-rows", "8", "--cache", str(tmp_path / "cache")),
                "--json",
            )
            figures = json.loads(told)["distilled"]
            assert figures["held_out_loss_after"] < figures["held_out_loss_before"] - 0.05
            assert figures["kl_after"] is not None
            async with asyncio.timeout(60):
                events = await fleet.events_until("news")
            ended = events[-1]
            assert isinstance(ended, JobEnded), fleet.logs()

            (second,) = [one for one in events if isinstance(one, EpochOpened) and one.epoch == 1]
            assert second.anchor is not None
            assert second.distilled is not None
            assert second.distilled.held_out_loss_after == figures["held_out_loss_after"]
            # The device runs the quantized file where the distiller had the float checkpoint.
            undistilled, distilled = evaluations(events, 0)[-1], evaluations(events, 1)[0]
            assert abs(undistilled - figures["held_out_loss_before"]) < 0.01
            assert abs(distilled - figures["held_out_loss_after"]) < 0.01
            assert distilled < undistilled
            closes = [one for one in events if isinstance(one, RoundClosed) and one.epoch == 1]
            assert sum(close.commit is not None for close in closes) == 3
            await wait_until(
                lambda: (
                    {fleet.positions.get(f"news/d{number}") for number in range(DEVICES)}
                    == {f"{ended.round}:{ended.digest}"}
                ),
                timeout_s=20,
                what="every device stands at the end",
            )
            await proxy.serves(f"news@{ended.round}")
            after = await loss_by_mode(proxy)
            assert after["small"] < before["small"]
            assert after["ensemble"] < before["ensemble"]
