"""What nats-server makes of our tokens: each identity may do what it must, and nothing else."""

import asyncio
import inspect
import itertools
import random
import ssl
import sys
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import nats.errors
import pytest
from nats.aio.client import Client

from shared import log, nats_bus, subjects
from shared.bus import StreamSpec
from shared.codec import encode
from shared.credentials import Credentials
from shared.errors import TransientError
from shared.identity.access import TLS_NAME
from shared.identity.authority import registrar_keys
from shared.identity.claims import decode_unverified, token_of
from shared.identity.roles import CLAIMS_UPDATE, heard_as
from shared.messages import JobEnded
from tests.support.secured import Secured, secured
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
OWN, OTHER, JOB = "till-7", "till-8", "mail"
VALUES = {
    "job": [JOB],
    "device": [OWN, OTHER],
    "name": [OWN, OTHER, "aggregator"],
    "digest": ["0" * 64],
    "index": [0],
}
API = [
    *("INFO", "STREAM.LIST", "STREAM.NAMES", "STREAM.CREATE.LOG", "STREAM.CREATE.MINE"),
    *("STREAM.UPDATE.LOG", "STREAM.DELETE.LOG", "STREAM.PURGE.LOG", "STREAM.INFO.LOG"),
    *("STREAM.MSG.GET.LOG", "STREAM.MSG.GET.DETAIL", "STREAM.MSG.DELETE.LOG"),
    *("CONSUMER.CREATE.LOG", "CONSUMER.CREATE.LOG.mine", "CONSUMER.DELETE.UPDATES.aggregator"),
    *("CONSUMER.MSG.NEXT.UPDATES.aggregator", "CONSUMER.LIST.LOG", "CONSUMER.INFO.LOG.mine"),
    *("DIRECT.GET.DETAIL", "DIRECT.GET.DETAIL.x", "DIRECT.GET.UPDATES", "DIRECT.GET.LOGS"),
]
ELSE = [
    *(f"_INBOX_{OTHER}.a.1", "_INBOX.a.1", "_INBOX_aggregator.a.1", "_INBOX_joiner.a.1"),
    *("$SYS.REQ.SERVER.PING", CLAIMS_UPDATE, "$SYS.REQ.USER.INFO", "$JS.ACK.UPDATES.a.1.1.1.1.0"),
    *(f"{subjects.PREFIX}.new", f"{subjects.PREFIX}.work.{OWN}.more", f"work.{OWN}", "hello"),
]
MUST_PUBLISH = [
    subjects.work(OWN),
    subjects.report(OWN),
    subjects.update(JOB, OWN),
    "$JS.API.DIRECT.GET.LOG",
    f"$JS.API.DIRECT.GET.LOG.{subjects.log(JOB)}",
    "$JS.API.DIRECT.GET.BLOBS",
    f"$JS.API.DIRECT.GET.BLOBS.{subjects.blob('0' * 64, 0)}",
]
MUST_HEAR = [
    heard_as(subjects.ALL_EVENTS),
    heard_as(subjects.events(JOB)),
    heard_as(subjects.wake(OWN)),
    heard_as(subjects.settled(OWN)),
    f"_INBOX_{OWN}.a.*",
]
TOO_WIDE = [
    *(">", "*", "*.>", "$SYS.>", "$JS.>", "$JS.API.>", "_INBOX.>", f"_INBOX_{OTHER}.>"),
    *(f"{subjects.PREFIX}.>", f"{subjects.PREFIX}.*.*", f"{subjects.PREFIX}.*.{OWN}"),
    *(f"{subjects.PREFIX}.wake.*", f"{subjects.PREFIX}.settled.*", f"{subjects.PREFIX}.events.>"),
]


def every_subject() -> list[str]:
    """All that shared/subjects.py can spell, for the device's own name and for others."""
    found = [text for name, text in vars(subjects).items() if name.isupper() and "." in str(text)]
    for name, spell in inspect.getmembers(subjects, inspect.isfunction):
        if name != "last_token":
            parameters = inspect.signature(spell).parameters
            choices = [VALUES[parameter] for parameter in parameters]
            found += [spell(*values) for values in itertools.product(*choices)]
    return [text for text in found if isinstance(text, str) and " " not in text]


def random_subjects(count: int) -> list[str]:
    """Subjects of the fleet's own words in any order."""
    chance = random.Random(7)
    words = sorted({word for text in [*every_subject(), *MUST_PUBLISH] for word in text.split(".")})
    words = [word for word in words if word not in ("*", ">")]
    return [".".join(chance.choices(words, k=chance.randint(1, 5))) for _ in range(count)]


def matches(pattern: str, subject: str) -> bool:
    wanted, found = pattern.split("."), subject.split(".")
    for number, word in enumerate(wanted):
        if word == ">":
            return len(found) > number
        if number >= len(found) or word not in ("*", found[number]):
            return False
    return len(wanted) == len(found)


