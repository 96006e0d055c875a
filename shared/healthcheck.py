"""`python -m shared.healthcheck SERVICE`: exit 0 if the service in this container does its work.

It is asked as its users ask it: over HTTP if it has a port, else over the broker, with the same
settings from the environment. An edge daemon answers nobody: see `heartbeat`.

`--alive` asks for less: that the process does not hang. A broker that cannot be reached is then no
fault, so that its outage restarts nothing.
"""

import asyncio
import http.client
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from shared import config, logs, subjects
from shared.codec import encode
from shared.errors import ConfigError, TransientError
from shared.messages import ListDevices, ListIdentities, ListJobs, Message
from shared.service import HttpSettings, ServiceSettings

CONNECT_S = 4.0
ANSWER_S = 4.0
EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on

ASKED: Mapping[str, tuple[str, Message]] = {
    "aggregator": (subjects.JOB_LIST, ListJobs()),
    "scheduler": (subjects.DEVICE_LIST, ListDevices()),
    "registrar": (subjects.IDENTITY_LIST, ListIdentities()),
}


@dataclass(frozen=True, slots=True)
class Pages:
    port: int
    ready: str
    alive: str


PAGES: Mapping[str, Pages] = {
    "telemetry": Pages(9464, "/readyz", "/healthz"),
    "proxy_inference": Pages(8080, "/health", "/healthz"),
}
NAMES = (*ASKED, *PAGES)


class Unhealthy(Exception):
    """It does not do its work, or does not show that it does."""


def main(arguments: list[str]) -> int:
    """The exit code; why is on standard output, where container engines keep it."""
    names = [one for one in arguments if one != "--alive"]
    if len(names) != 1 or names[0] not in NAMES:
        sys.stderr.write(f"usage: python -m shared.healthcheck {'|'.join(NAMES)} [--alive]\n")
        return 1
    (name,) = names
    logs.configure("healthcheck", level="critical")
    try:
        said = check(name, only_alive="--alive" in arguments)
    except (Unhealthy, ConfigError) as error:
        sys.stdout.write(f"{name}: {error}\n")
        return 1
    sys.stdout.write(f"{name}: {said}\n")
    return 0


def check(name: str, *, only_alive: bool) -> str:
    """What the service `name` says of itself.

    Raises:
        Unhealthy: it does not.
        ConfigError: a setting of it is wrong.
    """
    prefix = f"SEEDWIRE_{name.upper()}"
    settings = config.load(HttpSettings, program="healthcheck", prefix=prefix, argv=[])
    if name in PAGES:
        pages = PAGES[name]
        host = "127.0.0.1" if settings.host in EVERYWHERE else settings.host
        return _page(host, settings.port or pages.port, pages.alive if only_alive else pages.ready)
    return asyncio.run(_answer(settings, *ASKED[name], only_alive=only_alive))


def _page(host: str, port: int, path: str) -> str:
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read(2000).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        raise Unhealthy(f"no answer from {host}:{port}{path}: {error or 'time-out'}") from error
    finally:
        connection.close()
    if response.status >= 400:
        raise Unhealthy(f"{path} says {response.status}: {text}")
    return text


async def _answer(
    settings: ServiceSettings, subject: str, question: Message, *, only_alive: bool
) -> str:
    # Here alone: the probe of a page needs no broker client.
    from shared import nats_bus
    from shared.jetstream_api import NoResponders

    try:
        async with asyncio.timeout(CONNECT_S):
            bus = await nats_bus.connect(
                list(settings.servers), name="healthcheck", credentials=settings.credentials
            )
    except TimeoutError as error:
        if only_alive:
            return "the broker cannot be asked"
        raise Unhealthy(f"no broker answers within {CONNECT_S:g} s") from error
    try:
        answer = await bus.request(subject, encode(question), timeout_s=ANSWER_S)
    except NoResponders as error:  # it replays its log, or is itself looking for the broker
        if only_alive:
            return "not serving yet"
        raise Unhealthy(str(error)) from error
    except TransientError as error:
        raise Unhealthy(str(error)) from error
    finally:
        await bus.close()
    return f"answers with {len(answer)} bytes"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
