"""What a supervisor hears of a real daemon: systemd's datagrams, and the file of a health check."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.runtime import EXIT_CONFIG
from tests.deploy.listener import Listener
from tests.support.broker import BrokerProcess, start_broker
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
WATCHDOG_S = 0.9
SILENT_S = 2 * WATCHDOG_S

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")


@asynccontextmanager
async def daemon(
    path: Path, url: str, **variables: str
) -> AsyncGenerator[asyncio.subprocess.Process, None]:
    """A device's daemon with this environment; it is gone at the end."""
    data = path / "rows.jsonl"
    data.write_text('{"text": "a pear of mine", "label": "fruit"}\n')
    settings = {"DEVICE": "till", "SERVERS": url, "DATA": str(data), "ENGINE": "fake"}
    settings["STATE_DIR"] = str(path / "state")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge_client"),
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("SEEDWIRE_")},
            **{f"SEEDWIRE_EDGE_{name}": value for name, value in settings.items()},
            "PYTHONPATH": str(ROOT),
            **variables,
        },
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def healthcheck(*arguments: str, **variables: str) -> tuple[int, str]:
    """Exit code and words of an image's probe."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "shared.heartbeat", *arguments),
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


@pytest.mark.parametrize("namespace", ["file system", "abstract"])
async def test_systemd_hears_ready_then_signs_of_life_then_stopping(
    tmp_path: Path, broker: BrokerProcess, namespace: str
) -> None:
    name = tmp_path.name
    listener = Listener(
        f"@seedwire-{name}" if namespace == "abstract" else str(tmp_path / "notify")
    )
    variables = {
        "NOTIFY_SOCKET": listener.address,
        "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
    }
    async with daemon(tmp_path, broker.url, **variables) as process:
        await wait_until(lambda: listener.said("READY=1"), timeout_s=20)
        await wait_until(lambda: listener.said("STATUS=connected"), timeout_s=20)
        listener.listen()
        await asyncio.sleep(WATCHDOG_S)
        assert listener.listen() >= 2
        assert listener.heard[-1].startswith("WATCHDOG=1\n")

        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.1)
        listener.listen()
        await asyncio.sleep(SILENT_S)
        assert listener.listen() == 0  # systemd would end it now
        process.send_signal(signal.SIGCONT)
        await wait_until(lambda: listener.listen() > 0, timeout_s=5)

        process.terminate()
        await wait_until(lambda: listener.said("STOPPING=1"), timeout_s=5)
        assert await process.wait() == 0
    listener.close()


async def test_a_device_without_a_broker_has_started_and_says_what_it_waits_for(
    tmp_path: Path,
) -> None:
    listener = Listener(str(tmp_path / "notify"))
    nowhere = "nats://127.0.0.1:1"
    async with daemon(tmp_path, nowhere, NOTIFY_SOCKET=listener.address) as process:
        await wait_until(lambda: listener.said("READY=1"), timeout_s=20)
        assert listener.said("STATUS=waiting for the broker")
        process.terminate()
        assert await process.wait() == 0
    listener.close()


async def test_a_setting_that_cannot_be_used_fails_the_start_and_not_later(tmp_path: Path) -> None:
    listener = Listener(str(tmp_path / "notify"))
    variables = {"NOTIFY_SOCKET": listener.address, "SEEDWIRE_EDGE_CREDS_FILE": "/no/such.creds"}
    async with daemon(tmp_path, "nats://127.0.0.1:1", **variables) as process:
        assert await process.wait() == EXIT_CONFIG
        assert not listener.said("READY=1")
    listener.close()


async def test_a_watchdog_that_is_meant_for_another_process_gets_no_faster_beat(
    tmp_path: Path, broker: BrokerProcess
) -> None:
    listener = Listener(str(tmp_path / "notify"))
    variables = {
        "NOTIFY_SOCKET": listener.address,
        "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
        "WATCHDOG_PID": "1",
    }
    async with daemon(tmp_path, broker.url, **variables):
        await wait_until(lambda: listener.said("READY=1"), timeout_s=20)
        listener.listen()
        await asyncio.sleep(SILENT_S)
        assert listener.listen() == 0
    listener.close()


async def test_the_health_check_of_a_device_tells_connected_from_offline_and_from_hung(
    tmp_path: Path,
) -> None:
    health = tmp_path / "health"
    variables = {"SEEDWIRE_EDGE_HEALTH_FILE": str(health)}
    beats = {**variables, "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
    code, words = await healthcheck(**variables)
    assert (code, "no heartbeat" in words) == (1, True), words
    async with (
        start_broker(tmp_path / "broker") as broker,
        daemon(tmp_path, broker.url, **beats) as process,
    ):

        async def says(code: int, words: str, *options: str) -> bool:
            found = await healthcheck(*options, **variables)
            return (found[0], words in found[1]) == (code, True)

        await wait_until(lambda: says(0, "connected; no job"), timeout_s=30)
        process.send_signal(signal.SIGSTOP)
        await wait_until(lambda: says(1, "it hangs", "--alive"), timeout_s=10)
        process.send_signal(signal.SIGCONT)
        await wait_until(lambda: says(0, "connected"), timeout_s=10)
        await broker.stop()
        await wait_until(lambda: says(1, "waiting for the broker"), timeout_s=10)
        assert await says(0, "waiting for the broker", "--alive")


async def test_a_health_file_that_cannot_be_written_is_a_configuration_error(
    tmp_path: Path,
) -> None:
    missing = {"SEEDWIRE_EDGE_HEALTH_FILE": "/no/such/directory/health"}
    async with daemon(tmp_path, "nats://127.0.0.1:1", **missing) as process:
        assert process.stderr is not None
        words = (await process.stderr.read()).decode()
        assert await process.wait() == EXIT_CONFIG
    assert "health_file /no/such/directory/health" in words
