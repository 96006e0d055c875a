"""A real browser without a window, driven by its DevTools protocol: `async with chromium(path)`."""

import asyncio
import base64
import contextlib
import itertools
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

START_S, ANSWER_S = 30.0, 30.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


def find_chromium() -> str | None:
    """The browser's path; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


class Page:
    """One tab. What it complains of on its console, or refuses to load, is in `complaints`."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        self.requested: list[str] = []
        """Every address that it asked for."""

    async def listen(self) -> None:
        """Take in answers and events until the tab is closed."""
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
            elif event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(str(event["params"]))
            elif event["method"] == "Network.requestWillBeSent":
                self.requested.append(event["params"]["request"]["url"])

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        """The result of one command of the protocol."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(ANSWER_S):
            event = await answer
        assert "error" not in event, event
        return event["result"]

    async def size(self, width: int, height: int) -> None:
        """The window is so large; a phone's has touch and two dots a pixel."""
        phone = width < 500
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    async def prefer(self, **features: str) -> None:
        """What the reader's system prefers: `color_scheme="dark"`."""
        wanted = [
            {"name": f"prefers-{name.replace('_', '-')}", "value": value}
            for name, value in features.items()
        ]
        await self.call("Emulation.setEmulatedMedia", features=wanted)

    async def go(self, url: str) -> None:
        await self.call("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """What the page's JavaScript makes of the expression."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def press(self, key: str) -> None:
        """A key goes down and up where the focus is."""
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    async def picture(self, path: Path, *, whole: bool = True) -> Path:
        """A PNG of the page, of all that can be scrolled to if `whole`."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(shot["data"]))
        return path


@asynccontextmanager
async def chromium(folder: Path) -> AsyncGenerator[Page, None]:
    """A tab of a browser of its own, with its profile below `folder`; gone at the end."""
    program = find_chromium()
    assert program, "there is no chromium: ask find_chromium first"
    profile = folder / "profile"
    process = await asyncio.create_subprocess_exec(
        program,
        *FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        port = await asyncio.to_thread(_port, profile / "DevToolsActivePort")
        async with (
            ClientSession() as client,
            client.ws_connect(await _tab(client, port), max_msg_size=2**27) as socket,
        ):
            page = Page(socket)
            listening = asyncio.create_task(page.listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            try:
                yield page
            finally:
                await socket.close()
                await listening
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def _port(file: Path) -> int:
    """What the browser wrote down when it was ready."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(file.read_text(encoding="ascii").splitlines()[0])
        time.sleep(0.02)
    raise AssertionError(f"chromium was not ready within {START_S:g} s")


async def _tab(client: ClientSession, port: int) -> str:
    """The address of the first tab's socket."""
    async with asyncio.timeout(START_S):
        while True:
            async with client.get(f"http://127.0.0.1:{port}/json/list") as response:
                tabs = [one for one in await response.json() if one["type"] == "page"]
            if tabs:
                return tabs[0]["webSocketDebuggerUrl"]
            await asyncio.sleep(0.05)
