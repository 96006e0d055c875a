"""HTTP to one server: so many requests at a time, tried again while the world fails, then given up.

A server that is busy (429), loading or restarting (502, 503, 504) or away is asked again; whatever
else it refuses is told at once, in its own words.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
import msgspec

from services.proxy_inference.remote.reading import refusal
from shared.clock import Clock, SystemClock, backoff_s
from shared.errors import ConfigError, EngineError, TransientError
from shared.logs import get

log = get("remote")

_AGAIN = frozenset({429, 502, 503, 504})
_MOST_BYTES = 64 * 2**20
_CONNECT_S = 5.0
_LONGEST_WAIT_S = 10.0


class Refused(EngineError):
    """The server answered, and would not: its status and its words."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for."""

    answer_s: float = 60.0
    """One answer."""
    give_up_s: float = 30.0
    """From the first failure on: after this, no other try begins."""


PATIENT = Patience()


class Link:
    """A server's address, and how it is asked. Use `opened`."""

    def __init__(
        self,
        url: str,
        http: aiohttp.ClientSession,
        *,
        at_once: int,
        patience: Patience,
        clock: Clock,
    ) -> None:
        self.url = url
        self.root = url.removesuffix("/v1")
        self.retries = 0
        """Requests that were sent again."""
        self._http = http
        self._away = False
        """Whether it has been said that the server does not answer."""
        self._places = asyncio.Semaphore(at_once)
        self._patience = patience
        self._clock = clock

    async def get(self, path: str) -> bytes:
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: dict[str, object]) -> bytes:
        """The body of a 200.

        Raises:
            Refused: any other answer that waiting would not change.
            TransientError: no answer within our patience; names the server and the last failure.
        """
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: dict[str, object] | None) -> bytes:
        data = None if body is None else msgspec.json.encode(body)
        clock, attempt = self._clock, 0
        first_failure: float | None = None
        while True:
            async with self._places:
                try:
                    found = await self._once(method, path, data)
                except TransientError as error:
                    why, wanted_s = str(error), error.delay_s
                else:
                    self._away = False
                    return found
            now = clock.now()
            first_failure = now if first_failure is None else first_failure
            delay_s = max(backoff_s(attempt, first_s=0.1, cap_s=5.0), wanted_s)
            if now + delay_s - first_failure > self._patience.give_up_s:
                raise TransientError(
                    f"the large model at {self.url} gave no answer in {attempt + 1} tries: {why}"
                )
            if not self._away:
                self._away = True
                log.warning("large_model_waited_for", url=self.url, why=why)
            self.retries += 1
            attempt += 1
            await clock.sleep(delay_s)

    async def _once(self, method: str, path: str, data: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            async with self._http.request(
                method, self.root + path, data=data, headers=headers, allow_redirects=False
            ) as response:
                found = await response.content.read(_MOST_BYTES + 1)
                while not response.content.at_eof() and len(found) <= _MOST_BYTES:
                    found += await response.content.read(_MOST_BYTES + 1 - len(found))
        except TimeoutError as error:
            raise TransientError(f"none within {self._patience.answer_s:g} s", delay_s=0) from error
        except (aiohttp.ClientError, OSError) as error:
            raise TransientError(str(error) or type(error).__name__, delay_s=0) from error
        if len(found) > _MOST_BYTES:
            raise EngineError(f"{self.url}: an answer of more than {_MOST_BYTES} bytes")
        if response.status == 200:
            return found
        why = f"HTTP {response.status}: {refusal(found)}"
        if response.status in _AGAIN:
            raise TransientError(why, delay_s=_seconds(response.headers.get("Retry-After")))
        raise Refused(f"the large model at {self.url} refused ({why})", response.status)


@asynccontextmanager
async def opened(
    url: str,
    key: str,
    *,
    at_once: int = 16,
    patience: Patience = PATIENT,
    clock: Clock | None = None,
) -> AsyncGenerator[Link]:
    """A link to the server at `url`, http(s)://HOST[:PORT][/...]/v1; `key` goes with every request.

    Raises:
        ConfigError: that is no such address.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(
        total=patience.answer_s, sock_connect=min(_CONNECT_S, patience.answer_s)
    )
    connector = aiohttp.TCPConnector(limit=0)  # `at_once` is the limit: waiting takes no answer_s
    address = checked(url)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=timeout
    ) as session:
        yield Link(
            address, session, at_once=at_once, patience=patience, clock=clock or SystemClock()
        )


def checked(url: str) -> str:
    """The address without a trailing slash, ending in /v1.

    Raises:
        ConfigError: it is not one of an HTTP server, or it holds a password.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ConfigError("--large: no address; give it as http://HOST:PORT/v1") from None
    if parts.username or parts.password:
        raise ConfigError("--large: the address holds a key; give the key with --large-key")
    if not good or parts.query or parts.fragment:
        raise ConfigError(f"--large {url}: no address; give it as http://HOST:PORT/v1")
    bare = url.rstrip("/")
    return bare if bare.endswith("/v1") else f"{bare}/v1"


def _seconds(retry_after: str | None) -> float:
    """What a server asks to wait, within reason; 0 where it names no number."""
    try:
        return min(max(float(retry_after or 0), 0.0), _LONGEST_WAIT_S)
    except ValueError:
        return 0.0