class Stranger:
    """A client of the broker's own library, which tells what it was forbidden."""

    def __init__(self) -> None:
        self.client = Client()
        self.errors: list[str] = []

    async def forbids(self, subject: str, *, listening: bool) -> bool:
        """Whether the broker forbids to publish, or to listen, on `subject`."""
        self.errors.clear()
        if listening:
            await self.client.subscribe(subject)
        else:
            await self.client.publish(subject, b"{}", reply=f"_INBOX_{OWN}.a.1")
        said = f'{"subscription" if listening else "publish"} to "{subject.lower()}"'
        for _ in range(2):  # an error is told by another task than the flush is answered to
            await self.client.flush()
            await asyncio.sleep(0.01)
            if any(said in error.lower() for error in self.errors):
                return True
        return False


@asynccontextmanager
async def coming(fleet: Secured, creds: str = "") -> AsyncGenerator[Stranger, None]:
    """A client with these credentials, or none."""
    stranger = Stranger()

    async def told(error: Exception) -> None:
        stranger.errors.append(str(error))

    await stranger.client.connect(
        fleet.broker.url,
        error_cb=told,
        tls=ssl.create_default_context(cafile=str(fleet.authority.ca_file)),
        tls_hostname=TLS_NAME,
        allow_reconnect=False,
        user_credentials=creds or None,
    )
    try:
        yield stranger
    finally:
        await stranger.client.close()


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncGenerator[Secured, None]:
    async with secured(tmp_path) as found:
        yield found


async def forbidden(stranger: Stranger, candidates: Iterable[str], *, listening: bool) -> set[str]:
    return {
        subject
        for subject in dict.fromkeys(candidates)
        if await stranger.forbids(subject, listening=listening)
    }


async def test_a_device_may_publish_what_it_must_and_nothing_else(fleet: Secured) -> None:
    candidates = [text for text in every_subject() if "*" not in text and ">" not in text]
    candidates += [*MUST_PUBLISH, *ELSE, *(f"$JS.API.{call}" for call in API)]
    candidates += random_subjects(400)
    allowed = {
        text
        for text in candidates
        if any(matches(one, text) for one in [*MUST_PUBLISH, f"{subjects.PREFIX}.update.*.{OWN}"])
        or text.startswith(("$JS.API.DIRECT.GET.LOG.", "$JS.API.DIRECT.GET.BLOBS."))
    }
    async with coming(fleet, str(fleet.device_creds(OWN))) as device:
        denied = await forbidden(device, candidates, listening=False)
        assert denied == set(candidates) - allowed
        assert set(MUST_PUBLISH) <= allowed
        assert device.client.is_connected


async def test_a_device_may_hear_what_it_must_and_nothing_else(fleet: Secured) -> None:
    candidates = [*every_subject(), *MUST_HEAR, *TOO_WIDE, *ELSE, *random_subjects(200)]
    candidates += [heard_as(text) for text in candidates if text.startswith(subjects.PREFIX)]
    allowed = {
        text
        for text in candidates
        if any(matches(one, text) for one in (*MUST_HEAR, f"_INBOX_{OWN}.>"))
    }
    async with coming(fleet, str(fleet.device_creds(OWN))) as device:
        denied = await forbidden(device, candidates, listening=True)
        assert denied == set(candidates) - allowed
        assert set(MUST_HEAR) <= allowed


async def test_a_newcomer_may_ask_to_be_enrolled_and_nothing_else(fleet: Secured) -> None:
    candidates = [text for text in every_subject() if "*" not in text]
    candidates += [*MUST_PUBLISH, *ELSE, *(f"$JS.API.{call}" for call in API)]
    async with coming(fleet) as newcomer:
        denied = await forbidden(newcomer, candidates, listening=False)
        assert denied == set(candidates) - {subjects.ENROLL}
        deaf = await forbidden(newcomer, [*every_subject(), *TOO_WIDE, *ELSE], listening=True)
        assert {*every_subject(), *TOO_WIDE, *ELSE} - deaf == {"_INBOX_joiner.a.1"}
        await newcomer.client.publish(subjects.ENROLL, b"x" * 5000)
        await wait_until(lambda: newcomer.client.is_closed, what="too large a payload")


