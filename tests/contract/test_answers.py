"""Who asks says where the answer goes: no service, and not the broker, may write there for it."""

import asyncio
import ssl
from pathlib import Path

import pytest
from nats.aio.client import Client

from shared import nats_bus, subjects
from shared.broker import BrokerProcess
from shared.bus import Delivery
from shared.codec import encode
from shared.identity.access import TLS_NAME
from shared.log import LogWriter, ensure_streams
from shared.messages import Enroll, JobEnded
from tests.support.secured import secured
from tests.support.waiting import wait_until

NOT_INBOXES = [subjects.log("victim"), subjects.settled("other"), "$JS.API.STREAM.DELETE.LOG", ">"]


async def test_an_answer_goes_to_inboxes_alone(broker: BrokerProcess) -> None:
    bus = await nats_bus.connect([broker.url], name="service")
    client = Client()
    await client.connect(broker.url)
    got: list[Delivery] = []
    async with bus.subscribe("ask.*") as deliveries:
        for reply in [*NOT_INBOXES, "_INBOX.a.b", "_INBOX_till-7.a.b"]:
            await client.publish("ask.me", b"", reply=reply)
        await client.flush()
        async for delivery in deliveries:
            got.append(delivery)
            if len(got) == len(NOT_INBOXES) + 2:
                break
    assert [one.reply for one in got] == [
        *[""] * len(NOT_INBOXES),
        "_INBOX.a.b",
        "_INBOX_till-7.a.b",
    ]
    await client.close()
    await bus.close()


async def test_a_stranger_makes_no_service_write_to_the_log(tmp_path: Path) -> None:
    async with secured(tmp_path) as fleet:
        service = await fleet.connect(fleet.authority.creds("aggregator"))
        await ensure_streams(service)
        registrar = await fleet.start_registrar()
        stranger = Client()
        await stranger.connect(
            fleet.broker.url,
            tls=ssl.create_default_context(cafile=str(fleet.authority.ca_file)),
            tls_hostname=TLS_NAME,
            inbox_prefix="_INBOX_joiner",
        )
        knock = encode(Enroll(device="x", public_key="U" + "A" * 55, secret="a" * 22))
        async with asyncio.timeout(20):  # until the registrar answers
            while True:
                try:
                    await stranger.request(subjects.ENROLL, knock, timeout=1)
                    break
                except (TimeoutError, Exception):  # noqa: BLE001  nats-py's own of many kinds
                    await asyncio.sleep(0.05)
        for _ in range(5):
            await stranger.publish(subjects.ENROLL, knock, reply=subjects.log("victim"))
        await stranger.request(subjects.ENROLL, knock, timeout=5)  # those before were handled
        assert await service.last_sequence(subjects.LOG_STREAM) == 0
        assert registrar.running
        await stranger.close()
        await service.close()


@pytest.mark.parametrize("reply", [subjects.log("victim"), "$JS.API.STREAM.DELETE.LOG"])
async def test_a_device_makes_the_broker_write_or_delete_nothing(
    tmp_path: Path, reply: str
) -> None:
    async with secured(tmp_path) as fleet:
        service = await fleet.connect(fleet.authority.creds("aggregator"))
        await ensure_streams(service)
        writer = await LogWriter.open(service, subjects.LOG_STREAM)
        event = JobEnded(job="a", epoch=0, round=3, reason="finished", digest="0" * 64)
        last = await writer.append("a", event)
        device = await fleet.connect(fleet.device_creds("till-7"))
        await device.send("$JS.API.DIRECT.GET.LOG", b'{"seq": 99}', reply=reply)
        await device.flush()
        await asyncio.sleep(0.5)
        try:
            assert await service.last_sequence(subjects.LOG_STREAM) == last
        finally:
            await device.close()
            await service.close()


BAD_HEADERS = [
    b"NATS/1.0",
    b"x",
    b"NATS/1.0\r\n\xff\xfe: \xff\r\n\r\n",
    b"NATS/1.0\r\nno colon\r\n\r\n",
    b"NATS/1.0\r\n: empty\r\n\r\n",
    b"NATS/1.0 503 \xff\r\n\r\n",
    b"NATS/9.9\r\n\r\n",
    b"\0" * 40,
    b"NATS/1.0\r\n" + b"a: b\r\n" * 2000 + b"\r\n",
    b"NATS/1.0\r\nSeedwire-Key: " + b"x" * 60_000 + b"\r\n\r\n",
]


async def test_headers_that_are_none_cost_a_subscriber_nothing_else(broker: BrokerProcess) -> None:
    bus = await nats_bus.connect([broker.url], name="service")
    got: list[bytes] = []
    async with bus.subscribe("ask.*") as deliveries:

        async def hear() -> None:
            async for delivery in deliveries:
                got.append(delivery.data)  # noqa: PERF401  it is looked at meanwhile

        hearing = asyncio.create_task(hear())
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
        await reader.readline()
        writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
        for headers in BAD_HEADERS:
            size = len(headers)
            writer.write(b"HPUB ask.me %d %d\r\n%s%s\r\n" % (size, size + 3, headers, b"bad"))
        writer.write(b"PUB ask.me 4\r\ngood\r\n")
        await writer.drain()
        await wait_until(lambda: b"good" in got, timeout_s=10, what=str(got))
        hearing.cancel()
        writer.close()
    await bus.close()
