"""A proxy as a real process: `async with a_proxy(folder, "--model", path) as proxy`."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from deploy.demo.processes import Child
from tests.support.waiting import wait_until

NOWHERE = "nats://127.0.0.1:9"
"""No broker listens here."""


@dataclass
class Proxy:
    """A running proxy."""

    child: Child
    url: str
    http: aiohttp.ClientSession

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as response:
            return response.status, await response.json()

    async def post(self, path: str, body: object = None) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body or {}) as response:
            return response.status, await response.json()

    async def complete(self, prompt: object, **more: object) -> Any:
        """The answer to a greedy completion."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 12} | more
        status, answer = await self.post("/v1/completions", body)
        assert status == 200, answer
        return answer

    async def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        async with self.http.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert found, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    async def until(self, name: str, least: float, most: float = float("inf")) -> None:
        """Return when a metric lies between `least` and `most`."""

        async def there() -> bool:
            return least <= await self.metric(name) <= most

        await wait_until(there, timeout_s=15, what=name)

    async def serves(self, model: str) -> None:
        """Return when requests that name no model get this one."""
        while True:
            status, answer = await self.get("/health")
            if status == 200 and answer["model"] == model:
                return
            await asyncio.sleep(0.02)


@asynccontextmanager
async def a_proxy(folder: Path, *arguments: str) -> AsyncGenerator[Proxy, None]:
    """A proxy with its state below `folder`; stopped at the end, with the exit code 0."""
    log, start = _log(folder)
    more = ["--port", "0", "--state-dir", str(folder / "state"), "--threads", "1"]
    if "--servers" not in arguments:
        more += ["--servers", NOWHERE]
    child = Child("proxy", "services.proxy_inference", [*more, *arguments], log)
    await child.start()
    async with aiohttp.ClientSession() as http:
        try:
            port = await _port(child, log, start)
            yield Proxy(child, f"http://127.0.0.1:{port}", http)
        finally:
            code = await child.stop(timeout_s=25)
    assert code in (0, -9), log.read_text(errors="replace")[-3000:]


def _log(folder: Path) -> tuple[Path, int]:
    """The proxy's log, and how long it is from earlier runs."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "proxy.log"
    return log, log.stat().st_size if log.exists() else 0


async def _port(child: Child, log: Path, start: int) -> int:
    while not (found := _listening(log, start)):
        assert child.running, log.read_text(errors="replace")[-3000:]  # noqa: ASYNC240
        await asyncio.sleep(0.02)
    return found


def _listening(log: Path, start: int) -> int:
    """The port that the log tells, 0 if it does not yet."""
    for line in log.read_bytes()[start:].decode(errors="replace").splitlines():
        if '"event": "listening"' in line and line.endswith("}"):
            return int(json.loads(line)["port"])
    return 0
