"""`seedwire-edge enroll`: the device makes its own key and has it known by the fleet.

The key's secret half never leaves the device. Repeated runs are harmless: one ticket, one key.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from edge_client import identity
from edge_client.config import Settings, device_name, state_dir_of
from shared import logs, nats_bus, subjects
from shared.clock import backoff_s
from shared.codec import decode_answer, encode
from shared.credentials import Credentials
from shared.errors import ConfigError, RejectError, TransientError
from shared.identity import files
from shared.identity.claims import creds_text
from shared.identity.keys import Key, make
from shared.identity.roles import JOINER_INBOX
from shared.identity.ticket import Ticket, parse
from shared.messages import Enroll, Enrolled

CONNECT_S = 15.0
ANSWER_S = 10.0
HANDSHAKE_S = 8.0
TRIES = 3


def main(argv: Sequence[str]) -> int:
    """Enrol as the command line says; the exit code."""
    parser = argparse.ArgumentParser(
        prog="seedwire-edge enroll",
        description="Make this device's key and have it known by the fleet that the ticket is of.",
    )
    parser.add_argument("ticket", help="What `seedwire device invite` printed: swj1-...")
    parser.add_argument("--device", default="", help="The device's name; if not set, the host's.")
    parser.add_argument("--state-dir", default="", help="As for the daemon.")
    elsewhere = "Where the broker is, if not where the ticket says."
    parser.add_argument("--servers", nargs="+", default=[], help=elsewhere)
    authorities = "A PEM file of authorities, for a ticket that names no certificate."
    parser.add_argument("--ca-file", default="", help=authorities)
    arguments = parser.parse_args(list(argv))
    logs.configure("edge", level="error")
    try:
        ticket = parse(arguments.ticket)
        device = device_name(arguments.device or ticket.device)
        state_dir = Path(arguments.state_dir) if arguments.state_dir else state_dir_of(device)
        asyncio.run(
            enroll(ticket, device, state_dir, servers=arguments.servers, ca_file=arguments.ca_file)
        )
    except (ConfigError, TransientError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - a command's own words
        return 78 if isinstance(error, ConfigError) else 69
    except KeyboardInterrupt:
        return 130
    named = f" --state-dir {arguments.state_dir}" if arguments.state_dir else ""
    print(  # noqa: T201
        f"{device} is enrolled; its key is in {identity.folder(state_dir)}\n"
        f"next: seedwire-edge --device {device}{named} --data rows.jsonl"
    )
    return 0


async def enroll_patiently(settings: Settings) -> None:
    """The daemon has an identity by its `ticket`; it waits for the fleet as long as that takes.

    Raises:
        ConfigError: the fleet refuses it.
    """
    attempt = 0
    while True:
        try:
            await enroll(
                parse(settings.ticket),
                settings.device,
                Path(settings.state_dir),
                servers=settings.servers,
                ca_file=settings.ca_file,
            )
        except TransientError as error:
            logs.get("edge").warning("not_enrolled_yet", why=str(error))
            await asyncio.sleep(backoff_s(attempt, first_s=1.0, cap_s=60.0))
            attempt += 1
        else:
            return


async def enroll(
    ticket: Ticket,
    device: str,
    state_dir: Path,
    *,
    servers: Sequence[str] = (),
    ca_file: str = "",
) -> None:
    """The device has an identity under `state_dir`.

    Raises:
        ConfigError: the fleet refuses it, or is not the one of the ticket; the text says why.
        TransientError: nobody could be reached.
    """
    found = list(servers) or ticket.servers
    if ticket.pin:
        ca = await _certificate(found, ticket)
    else:
        ca = files.read(Path(ca_file)) if ca_file else ""
    key = _waiting_key(state_dir, ticket)
    home = identity.folder(state_dir)
    trusted = home / f"{ticket.digest}.pem"
    if ca:
        files.write(trusted, ca)
    credentials = Credentials(
        ca_file=str(trusted) if ca else "",
        tls_name=ticket.tls_name,
        inbox_prefix=JOINER_INBOX,
    )
    request = Enroll(device=device, public_key=key.public, secret=ticket.secret)
    try:
        answer = await _asked(found, credentials, request)
    finally:
        trusted.unlink(missing_ok=True)
    identity.keep(state_dir, found, creds_text(answer.jwt, key.seed), ca, ticket.tls_name)
    for older in home.glob("*.seed"):
        if older != _seed_file(state_dir, ticket):
            older.unlink(missing_ok=True)


async def _asked(servers: list[str], credentials: Credentials, request: Enroll) -> Enrolled:
    """The registrar's answer; a lost one is asked for again.

    Raises:
        ConfigError: it refuses.
        TransientError: there is none.
    """
    shown = ", ".join(servers)
    try:
        bus = await nats_bus.connect(
            servers, name="enrolment", credentials=credentials, patience_s=CONNECT_S
        )
    except TransientError as error:
        raise TransientError(
            f"no broker lets us in at {shown} ({error}): see that it can be reached from here, and "
            "name another address with --servers if the ticket's is of another network"
        ) from error
    try:
        for attempt in range(TRIES):
            try:
                data = await bus.request(subjects.ENROLL, encode(request), timeout_s=ANSWER_S)
                break
            except TransientError as error:
                if attempt + 1 == TRIES:
                    raise TransientError(
                        f"the broker at {shown} is there, but nobody enrols devices: is the "
                        "registrar running (`seedwire up` runs it)?"
                    ) from error
                await asyncio.sleep(1.0)
        else:
            raise AssertionError
    finally:
        await bus.close()
    try:
        return decode_answer(data, request, Enrolled)
    except RejectError as error:
        raise ConfigError(str(error)) from error


def _seed_file(state_dir: Path, ticket: Ticket) -> Path:
    return identity.folder(state_dir) / f"{ticket.digest}.seed"


def _waiting_key(state_dir: Path, ticket: Ticket) -> Key:
    """This ticket's key, on disk before anybody hears of it.

    Raises:
        ConfigError: the directory cannot be written.
    """
    path = _seed_file(state_dir, ticket)
    if not path.exists():
        files.write(path, make("user").seed + "\n", mode=files.SECRET)
    return Key(files.read(path))


# The broker's certificate


async def _certificate(servers: list[str], ticket: Ticket) -> str:
    """The certificate with the ticket's pin, as PEM, from the first server that shows it.

    Raises:
        ConfigError: one shows another certificate, or none.
        TransientError: none can be reached.
    """
    why = "no address"
    for server in servers:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                der = await _shown(server)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            why = f"{server}: {error or type(error).__name__}"
            continue
        if hashlib.sha256(der).digest() != ticket.pin:
            raise ConfigError(
                f"{server} shows another certificate than the ticket names: the ticket is of "
                "another fleet or of an earlier one, or somebody stands between; ask for a new one"
            )
        return ssl.DER_cert_to_PEM_cert(der)
    raise TransientError(
        f"no broker can be reached ({why}): name another address with --servers if the ticket's "
        "is of another network"
    )


async def _shown(server: str) -> bytes:
    """The certificate that a broker shows, whoever it may be: nothing is told to it."""
    parts = urlsplit(server if "://" in server else f"nats://{server}")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the pin is compared instead
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 4222)
    try:
        line = await reader.readline()
        if not line.startswith(b"INFO "):
            _not_ours(server, "answers, but is no NATS server")
        if not json.loads(line[5:]).get("tls_required"):
            _not_ours(server, "is a broker without TLS, and the ticket's has it")
        await writer.start_tls(context, server_hostname=parts.hostname)
        tls = writer.get_extra_info("ssl_object")
        assert isinstance(tls, ssl.SSLObject)
        der = tls.getpeercert(binary_form=True)
        if der is None:
            _not_ours(server, "shows no certificate")
        return der
    finally:
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()


def _not_ours(server: str, why: str) -> NoReturn:
    raise ConfigError(f"{server} {why}: ask for a new ticket, or name the right --servers")
