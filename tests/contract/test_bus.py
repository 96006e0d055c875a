"""What both buses promise alike."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from shared.bus import GAP, LAST_SEQUENCE_HEADER, SEQUENCE_HEADER, Delivery, Link, StreamSpec
from shared.bus import SequenceMismatch as Mismatch
from shared.errors import ConfigError, TransientError
from shared.nats_bus import connect
from tests.support.broker import BrokerProcess
from tests.support.hubs import Hub, NatsHub
from tests.support.proxy import start_proxy
from tests.support.waiting import wait_until

FACTS = StreamSpec(
    "FACTS", ("facts.*",), republish_from="facts.*", republish_to="told.{{wildcard(1)}}"
)
WORK = StreamSpec("WORK", ("work.*",), memory=True, work_queue=True, max_bytes=100_000)


async def first(deliveries: AsyncIterator[Delivery], count: int) -> list[Delivery]:
    async with asyncio.timeout(5):
        return [await anext(deliveries) for _ in range(count)]


async def echo(bus: Link, subject: str, name: bytes) -> None:
    async with bus.subscribe(subject, queue="echoes") as requests:
        async for request in requests:
            await bus.publish(request.reply, name + b" " + request.data)


async def test_a_subscriber_gets_what_matches_in_order(hub: Hub) -> None:
    alice, bob = await hub.connect("alice"), await hub.connect("bob")
    async with alice.subscribe("talk.*") as heard:
        await alice.flush()  # what another connection publishes from here on is heard
        for number in range(3):
            await bob.publish(f"talk.{number}", b"%d" % number, {"Seedwire-Key": "k"})
        await bob.publish("talk.too.deep", b"")
        await bob.publish("talk.3", b"3")
        got = await first(heard, 4)
    assert [one.data for one in got] == [b"0", b"1", b"2", b"3"]
    assert got[0].headers["Seedwire-Key"] == "k"
    assert got[0].subject == "talk.0"


async def test_a_full_subscription_drops_counts_and_marks_the_gap(hub: Hub) -> None:
    alice, bob = await hub.connect("alice"), await hub.connect("bob")
    async with alice.subscribe("talk", limit=2, gaps=True) as heard:
        await alice.flush()
        for number in range(5):
            await bob.publish("talk", b"%d" % number)
        await bob.flush()
        await alice.flush()
        await wait_until(lambda: alice.dropped == 3)
        assert [one.data for one in await first(heard, 2)] == [b"0", b"1"]
        assert await anext(heard) is GAP


async def test_one_of_a_queue_group_answers_a_request(hub: Hub) -> None:
    asker, one, two = [await hub.connect(name) for name in ("asker", "one", "two")]
    async with asyncio.TaskGroup() as group:
        served = [group.create_task(echo(bus, "ask.*", b"it is")) for bus in (one, two)]
        await asyncio.sleep(0.05)
        answers = [await asker.request("ask.me", b"%d" % n, timeout_s=5) for n in range(6)]
        for task in served:
            task.cancel()
    assert answers == [b"it is %d" % n for n in range(6)]


async def test_a_request_that_nobody_serves_fails_at_once(bus: Link) -> None:
    async with asyncio.timeout(1):
        with pytest.raises(TransientError, match="nobody serves"):
            await bus.request("no.one", b"", timeout_s=30)


async def test_a_request_without_an_answer_fails_in_time(bus: Link) -> None:
    async with bus.subscribe("mute"):
        with pytest.raises(TransientError, match="no answer"):
            await bus.request("mute", b"", timeout_s=0.05)


async def test_closing_ends_every_subscription(hub: Hub) -> None:
    bus, other = await hub.connect("bus"), await hub.connect("other")
    async with bus.subscribe("talk") as heard:
        await other.publish("talk", b"last words")
        await other.flush()
        await bus.flush()
        await bus.close()
        assert len([one async for one in heard]) <= 1
    with pytest.raises(TransientError):
        await bus.publish("talk", b"")


async def test_ensuring_a_stream_again_keeps_what_it_holds(bus: Link) -> None:
    await bus.ensure_stream(FACTS)
    await bus.append("facts.a", b"1", stream="FACTS")
    await bus.ensure_stream(FACTS)
    await bus.ensure_stream(StreamSpec("FACTS", ("facts.*", "more.*")))
    await bus.append("more.a", b"2", stream="FACTS")
    assert [one.data async for one in bus.read("FACTS", ">")] == [b"1", b"2"]


async def test_an_append_at_another_end_is_refused_with_the_true_one(bus: Link) -> None:
    await bus.ensure_stream(FACTS)
    assert (await bus.append("facts.a", b"1", stream="FACTS", expected_last=0)).sequence == 1
    with pytest.raises(Mismatch) as refused:
        await bus.append("facts.b", b"2", stream="FACTS", expected_last=0)
    assert refused.value.last == 1
    assert await bus.last_sequence("FACTS") == 1
    with pytest.raises(TransientError, match="no stream"):
        await bus.append("elsewhere", b"", stream="NOWHERE")
    with pytest.raises(TransientError, match="no stream"):
        await anext(bus.read("NOWHERE", ">"))


async def test_republished_messages_name_their_subjects_one_before(hub: Hub) -> None:
    bus, reader = await hub.connect("bus"), await hub.connect("reader")
    await bus.ensure_stream(FACTS)
    async with reader.subscribe("told.*") as told:
        for subject in ("facts.a", "facts.b", "facts.a"):
            await bus.append(subject, subject.encode(), stream="FACTS")
        got = await first(told, 3)
    assert [one.subject for one in got] == ["told.a", "told.b", "told.a"]
    assert [one.headers[SEQUENCE_HEADER] for one in got] == ["1", "2", "3"]
    assert [one.headers[LAST_SEQUENCE_HEADER] for one in got] == ["0", "0", "1"]


async def test_reading_goes_over_many_batches_and_stops_where_told(bus: Link) -> None:
    await bus.ensure_stream(FACTS)
    big = bytes(90_000)
    for number in range(9):
        await bus.append(f"facts.{'ab'[number % 2]}", b"%d" % number + big, stream="FACTS")
    whole = [one async for one in bus.read("FACTS", "facts.*")]
    assert [one.sequence for one in whole] == list(range(1, 10))
    assert [one.sequence async for one in bus.read("FACTS", "facts.a", after=1)] == [3, 5, 7, 9]
    assert [one.sequence async for one in bus.read("FACTS", ">", after=2, up_to=5)] == [3, 4, 5]
    assert [one async for one in bus.read("FACTS", "facts.c")] == []
    newest = await bus.get_last("FACTS", "facts.b")
    assert newest is not None
    assert newest == await bus.get("FACTS", 8)
    assert await bus.get("FACTS", 10) is None
    assert await bus.get_last("FACTS", "facts.c") is None
    assert await bus.subjects("FACTS", "facts.*") == {"facts.a", "facts.b"}
    assert await bus.purge("FACTS", "facts.a") == 5
    assert await bus.subjects("FACTS", "facts.*") == {"facts.b"}
    assert [one.sequence async for one in bus.read("FACTS", ">")] == [2, 4, 6, 8]


async def test_a_batch_that_is_not_acknowledged_comes_again(bus: Link) -> None:
    await bus.ensure_stream(WORK)
    for number in range(5):
        await bus.append("work.a", b"%d" % number, stream="WORK", headers={"Seedwire-Key": "k"})
    forgotten = await bus.take("WORK", "worker", limit=3, wait_s=1)
    done = await bus.take("WORK", "worker", limit=3, wait_s=1)
    assert forgotten is not None
    assert done is not None
    assert [one.data for one in forgotten.messages] == [b"0", b"1", b"2"]
    assert [one.sequence for one in done.messages] == [4, 5]
    assert done.messages[0].headers == {"Seedwire-Key": "k"}
    assert done.messages[0].subject == "work.a"
    await done.done()
    assert await bus.take("WORK", "worker", limit=3, wait_s=0.05) is None
    again = await bus.take("WORK", "worker", limit=9, wait_s=5)
    assert again is not None
    back = sorted(one.data for one in again.messages)
    await again.again(0.05)
    while len(back) < 6:
        once_more = await bus.take("WORK", "worker", limit=9, wait_s=5)
        assert once_more is not None
        back += sorted(one.data for one in once_more.messages)
        await once_more.done()
    assert set(back) == {b"0", b"1", b"2"}
    assert await bus.take("WORK", "worker", limit=3, wait_s=1.2) is None


async def test_what_a_dead_process_left_is_taken_by_the_next_at_once(hub: Hub) -> None:
    before, after = await hub.connect("before"), await hub.connect("after")
    await before.ensure_stream(WORK)
    for number in range(4):
        await before.append("work.a", b"%d" % number, stream="WORK")
    assert await before.take("WORK", "worker", limit=3, wait_s=1) is not None
    batch = await after.take("WORK", "worker", limit=9, wait_s=0.1)
    assert batch is not None
    assert [one.data for one in batch.messages] == [b"0", b"1", b"2", b"3"]


async def test_waiting_work_is_taken_as_it_comes(bus: Link) -> None:
    await bus.ensure_stream(WORK)
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(bus.take("WORK", "worker", limit=10, wait_s=10))
        await asyncio.sleep(0.05)
        await bus.append("work.a", b"1", stream="WORK")
        async with asyncio.timeout(2):
            batch = await waiting
    assert batch is not None
    assert [one.data for one in batch.messages] == [b"1"]


async def test_a_full_work_queue_refuses_and_says_why(bus: Link) -> None:
    await bus.ensure_stream(WORK)
    for _ in range(2):
        await bus.append("work.a", bytes(40_000), stream="WORK")
    with pytest.raises(TransientError, match="full"):
        await bus.append("work.a", bytes(40_000), stream="WORK")


async def test_a_restarted_broker_finds_its_clients_as_they_were(hub: Hub) -> None:
    bus = await hub.connect("bus")
    await bus.ensure_stream(FACTS)
    await bus.ensure_stream(WORK)
    await bus.append("facts.a", b"kept", stream="FACTS")
    await bus.append("work.a", b"in memory", stream="WORK")
    taken = await bus.take("WORK", "worker", limit=9, wait_s=1)
    assert taken is not None
    async with bus.subscribe("told.*", gaps=True) as told:
        async with asyncio.TaskGroup() as group:
            group.create_task(hub.restart())
        await wait_until(lambda: bus.reconnects == 1 and bus.connected)
        assert await anext(told) is GAP
        await taken.done()
        assert [one.data async for one in bus.read("FACTS", ">")] == [b"kept"]
        await bus.append("facts.a", b"new", stream="FACTS", expected_last=1)
        assert [one.data for one in await first(told, 1)] == [b"new"]
    assert await bus.take("WORK", "worker", limit=9, wait_s=0.05) is None
    await bus.append("work.a", b"sent again", stream="WORK")
    batch = await bus.take("WORK", "worker", limit=9, wait_s=5)
    assert batch is not None
    assert [one.data for one in batch.messages] == [b"sent again"]


async def test_what_is_published_while_cut_off_arrives_later(nats_hub: NatsHub) -> None:
    bus, other = await nats_hub.connect("bus"), await nats_hub.connect("other")
    async with other.subscribe("talk") as heard:
        await nats_hub.broker.kill()
        await wait_until(lambda: not bus.connected and not other.connected)
        for _ in range(20):
            await bus.publish("elsewhere", bytes(100_000))
        with pytest.raises(TransientError, match="wait already"):
            await bus.publish("elsewhere", bytes(100_000))
        with pytest.raises(TransientError, match="not connected"):
            await bus.request("talk", b"", timeout_s=0.05)
        await bus.publish("talk", b"hello")
        await nats_hub.broker.start()
        # Whoever is back first: a message that finds no subscriber is gone, as ever in core NATS.
        await wait_until(lambda: bus.connected and other.connected, timeout_s=15)
        await bus.publish("talk", b"again")
        async with asyncio.timeout(5):
            while (await anext(heard)).data != b"again":
                pass


async def test_the_first_connection_waits_for_the_broker(broker: BrokerProcess) -> None:
    await broker.stop()
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        connecting = group.create_task(connect([broker.url], name="early"))
        await asyncio.sleep(0.2)
        await broker.start()
        bus = await connecting
        await bus.flush()
        await bus.close()


async def test_a_link_that_swallows_everything_is_given_up(
    broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.nats_bus.SILENCE_S", 0.2)
    async with start_proxy(broker.port) as proxy:
        bus = await connect([f"nats://127.0.0.1:{proxy.port}"], name="device", timeout_s=0.3)
        await bus.ensure_stream(FACTS)
        proxy.swallow()
        with pytest.raises(TransientError, match="no answer"):
            await bus.append("facts.a", b"1", stream="FACTS")
        await wait_until(lambda: bus.reconnects == 1)
        await bus.append("facts.a", b"2", stream="FACTS")
        await bus.close()


async def test_what_cannot_be_a_broker_is_refused_at_once() -> None:
    for wrong in ([], ["http://x"], ["nats://"], ["nats://host:port"]):
        with pytest.raises(ConfigError):
            await connect(wrong, name="wrong")


async def test_more_than_the_broker_takes_is_the_operators_affair(nats_hub: NatsHub) -> None:
    bus = await nats_hub.connect("bus")
    with pytest.raises(ConfigError, match="max_payload"):
        await bus.publish("talk", bytes(2_000_000))
    await bus.flush()
