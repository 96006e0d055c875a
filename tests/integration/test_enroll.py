"""Devices come in by a ticket and their own key, and go out by a word: real processes over TLS."""

import asyncio
import json
import os
import random
import signal
import stat
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.demo.processes import Child
from services.console.inviting import ticket as ticket_for
from shared import nats_bus, subjects
from shared.codec import decode, encode
from shared.errors import MalformedMessage, TransientError
from shared.identity import claims, keys
from shared.identity.authority import registrar_keys
from shared.identity.ticket import parse
from shared.messages import (
    ConnectionRefused,
    DeviceReport,
    DeviceRevoked,
    Enroll,
    IdentitiesListed,
    InviteDevices,
    ListIdentities,
    Message,
    Refused,
    RevokeDevice,
    ServiceReport,
)
from shared.runtime import EXIT_CONFIG
from tests.support.fleet import rows, write_rows
from tests.support.secured import Secured, secured
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
PROCESS_S = 40.0


class Fleet:
    """A secured fleet with its registrar, seen by an operator."""

    def __init__(self, secured: Secured, bus: nats_bus.NatsBus) -> None:
        self.secured = secured
        self.bus = bus
        self.refused: list[ConnectionRefused] = []
        self.counters: dict[str, int] = {}
        self.heard: dict[str, int] = {}
        """Reports by device."""
        self.daemons: list[Child] = []

    async def listen(self) -> None:
        async with self.bus.subscribe(f"{subjects.PREFIX}.>") as deliveries:
            async for delivery in deliveries:
                try:
                    message = decode(delivery.data, Message)
                except MalformedMessage:
                    continue
                match message:
                    case ConnectionRefused():
                        self.refused.append(message)
                    case ServiceReport():
                        self.counters |= message.counters
                    case DeviceReport():
                        self.heard[message.device] = self.heard.get(message.device, 0) + 1
                    case _:
                        pass

    async def invite(
        self, *, uses: int = 1, expires_s: float = 3600.0, device: str | None = None
    ) -> str:
        request = InviteDevices(uses=uses, expires_s=expires_s, device=device)
        return await self.secured.ticket(self.bus, request)

    async def enroll(self, ticket: str, device: str, *more: str) -> tuple[int, str]:
        """Exit code and words of `seedwire-edge enroll`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "edge_client", "enroll", ticket, "--device", device),
            *("--state-dir", str(self.home(device)), *more),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        async with asyncio.timeout(PROCESS_S):
            output, _ = await process.communicate()
        return process.returncode or 0, output.decode()

    async def start_daemon(self, device: str, *more: str) -> Child:
        data = write_rows(self.secured.folder / "rows.jsonl", rows(10))
        arguments = ["--device", device, "--data", str(data), "--engine", "fake", *more]
        arguments += ["--state-dir", str(self.home(device))]
        log = self.secured.folder / f"{device}.log"
        child = Child(device, "edge_client", arguments, log)
        self.daemons.append(child)
        await child.start()
        return child

    def home(self, device: str) -> Path:
        return self.secured.folder / "devices" / device

    def creds(self, device: str) -> Path:
        return self.home(device) / "identity" / "device.creds"

    def events(self, device: str, name: str) -> list[dict[str, object]]:
        """What a daemon has logged under `name`."""
        text = (self.secured.folder / f"{device}.log").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    async def comes_in(self, creds: Path) -> bool:
        """Whether the broker takes these credentials."""
        try:
            bus = await self.secured.connect(creds, patience_s=2.0)
        except TransientError:
            return False
        await bus.close()
        return True

    async def listed(self) -> dict[str, str]:
        answer = await self.secured.ask(self.bus, subjects.IDENTITY_LIST, ListIdentities())
        assert isinstance(answer, IdentitiesListed)
        return {one.device: one.state for one in answer.identities}

    async def revoke(self, device: str) -> Message:
        request = RevokeDevice(device=device)
        return await self.secured.ask(self.bus, subjects.IDENTITY_REVOKE, request)


@asynccontextmanager
async def a_fleet(folder: Path) -> AsyncGenerator[Fleet, None]:
    async with secured(folder) as broker:
        await broker.start_registrar()
        bus = await broker.connect(broker.authority.creds("console"))
        fleet = Fleet(broker, bus)
        listening = asyncio.create_task(fleet.listen())
        try:
            yield fleet
        finally:
            for child in fleet.daemons:
                await child.stop()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await bus.close()


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncGenerator[Fleet, None]:
    async with a_fleet(tmp_path) as found:
        yield found


async def test_a_device_enrols_with_its_own_key_and_again_with_the_same(fleet: Fleet) -> None:
    ticket = await fleet.invite()
    code, output = await fleet.enroll(ticket, "till-7")
    assert code == 0, output
    assert "seedwire-edge --device till-7" in output
    creds = fleet.creds("till-7")
    before = creds.read_text()
    for secret in [creds, *creds.parent.glob("*.seed")]:
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert await fleet.comes_in(creds)
    creds.unlink()  # as if the answer had been lost
    assert (await fleet.enroll(ticket, "till-7"))[0] == 0
    assert creds.read_text() == before
    assert await fleet.listed() == {"till-7": "enrolled"}
    await wait_until(lambda: fleet.counters.get("devices_enrolled") == 1)
    seed = before.split("SEED-----")[1].split("-----")[0].strip()
    kept = [path for path in fleet.secured.folder.rglob("*") if path.is_file()]
    holders = [path for path in kept if seed.encode() in path.read_bytes()]
    assert all(path.is_relative_to(fleet.home("till-7")) for path in holders)


async def test_an_enrolment_that_cannot_be_says_why(fleet: Fleet, tmp_path: Path) -> None:
    once, named = await fleet.invite(), await fleet.invite(device="till-9")
    short = await fleet.invite(expires_s=1.0)
    assert (await fleet.enroll(once, "till-7"))[0] == 0
    many = await fleet.invite(uses=0)
    other = parse(await fleet.invite())
    false_pin = type(other)(other.servers, other.secret, b"\0" * 32, other.tls_name).text()
    guessed = ticket_for(fleet.secured.access, "A" * 22).text()
    await asyncio.sleep(1.1)
    for ticket, device, why in (
        (once, "till-8", "used up"),
        (named, "till-8", "for the device till-9 alone"),
        (short, "till-8", "has expired"),
        (guessed, "till-8", "unknown here"),
        (false_pin, "till-8", "shows another certificate"),
        (many[:-4], "till-8", "damaged or cut short"),
        ("swordfish", "till-8", "that is no ticket"),
        (many, "till.8", "use 1 to 64 of"),
    ):
        code, output = await fleet.enroll(ticket, device)
        assert (code, why in output) == (EXIT_CONFIG, True), (why, output)
        assert not fleet.creds(device).exists()
    os.rename(fleet.home("till-7"), tmp_path / "stolen")  # another device of the same name
    code, output = await fleet.enroll(many, "till-7")
    assert (code, "seedwire device revoke till-7" in output) == (EXIT_CONFIG, True), output
    code, output = await fleet.enroll(many, "till-8", "--servers", "nats://127.0.0.1:1")
    assert (code, "no broker can be reached" in output) == (69, True), output
    await wait_until(lambda: any("used up" in one.reason for one in fleet.refused))
    assert await fleet.listed() == {"till-7": "enrolled"}


def foreign(fleet: Fleet, what: str) -> tuple[str, str]:
    """Credentials that look right and are not, and what is said of them."""
    ours = registrar_keys(fleet.secured.authority.registrar_file)
    signer, user, now = keys.Key(ours.device_seed), keys.make("user"), int(time.time())
    nats: dict[str, object] = {"issuer_account": ours.guests, "type": "user", "version": 2}
    said: dict[str, object] = {"name": "till-7", "sub": user.public, "iat": now, "nats": nats}
    why = "an identity that was never given out"
    if what == "another operator":
        account, signer = keys.make("account"), keys.make("account")
        nats["issuer_account"], why = account.public, "an identity of another fleet"
    elif what == "a signer of our account's name":
        signer = keys.make("account")
    elif what == "expired":
        said["exp"], why = now - 10, "an identity that has expired"
    elif what == "wants to need no key":
        nats["bearer_token"] = True
    elif what == "wants more":
        nats["pub"] = {"allow": [">"]}
    elif what == "without the key":
        token = claims.decode_unverified(
            claims.token_of(fleet.creds("till-7").read_text(), "till-7")
        )
        said, why = {**said, "sub": token.sub}, "the identity of a device, without its key"
    return claims.creds_text(claims.encode(said, signer), user.seed), why


async def test_a_foreign_identity_is_refused_and_its_attempt_is_seen(fleet: Fleet) -> None:
    assert (await fleet.enroll(await fleet.invite(), "till-7"))[0] == 0
    path = fleet.secured.folder / "foreign.creds"
    kinds = ("another operator", "a signer of our account's name", "expired", "wants more")
    for what in (*kinds, "wants to need no key", "without the key"):
        text, why = foreign(fleet, what)
        path.write_text(text)
        fleet.refused.clear()
        counted = fleet.counters.get("connections_refused", 0)
        assert not await fleet.comes_in(path), what
        await wait_until(lambda why=why: why in [one.reason for one in fleet.refused], what=what)
        seen = next(one for one in fleet.refused if one.reason == why)
        assert (seen.name, seen.host) == ("till-7", "127.0.0.1")
        assert seen.device == ("till-7" if what == "without the key" else None)
        assert seen.public_key == claims.decode_unverified(claims.token_of(text, "")).sub
        await wait_until(
            lambda counted=counted: fleet.counters.get("connections_refused", 0) > counted
        )
    assert await fleet.comes_in(fleet.creds("till-7"))


async def test_a_revoked_daemon_is_put_out_at_once_says_why_and_comes_back_with_a_new_ticket(
    fleet: Fleet,
) -> None:
    ticket = await fleet.invite(uses=0)
    for device in ("till-7", "till-8"):
        assert (await fleet.enroll(ticket, device))[0] == 0
        await fleet.start_daemon(device)
        await wait_until(lambda device=device: device in fleet.heard, timeout_s=PROCESS_S)
    stolen = fleet.secured.folder / "stolen.creds"
    stolen.write_text(fleet.creds("till-7").read_text())
    began = time.monotonic()
    assert isinstance(await fleet.revoke("till-7"), DeviceRevoked)
    await wait_until(lambda: bool(fleet.events("till-7", "broker_lost")))
    assert time.monotonic() - began < 2.0  # tests/contract asks the broker for less than one
    await wait_until(lambda: any(one.device == "till-7" for one in fleet.refused))
    assert {one.reason for one in fleet.refused if one.device} == {"revoked"}
    assert not fleet.events("till-8", "broker_lost")
    (told,) = fleet.events("till-7", "broker_refuses_us")
    assert "seedwire-edge enroll TICKET" in str(told["mend"])
    code, output = await fleet.enroll(ticket, "till-9")
    assert (code, "is closed" in output) == (EXIT_CONFIG, True), output

    registrar = fleet.secured.registrar
    assert registrar is not None
    await fleet.secured.broker.kill()
    await registrar.kill()
    await fleet.secured.broker.start()
    assert not await fleet.comes_in(stolen)  # the broker remembers by itself
    await registrar.start()
    assert await fleet.listed() == {"till-7": "revoked", "till-8": "enrolled"}
    assert not await fleet.comes_in(stolen)
    assert await fleet.comes_in(fleet.creds("till-8"))

    before = fleet.heard["till-7"]
    code, output = await fleet.enroll(await fleet.invite(device="till-7"), "till-7")
    assert code == 0, output
    await wait_until(lambda: len(fleet.events("till-7", "broker_connected")) == 2, timeout_s=30)
    assert fleet.daemons[0].running
    assert await fleet.listed() == {"till-7": "enrolled", "till-8": "enrolled"}
    assert not await fleet.comes_in(stolen)  # the old key stays out
    assert len(fleet.events("till-7", "broker_refuses_us")) == 1
    assert fleet.heard["till-7"] >= before


async def test_a_registrar_killed_at_any_moment_gives_each_device_one_identity(
    fleet: Fleet,
) -> None:
    """Ten uses, ten devices, and a registrar that is killed again and again in the middle."""
    devices = [f"d{number}" for number in range(10)]
    secret = parse(await fleet.invite(uses=len(devices))).secret
    registrar, chance, done = fleet.secured.registrar, random.Random(5), asyncio.Event()
    assert registrar is not None

    async def killing() -> None:
        while not done.is_set():
            await asyncio.sleep(chance.uniform(0.2, 0.9))
            await registrar.kill()
            await registrar.start()

    async def enrolled(device: str) -> set[str]:
        """Every token the device was ever answered with."""
        request = Enroll(device=device, public_key=keys.make("user").public, secret=secret)
        found: set[str] = set()
        newcomer = await nats_bus.connect(
            [fleet.secured.broker.url],
            name=device,
            credentials=fleet.secured.trusting(inbox_prefix="_INBOX_joiner"),
        )
        try:
            answers = 0
            while answers < 3:
                try:
                    data = await newcomer.request(subjects.ENROLL, encode(request), timeout_s=0.3)
                except TransientError:
                    await asyncio.sleep(0.05)
                    continue
                answer = decode(data, Message)
                assert not isinstance(answer, Refused), answer
                found.add(getattr(answer, "jwt", ""))
                answers += 1
        finally:
            await newcomer.close()
        return found

    killer = asyncio.create_task(killing())
    try:
        async with asyncio.timeout(60):
            tokens = await asyncio.gather(*(enrolled(device) for device in devices))
    finally:
        done.set()
        await killer
    assert [len(found) for found in tokens] == [1] * len(devices)
    assert await fleet.listed() == dict.fromkeys(devices, "enrolled")
    request = Enroll(device="late", public_key=keys.make("user").public, secret=secret)
    answer = await fleet_answer(fleet, request)
    assert isinstance(answer, Refused)
    assert "used up" in answer.reason


async def fleet_answer(fleet: Fleet, request: Enroll) -> Message:
    newcomer = await nats_bus.connect(
        [fleet.secured.broker.url],
        name="late",
        credentials=fleet.secured.trusting(inbox_prefix="_INBOX_joiner"),
    )
    try:
        return await fleet.secured.ask(newcomer, subjects.ENROLL, request)
    finally:
        await newcomer.close()


async def test_a_daemon_with_a_ticket_enrols_at_its_first_start_and_only_then(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = await fleet.invite()
    registrar = fleet.secured.registrar
    assert registrar is not None
    await registrar.stop()  # a container may start before its fleet
    monkeypatch.setenv("SEEDWIRE_EDGE_TICKET", ticket)
    daemon = await fleet.start_daemon("till-7")
    await asyncio.sleep(1.0)
    await registrar.start()
    await wait_until(lambda: "till-7" in fleet.heard, timeout_s=PROCESS_S)
    assert ticket not in (fleet.secured.folder / "till-7.log").read_text()
    key = fleet.creds("till-7").read_text()
    before = fleet.heard["till-7"]
    daemon.signal(signal.SIGKILL)
    await daemon.kill()
    await daemon.start()
    await wait_until(lambda: fleet.heard["till-7"] > before, timeout_s=PROCESS_S)
    assert fleet.creds("till-7").read_text() == key
