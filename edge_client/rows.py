"""The device's rows: where they lie, how many there are, and what has come since.

A name on the hub is fetched by a child process. A directory is looked at every few seconds; the
engine reads what is new, here it is only counted.
"""

import asyncio
from collections.abc import Awaitable, Callable

from edge_client.config import Settings
from edge_client.reporting import About
from shared.clock import Clock, backoff_s
from shared.dataset import Counted
from shared.errors import ConfigError, EngineError, TransientError
from shared.hub import fetch_in_child, is_hub_name
from shared.logs import get

LOOK_S = 5.0
"""Between two looks at a directory."""
HUB_FIRST_S, HUB_CAP_S = 10.0, 600.0
"""Pauses between tries to fetch a name from the hub."""

log = get("rows")


class Rows:
    """`data` and `heldout` are paths here, empty where there are none (yet)."""

    def __init__(
        self, settings: Settings, about: About, clock: Clock, grown: Callable[[], Awaitable[bool]]
    ) -> None:
        """`grown` lets the engine see what has changed; False where it holds no job."""
        self._about = about
        self._clock = clock
        self._grown = grown
        names = {"data": settings.data, "heldout": settings.heldout if settings.evaluates else ""}
        self._wanted = {setting: name for setting, name in names.items() if is_hub_name(name)}
        self._paths = {
            setting: name for setting, name in names.items() if name and setting not in self._wanted
        }
        self._counted: dict[str, Counted] = {}

    @property
    def data(self) -> str:
        return self._paths.get("data", "")

    @property
    def heldout(self) -> str:
        return self._paths.get("heldout", "")

    async def count(self) -> None:
        """What is here is counted; the engine's word is better where it has read it."""
        if self._paths:
            await asyncio.to_thread(self._look)
            self._tell()

    async def keep(self) -> None:
        """Fetch what is on the hub, then follow directories."""
        for setting, name in self._wanted.items():
            self._paths[setting] = await self._fetched(setting, name)
            await self.count()
        while any(counted.is_directory for counted in self._counted.values()):
            await self._clock.sleep(LOOK_S)
            if await asyncio.to_thread(self._look) and not await self._grown():
                self._tell()

    async def _fetched(self, setting: str, name: str) -> str:
        tries = 0
        while True:
            self._about.problem(setting, f"{setting}: fetching {name}")
            try:
                path = await fetch_in_child(name)
            except (ConfigError, TransientError) as error:
                self._about.problem(setting, f"{setting}: {error}")
                log.warning("rows_not_fetched", setting=setting, why=str(error))
                await self._clock.sleep(backoff_s(tries, first_s=HUB_FIRST_S, cap_s=HUB_CAP_S))
                tries += 1
            else:
                self._about.problem(setting, "")
                log.info("rows_fetched", setting=setting, path=str(path))
                return str(path)

    def _look(self) -> bool:
        """Count what is new; whether anything has changed. Blocks."""
        changed = False
        for setting, path in self._paths.items():
            try:
                if setting in self._counted:
                    changed |= self._counted[setting].look()
                else:
                    self._counted[setting] = Counted(path)
            except EngineError as error:
                log.warning("data_unreadable", path=path, why=str(error))
        return changed

    def _tell(self) -> None:
        data, heldout = self._counted.get("data"), self._counted.get("heldout")
        self._about.counted(data.records if data else 0, heldout.records if heldout else 0)
