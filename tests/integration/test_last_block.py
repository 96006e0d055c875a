"""The default job at a real fleet: its last block learns, and the proxy serves what was learnt."""

import asyncio
import json
import sys
from pathlib import Path

from deploy.demo.processes import ROOT, Child
from services.console.manifest import LAST_BLOCK
from shared.broker import BrokerProcess
from shared.codec import decode_manifest
from shared.messages import (
    EpochOpened,
    JobEnded,
    JobOpened,
    RoundClosed,
)
from tests.support import tiny_gguf
from tests.support.fleet import Fleet, fleet_on, rows, write_rows
from tests.support.jobs import judged
from tests.support.serving import a_proxy

DEVICES, ROUNDS, HELDOUT = 3, 6, 60
TEMPLATE = "{text} is "
"""It ends in a space, so that the tokens of both labels' words begin with their own letters."""


async def start_device(fleet: Fleet, number: int, model: Path) -> None:
    """A device with llama.cpp and rows of its own; the first is trusted."""
    name = f"d{number}"
    data = write_rows(fleet.folder / f"{name}.jsonl", rows(40, offset=40 * number))
    arguments = ["--device", name, "--servers", *fleet.servers, "--models", str(model)]
    arguments += ["--data", str(data), "--state-dir", str(fleet.folder / "state" / name)]
    if not number:
        heldout = write_rows(fleet.folder / "heldout.jsonl", rows(HELDOUT, offset=100_000))
        arguments += ["--heldout", str(heldout), "--trusted", "true"]
    fleet.devices[name] = Child(name, "edge_client", arguments, fleet.folder / f"{name}.log")
    await fleet.devices[name].start()


async def submit(fleet: Fleet, model: Path) -> str:
    """What the command line says of a job with nothing asked but its size."""
    line = f"job submit --name mail --model {model} --labels fruit,metal --rounds {ROUNDS}"
    line += f" --enough-devices {DEVICES} --deadline 20 --evaluate-every 1"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.console", *line.split(), "--template", TEMPLATE),
        *("--servers", *fleet.servers),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()


async def test_a_fleet_learns_by_its_last_block_and_the_proxy_answers_as_it_was_evaluated(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    async with fleet_on(broker, tmp_path) as fleet:
        for number in range(DEVICES):
            await start_device(fleet, number, model)
        assert "(lora_a, lora_b, output_rows)" in await submit(fleet, model)
        async with asyncio.timeout(100):
            events = await fleet.events_until("mail")
        assert isinstance(events[-1], JobEnded), fleet.logs()
        (opened,) = [event for event in events if isinstance(event, JobOpened)]
        (epoch,) = [event for event in events if isinstance(event, EpochOpened)]
        assert opened.spec.tuning.local_steps
        tensors = {block.tensor for block in decode_manifest(epoch.manifest).blocks}
        assert tensors == {"output.weight", *(f"blk.1.{name}.weight" for name in LAST_BLOCK)}
        closes = [event for event in events if isinstance(event, RoundClosed) and event.commit]
        assert [close.devices for close in closes] == [DEVICES] * ROUNDS
        held_out = judged(events)
        best = held_out.ranked()[0]
        first, told = held_out.measured[0], held_out.of(best.digest)
        assert told is not None
        assert told.loss_sum < 0.8 * first.loss_sum
        assert told.correct > 0.7 * told.examples == 0.7 * HELDOUT

        arguments = ("--model", str(model), "--servers", *fleet.servers)
        async with a_proxy(tmp_path / "proxy", *arguments) as proxy:
            await proxy.serves(f"mail@{best.round}")
            right = 0
            for row in rows(HELDOUT, offset=100_000):
                status, answer = await proxy.post("/v1/classify", {"text": row["text"]})
                assert status == 200, json.dumps(answer)
                right += answer["label"] == row["label"]
            assert abs(right - told.correct) <= 1  # a tie may fall otherwise in another batch
