"""`seedwire up` and the commands it names, as a newcomer runs them; the engine alone is a fake."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession

from services.console import broker_checks
from services.console.failure import EXIT_FAILURE
from shared import nats_bus, subjects
from shared.blobs import reference
from shared.codec import decode
from shared.errors import TransientError
from shared.identity import access
from shared.messages import ConnectionRefused
from shared.runtime import EXIT_CONFIG
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"fruit": ["apple", "pear", "plum"], "tool": ["saw", "drill", "file"]}
START_S, COMMAND_S = 60.0, 60.0


def environment() -> dict[str, str]:
    others = {k: v for k, v in os.environ.items() if not k.startswith("SEEDWIRE_")}
    return {**others, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a user of its own: what `up` registers, another terminal finds."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


async def spawn(*arguments: str) -> asyncio.subprocess.Process:
    """The console as a process, in a session of its own as a shell would give it."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.console", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(),
        start_new_session=True,
    )


async def seedwire(*arguments: str) -> tuple[int, str]:
    """Exit code and output of one command."""
    return await finished(await spawn(*arguments))


async def seedwire_edge(*arguments: str) -> asyncio.subprocess.Process:
    """A device's command or daemon."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge_client", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(),
    )


async def finished(process: asyncio.subprocess.Process) -> tuple[int, str]:
    async with asyncio.timeout(COMMAND_S):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


@asynccontextmanager
async def up(path: Path, *more: str) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    """`seedwire up` on free ports; its whole session is gone at the end, whatever the test did."""
    quiet = ["--port", "0", "--no-serve"]
    process = await spawn("up", "--state-dir", str(path / "state"), *quiet, *more)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(START_S):
                    await process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def announced(process: asyncio.subprocess.Process) -> tuple[str, str]:
    """The broker's and telemetry's addresses, once everything is up."""
    assert process.stdout is not None
    broker = telemetry = page = ""
    async with asyncio.timeout(START_S):
        async for line in process.stdout:
            text = line.decode()
            if text.startswith("broker "):
                broker = text.split()[1]
            elif text.startswith("page "):
                page = text.split()[1]
            elif text.startswith("telemetry "):
                telemetry = text.split()[1].removesuffix("/metrics,")
            elif "seedwire job submit" in text:
                assert page == f"{telemetry}/"
                return broker, telemetry
    raise AssertionError("it ended before it was up")


async def shown_job(telemetry: str) -> dict[str, Any]:
    """What telemetry shows of the job `demo`, or why it shows none."""
    async with ClientSession() as client, client.get(f"{telemetry}/jobs/demo") as response:
        return await response.json()


async def reached(telemetry: str, round: int) -> bool:
    return (await shown_job(telemetry)).get("round", 0) >= round


def some_data(path: Path, *, rows: int) -> Path:
    """Rows that a bag of words can tell apart."""
    pairs = [(label, word) for label, words in WORDS.items() for word in words]
    chosen = [pairs[number % len(pairs)] for number in range(rows)]
    lines = [json.dumps({"text": f"a {word} of mine", "label": label}) for label, word in chosen]
    path.write_text("\n".join(lines) + "\n")
    return path


def children_of(process: asyncio.subprocess.Process, module: str = "") -> list[int]:
    """Process ids of what `process` has started: all, or the service `module`."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (entry / "cmdline").read_bytes().decode().split("\0")
            if parent == process.pid and (not module or module in command):
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds its processes in /proc")
async def test_a_newcomer_starts_everything_tunes_a_model_and_stops(tmp_path: Path) -> None:
    data, model = some_data(tmp_path / "data.jsonl", rows=60), tmp_path / "model.json"
    model.write_text("{}")
    devices = ["--device", f"phone={data}", "--device", f"tablet={data}"]
    more = [*devices, "--heldout", str(data), "--engine", "fake", "--telemetry-port", "0"]
    async with up(tmp_path, *more) as process:
        _, telemetry = await announced(process)
        code, command = await seedwire("device", "invite", "--device", "till")
        assert (code, "seedwire-edge enroll swj1-" in command) == (0, True), command
        state = ["--device", "till", "--state-dir", str(tmp_path / "till")]
        enrolling = ["enroll", command.split()[-1], *state]
        code, output = await finished(await seedwire_edge(*enrolling))
        assert code == 0, output
        till = await seedwire_edge(*state, "--data", str(data), "--engine", "fake")
        line = f"--name demo --model {model} --labels-from {data} --engine fake --watch"
        line += " --rounds 100 --evaluate-every 20 --enough-devices 3 --directions 64 --deadline 10"
        submitting = asyncio.create_task(seedwire("job", "submit", *line.split()))
        await wait_until(lambda: reached(telemetry, 10), timeout_s=COMMAND_S)
        (aggregator,) = children_of(process, "services.aggregator")
        os.kill(aggregator, signal.SIGKILL)  # it is started again and nothing is lost
        code, output = await submitting
        assert code == 0, output
        accuracies = re.search(r"([\d.]+)% -> ([\d.]+)%", output)
        assert accuracies, output
        assert float(accuracies[2]) >= 90.0, output
        assert children_of(process, "services.aggregator") != [aggregator]

        code, output = await seedwire("job", "list")
        assert (code, "ended (finished)" in output) == (0, True), output
        code, output = await seedwire("devices")
        assert code == 0, output
        assert [name in output for name in ("phone", "tablet", "till")] == [True] * 3, output
        code, output = await seedwire("device", "list", "--json")
        identities = {one["device"]: one["state"] for one in json.loads(output)["identities"]}
        assert identities == dict.fromkeys(("phone", "tablet", "till"), "enrolled")
        code, output = await seedwire("device", "revoke", "till")
        assert code == 0, output
        till.terminate()
        await finished(till)
        code, output = await seedwire("job", "stop", "demo")
        assert (code, "demo" in output) == (EXIT_FAILURE, True), output
        code, output = await seedwire("job", "watch", "demo", "--json")
        events = [json.loads(line) for line in output.splitlines()]
        assert events[-1]["type"] == "JobEnded"
        (*_, snapshot) = (one["snapshot"] for one in events if one["type"] == "ModelPublished")
        code, output = await seedwire("blob", "get", snapshot["digest"], str(tmp_path / "s"))
        assert code == 0, output
        assert msgspec.to_builtins(reference(tmp_path / "s")) == snapshot

        job = await shown_job(telemetry)
        assert (job["status"], len(job["rounds"])) == ("ended", 101)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        async with asyncio.timeout(30.0):
            assert await process.wait() == 0
        assert not children_of(process, "services.aggregator")


