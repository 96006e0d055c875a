"""`python -m tests.chaos.abuse.flood URL DEVICE CREDS CA RATE`: one device that says all it may.

On every subject of its own, RATE messages a second in all, for ever: well-formed requests and
reports, updates of rounds that never were, and bytes that are nothing. By nats-py alone.
"""

import asyncio
import ssl
import sys
import time
from itertools import cycle

from nats.aio.client import Client

from shared import subjects
from shared.codec import encode
from shared.identity.access import TLS_NAME
from shared.messages import ProbeResult, RequestWork, SubmitUpdate, UpdateKey
from tests.support.facts import device_report

BURSTS_A_SECOND = 20


def said(device: str, job: str) -> list[tuple[str, bytes]]:
    """What it says over and over."""
    report = device_report(device, trusted=True)
    updates = [
        SubmitUpdate(
            key=UpdateKey(job, 0, 2**32 - 2, device, part),
            digest="0" * 64,
            result=ProbeResult("probe", [(0, 1)], b"\0" * 4, b"", 0, 1),
            work_s=0.0,
        )
        for part in range(2)
    ]
    return [
        (subjects.work(device), encode(RequestWork(device=device, kinds=["probe"]))),
        (subjects.work(device), b"\xc1" * 100),
        (subjects.report(device), encode(report)),
        (subjects.report(device), b""),
        *((subjects.update(job, device), encode(update)) for update in updates),
        (subjects.update(job, device), b"\x91" * 1000),
        (subjects.update("unknown", device), b"\0" * 10_000),
    ]


async def main(url: str, device: str, creds: str, ca: str, rate: str) -> None:
    client = Client()
    await client.connect(
        url,
        tls=ssl.create_default_context(cafile=ca),
        tls_hostname=TLS_NAME,
        user_credentials=creds,
        inbox_prefix=f"_INBOX_{device}",
    )
    messages = said(device, "demo")
    burst = [message for message, _ in zip(cycle(messages), range(int(rate) // BURSTS_A_SECOND))]
    while True:
        next_at = time.monotonic() + 1 / BURSTS_A_SECOND
        for subject, data in burst:
            await client.publish(subject, data, reply=f"_INBOX_{device}.a.1")
        await client.flush(60)
        await asyncio.sleep(max(0.0, next_at - time.monotonic()))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