async def test_only_the_broker_publishes_events_and_an_operator_writes_no_log(
    fleet: Secured,
) -> None:
    for name in ("aggregator", "telemetry", "console", "outsider"):
        async with coming(fleet, str(fleet.authority.creds(name))) as service:
            assert await service.forbids(subjects.events(JOB), listening=False), name
    own = [subjects.log(JOB), subjects.detail(JOB), subjects.settled(OWN), subjects.work(OWN)]
    for name in ("console", "telemetry", "proxy_inference", "outsider"):
        async with coming(fleet, str(fleet.authority.creds(name))) as reader:
            assert await forbidden(reader, own, listening=False) == set(own), name
    async with coming(fleet, str(fleet.authority.creds("outsider"))) as outsider:
        private = [
            subjects.ALL_DETAILS,
            subjects.ALL_UPDATES,
            subjects.ALL_REPORTS,
            "_INBOX_console.>",
        ]
        assert await forbidden(outsider, private, listening=True) == set(private)
        open_to_all = [f"{subjects.PREFIX}.events.>", f"{subjects.PREFIX}.decision.>", "_INBOX.x.*"]
        assert not await forbidden(outsider, open_to_all, listening=True)


async def test_an_outsider_follows_the_fleet_with_its_own_library(fleet: Secured) -> None:
    service = await fleet.connect(fleet.authority.creds("aggregator"))
    try:
        await log.ensure_streams(service)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(ROOT / "deploy" / "demo" / "outsider.py"), fleet.broker.url),
            *(str(fleet.authority.creds("outsider")), str(fleet.authority.ca_file)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        ended = JobEnded(job=JOB, epoch=0, round=1, reason="stopped", digest="0" * 64)
        try:
            async with asyncio.timeout(20):
                assert await process.stdout.readline() == b"watching\n"
                while process.returncode is None:  # its subscription may still be on its way
                    await service.append(subjects.log(JOB), encode(ended), stream="LOG")
                    await asyncio.sleep(0.1)
        finally:
            if process.returncode is None:
                process.kill()
            assert await process.wait() == 0
    finally:
        await service.close()


async def test_a_device_reads_the_log_and_the_store_by_direct_get(fleet: Secured) -> None:
    service = await fleet.connect(fleet.authority.creds("aggregator"))
    device = await fleet.connect(fleet.device_creds(OWN))
    try:
        await log.ensure_streams(service)
        await service.append(subjects.log(JOB), b"one", stream="LOG")
        await service.append(subjects.detail(JOB), b"secret", stream="DETAIL")
        stored = [one.data async for one in device.read("LOG", subjects.log(JOB))]
        assert stored == [b"one"]
        last = await device.get_last("LOG", subjects.log(JOB))
        assert last is not None
        assert last.data == b"one"
        with pytest.raises(TransientError):
            await device.get_last("DETAIL", subjects.detail(JOB), timeout_s=0.5)
        with pytest.raises(TransientError):
            await device.ensure_stream(StreamSpec("MINE", subjects=("mine",)))
    finally:
        await device.close()
        await service.close()


async def test_a_revoked_device_is_put_out_within_a_second_and_stays_out(fleet: Secured) -> None:
    keys = registrar_keys(fleet.authority.registrar_file)
    creds = fleet.device_creds(OWN)
    system = await fleet.connect(fleet.authority.system_creds)
    try:
        async with coming(fleet, str(creds)) as device:
            now = int(time.time())
            tokens = keys.account_tokens({public_key(creds): now}, now)
            began = time.monotonic()
            for token in tokens:
                answer = await system.request(CLAIMS_UPDATE, token.encode(), timeout_s=5)
                assert b"200" in answer
            await wait_until(lambda: device.client.is_closed, timeout_s=5)
            assert time.monotonic() - began < 1.0
        for _ in range(2):  # the second time with a broker that has forgotten nothing
            with pytest.raises(nats.errors.Error, match="Authorization Violation"):
                async with coming(fleet, str(creds)):
                    pass
            async with coming(fleet, str(fleet.device_creds(OTHER))) as other:
                assert other.client.is_connected
            await fleet.broker.stop()
            await fleet.broker.start()
    finally:
        await system.close()


def public_key(creds: Path) -> str:
    return decode_unverified(token_of(creds.read_text(), str(creds))).sub


async def test_we_say_nothing_to_a_broker_without_tls_or_with_another_certificate(
    fleet: Secured, tmp_path: Path
) -> None:
    creds = str(fleet.device_creds(OWN))
    async with secured(tmp_path / "false", lambda authority: authority.make(tls=False)) as plain:
        with pytest.raises(TransientError, match="offers no TLS"):
            await nats_bus.connect(
                [plain.broker.url], name="t", credentials=fleet.trusting(creds), patience_s=1
            )
    async with secured(tmp_path / "other") as other:
        with pytest.raises(TransientError, match="CERTIFICATE_VERIFY_FAILED"):
            await nats_bus.connect(
                [other.broker.url], name="t", credentials=fleet.trusting(creds), patience_s=1
            )
    wrong_name = Credentials(
        creds_file=creds, ca_file=str(fleet.authority.ca_file), tls_name="another"
    )
    with pytest.raises(TransientError, match="CERTIFICATE_VERIFY_FAILED"):
        await nats_bus.connect([fleet.broker.url], name="t", credentials=wrong_name, patience_s=1)