async def test_who_expects_another_certificate_is_seen_by_the_operator(tmp_path: Path) -> None:
    async with up(tmp_path, "--telemetry-port", "0") as process:
        broker, _ = await announced(process)
        fleet = access.load(tmp_path / "state" / "access.toml")
        bus = await nats_bus.connect(fleet.servers, name="t", credentials=fleet.credentials())
        try:
            async with bus.subscribe(subjects.REFUSED) as deliveries:
                found, _ = await broker_checks.greeting(broker)
                assert [one.state for one in found] == ["ok"]
                with pytest.raises(TimeoutError):  # `seedwire doctor`'s look is no refusal
                    await asyncio.wait_for(anext(deliveries), 1.0)
                with pytest.raises(TransientError, match="CERTIFICATE_VERIFY_FAILED"):
                    await nats_bus.connect([broker], name="stranger", patience_s=1.0)
                async with asyncio.timeout(START_S):
                    seen = decode((await anext(deliveries)).data, ConnectionRefused)
        finally:
            await bus.close()
        assert seen.host == "127.0.0.1"
        assert "it does not trust the certificate, or only tried the port" in seen.reason


def runs(process_id: int) -> bool:
    """Whether the process still does anything: one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def ended(process: asyncio.subprocess.Process) -> str:
    """What it said until it ended over its configuration."""
    async with asyncio.timeout(START_S):
        output, _ = await process.communicate()
    assert process.returncode == EXIT_CONFIG
    return output.decode()


async def test_a_port_that_is_taken_ends_it_with_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for option in ("--port", "--telemetry-port"):
            async with up(tmp_path, option, port) as process:
                assert await ended(process) == (
                    f"error: port {port} is in use (by an earlier `seedwire up`?): stop it or "
                    f"choose {option}\n"
                )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed parent leaves its children")
async def test_a_kill_leaves_nothing_running_and_the_next_start_goes_on(tmp_path: Path) -> None:
    data, model = some_data(tmp_path / "data.jsonl", rows=60), tmp_path / "model.json"
    model.write_text("{}")
    more = ["--device", f"phone={data}", "--engine", "fake", "--telemetry-port", "0"]
    async with up(tmp_path, *more) as process:
        broker, telemetry = await announced(process)
        async with up(tmp_path, *more) as second:
            assert "is in use by another `seedwire up`" in await ended(second)
        line = f"--name demo --model {model} --labels-from {data} --engine fake --rounds 10000"
        code, output = await seedwire("job", "submit", *line.split(), "--servers", broker)
        assert code == 0, output
        await wait_until(lambda: reached(telemetry, 5), timeout_s=COMMAND_S)
        children = children_of(process)
        assert len(children) == 6  # broker, aggregator, scheduler, telemetry, registrar, phone
        process.kill()
        async with up(tmp_path, *more) as following:
            broker, telemetry = await announced(following)
            assert not [child for child in children if runs(child)]
            await wait_until(lambda: reached(telemetry, 5), timeout_s=COMMAND_S)
            before: int = (await shown_job(telemetry))["round"]
            await wait_until(lambda: reached(telemetry, before + 5), timeout_s=COMMAND_S)
