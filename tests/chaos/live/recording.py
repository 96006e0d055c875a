"""What a bystander at the broker sees: the streams as they are, and what passes on the way."""

import asyncio
import json
import time
from dataclasses import dataclass
from datetime import datetime

import nats
from nats.aio.client import Client

from shared import subjects
from shared.bus import SEQUENCE_HEADER, Bus

STREAMS = (subjects.LOG_STREAM, subjects.DETAIL_STREAM)
SAID = (subjects.ALL_UPDATES, subjects.ALL_SETTLED, subjects.ALL_REPORTS)
PAGE = 256


@dataclass(frozen=True)
class Entry:
    """One message of a stream, and when the broker took it, by the machine's clock."""

    sequence: int
    subject: str
    data: bytes
    at_ns: int


Copy = dict[str, list[Entry]]
"""By stream."""


@dataclass(frozen=True)
class Heard:
    """One message that passed."""

    subject: str
    data: bytes
    at_ns: int


class Recorder:
    """Keeps what is republished and what is said; it may miss what passes while it reconnects."""

    def __init__(self) -> None:
        self.facts: dict[int, bytes] = {}
        """By sequence of LOG: what the broker said that it had accepted."""
        self.heard: list[Heard] = []

    async def hear(self, bus: Bus) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._facts(bus))
            for subject in SAID:
                tasks.create_task(self._said(bus, subject))

    async def _facts(self, bus: Bus) -> None:
        async with bus.subscribe(subjects.ALL_EVENTS, limit=100_000) as deliveries:
            async for delivery in deliveries:
                self.facts[int(delivery.headers[SEQUENCE_HEADER])] = delivery.data

    async def _said(self, bus: Bus, subject: str) -> None:
        async with bus.subscribe(subject, limit=100_000) as deliveries:
            async for delivery in deliveries:
                self.heard.append(Heard(delivery.subject, delivery.data, time.time_ns()))


async def copied(url: str) -> Copy:
    """Every message of LOG and DETAIL, through a connection of its own.

    Raises:
        OSError, nats.errors.Error: the broker is not there.
    """
    client = await nats.connect(url, allow_reconnect=False, connect_timeout=5)
    try:
        return {stream: await _stream(client, stream) for stream in STREAMS}
    finally:
        await client.close()


async def _stream(client: Client, stream: str) -> list[Entry]:
    found: list[Entry] = []
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox, pending_msgs_limit=-1, pending_bytes_limit=-1)
    while True:
        last = found[-1].sequence if found else 0
        request = {"seq": last + 1, "next_by_subj": ">", "batch": PAGE}
        await client.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(request).encode(), inbox)
        while True:
            answer = await answers.next_msg(timeout=10)
            headers = answer.headers or {}
            if status := headers.get("Status"):
                break
            found.append(
                Entry(
                    int(headers["Nats-Sequence"]),
                    headers["Nats-Subject"],
                    answer.data,
                    _ns(headers["Nats-Time-Stamp"]),
                )
            )
        if status != "204" or headers.get("Nats-Num-Pending") == "0":
            return found


def _ns(stamp: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 stamp."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    return seconds * 1_000_000_000 + int(fraction.ljust(9, "0")[:9] or "0")
