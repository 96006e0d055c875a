"""Who asks says where the answer goes: no service, and not the broker, may write there for it."""

import asyncio
import itertools
import ssl
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest
from msgspec.structs import replace
from nats.aio.client import Client

from shared import nats_bus, subjects
from shared.broker import BrokerProcess
from shared.bus import Delivery
from shared.codec import encode
from shared.identity.access import TLS_NAME
from shared.identity.roles import heard_as
from shared.log import ensure_streams, follow
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
        for reply in [subjects.log("victim"), *NOT_INBOXES[:-1], "$JS.API.STREAM.PURGE.LOG"]:
            await stranger.publish(subjects.ENROLL, knock, reply=reply)
        await stranger.request(subjects.ENROLL, knock, timeout=5)  # those before were handled
        assert await service.last_sequence(subjects.LOG_STREAM) == 0
        assert registrar.running
        await stranger.close()
        await service.close()


OF_THE_FLEET = [
    subjects.log("victim"),
    subjects.detail("victim"),
    subjects.blob("0" * 64, 0),
    subjects.update("mail", "other"),
    subjects.report("other"),
    subjects.work("other"),
    subjects.settled("other"),
    subjects.events("mail"),
    subjects.JOB_STOP,
    subjects.IDENTITY_REVOKE,
    "_INBOX_aggregator.a.1",
    "$JS.API.STREAM.PURGE.LOG",
    "$JS.API.STREAM.DELETE.LOG",
]
QUESTIONS = {
    "$JS.API.DIRECT.GET.LOG": [b'{"seq": 1}', b'{"seq": 99}', b'{"batch": 9, "seq": 1}'],
    f"$JS.API.DIRECT.GET.LOG.{subjects.log('mail')}": [b""],
    "$JS.API.DIRECT.GET.BLOBS": [b'{"seq": 1}'],
}


def ended(round_number: int) -> JobEnded:
    return JobEnded(job="mail", epoch=0, round=round_number, reason="stopped", digest="0" * 64)


@pytest.mark.parametrize("who", ["till-7", "outsider"])
async def test_nobody_makes_the_broker_write_or_delete_what_he_may_not(
    tmp_path: Path, who: str
) -> None:
    async with secured(tmp_path) as fleet:
        service = await fleet.connect(fleet.authority.creds("aggregator"))
        await ensure_streams(service)
        await service.append(subjects.log("mail"), encode(ended(1)), stream="LOG")
        if who == "outsider":
            login = fleet.trusting(fleet.authority.creds(who), inbox_prefix="_INBOX")
        else:
            login = fleet.trusting(fleet.device_creds(who))
        guest = await nats_bus.connect([fleet.broker.url], name=who, credentials=login)
        heard: list[str] = []
        async with service.subscribe(">") as everything:

            async def hear() -> None:
                async for delivery in everything:
                    heard.append(delivery.subject)  # noqa: PERF401  it is looked at meanwhile

            hearing = asyncio.create_task(hear())
            for reply, (subject, bodies) in itertools.product(OF_THE_FLEET, QUESTIONS.items()):
                for body in bodies:
                    await guest.send(subject, body, reply=reply)
            # Who asks as one should gets an answer, and all those before were answered.
            assert await guest.get_last("LOG", subjects.log("mail")) is not None
            await service.publish("the.last", b"")
            await wait_until(lambda: "the.last" in heard, what=str(heard))
            hearing.cancel()
        assert not set(heard) & set(OF_THE_FLEET)
        assert sum(one.startswith("$JS.API.DIRECT.GET.") for one in heard) > len(OF_THE_FLEET)
        assert await service.last_sequence(subjects.LOG_STREAM) == 1
        await guest.close()
        await service.close()


async def test_a_device_sends_nothing_into_the_ears_of_another(tmp_path: Path) -> None:
    ears = [subjects.events("mail"), subjects.wake("till-8"), subjects.settled("till-8")]
    async with secured(tmp_path) as fleet:
        service = await fleet.connect(fleet.authority.creds("aggregator"))
        await ensure_streams(service)
        await service.append(subjects.log("mail"), encode(ended(1)), stream="LOG")
        evil = await fleet.connect(fleet.device_creds("till-7"))
        honest = await fleet.connect(fleet.device_creds("till-8"))
        async with AsyncExitStack() as stack:
            listening = [await stack.enter_async_context(honest.subscribe(one)) for one in ears]
            for reply in [*ears, *map(heard_as, ears)]:
                for subject, bodies in QUESTIONS.items():
                    for body in bodies:
                        await evil.send(subject, body, reply=reply)
            assert await evil.get_last("LOG", subjects.log("mail")) is not None
            await service.append(subjects.log("mail"), encode(ended(2)), stream="LOG")
            for subject in ears[1:]:
                await service.publish(subject, b"true")
            async with asyncio.timeout(10):
                heard = [await anext(one) for one in listening]
        assert [one.subject for one in heard] == ears
        assert [one.data for one in heard] == [encode(ended(2)), b"true", b"true"]
        for bus in (evil, honest, service):
            await bus.close()


async def test_what_a_device_has_read_is_no_news_to_an_outsider(tmp_path: Path) -> None:
    """Outsiders hear events under their own name: a device may have answers sent there."""
    async with secured(tmp_path) as fleet:
        service = await fleet.connect(fleet.authority.creds("aggregator"))
        await ensure_streams(service)
        for job, number in (("mail", 1), ("other", 7), ("mail", 2), ("mail", 3), ("other", 8)):
            event = replace(ended(number), job=job)
            await service.append(subjects.log(job), encode(event), stream="LOG")
        evil = await fleet.connect(fleet.device_creds("till-7"))
        login = fleet.trusting(fleet.authority.creds("outsider"), inbox_prefix="_INBOX")
        honest = await nats_bus.connect([fleet.broker.url], name="outsider", credentials=login)
        got: list[tuple[int, object]] = []
        async with (
            honest.subscribe(subjects.events("mail")) as ear,
            aclosing(follow(honest, honest, "mail", after=0)) as events,
        ):
            async for sequence, event in events:
                got.append((sequence, event))
                if len(got) == 3:
                    body = b'{"batch": 9, "seq": 4, "next_by_subj": "seedwire.v1.log.*"}'
                    await evil.send("$JS.API.DIRECT.GET.LOG", body, reply=subjects.events("mail"))
                    async for heard in ear:  # until the batch has ended
                        if heard.headers.get("Status") == "204":
                            break
                    for job in ("other", "mail"):
                        event = replace(ended(9), job=job)
                        await service.append(subjects.log(job), encode(event), stream="LOG")
                if len(got) == 4:
                    break
        expected = [(1, ended(1)), (3, ended(2)), (4, ended(3)), (7, ended(9))]
        assert got == expected
        for bus in (evil, honest, service):
            await bus.close()


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
