"""Settings of the edge daemon."""

import os
import platform
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared import hub, subjects
from shared.errors import ConfigError

PREFIX = "SEEDWIRE_EDGE"

_ROWS = "a JSONL or CSV file that holds rows, or a directory of such files"
_GZIP = b"\x1f\x8b"
_HEAD_BYTES = 4096
"""Of a file of rows, so much is looked at before anything is started."""
DEFAULT_SERVERS = ("nats://127.0.0.1:4222",)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon that measures for Seedwire on one device; private data never leaves it."""

    device: Annotated[
        str,
        Meta(
            description="The device's name in the fleet: 1 to 64 of A-Z a-z 0-9 _ -; "
            "if not set, this host's name."
        ),
    ] = ""
    servers: Annotated[
        tuple[str, ...],
        Meta(
            description="Addresses of the broker, nats:// or tls://; more than one for a cluster. "
            "If not set, those that the device was enrolled with, or nats://127.0.0.1:4222."
        ),
    ] = ()
    user: Annotated[
        str, Meta(description="The user to log in to the broker as, with password.")
    ] = ""
    password: Annotated[
        str, Meta(description="That user's password; safer in the environment than here.")
    ] = ""
    token: Annotated[
        str, Meta(description="A token to log in with, instead of user and password.")
    ] = ""
    creds_file: Annotated[
        str,
        Meta(
            description="A NATS credentials file (.creds) to log in with; if not set, the identity "
            "that `seedwire-edge enroll` has left in state_dir."
        ),
    ] = ""
    ca_file: Annotated[
        str,
        Meta(
            description="A PEM file of the authorities that vouch for the broker's certificate; "
            "if not set, the system's."
        ),
    ] = ""
    tls_name: Annotated[
        str,
        Meta(description="What the broker's certificate must be made out to, if not its address."),
    ] = ""
    ticket: Annotated[
        str,
        Meta(
            description="A ticket (swj1-...) to enrol with at the first start, while the device "
            "has no identity yet; safer in the environment than here."
        ),
    ] = ""
    data: Annotated[
        str,
        Meta(
            description="Private rows to tune on: a JSONL or CSV file, a directory of them that "
            "may grow, or hf://datasets/OWNER/REPO/FILE; left out on a device that only evaluates."
        ),
    ] = ""
    heldout: Annotated[
        str,
        Meta(description="Rows to evaluate the adapter on, like data; belongs to trusted."),
    ] = ""
    trusted: Annotated[
        bool,
        Meta(description="Whether this device evaluates for the fleet; it then needs heldout."),
    ] = False
    state_dir: Annotated[
        str,
        Meta(
            description="The directory of the spool, fetched models and caches, one for each "
            "device; if not set, ~/.local/state/seedwire/<device>."
        ),
    ] = ""
    models: Annotated[
        list[str],
        Meta(
            description="GGUF files, or directories of them, that the device has already; "
            "what is not among them is fetched."
        ),
    ] = []
    threads: Annotated[int, Meta(description="Threads that the engine computes with.")] = 1
    engine: Annotated[
        Literal["llama", "fake"],
        Meta(description="What runs the model: llama.cpp, or a fake one for trials without it."),
    ] = "llama"
    max_spool_bytes: Annotated[
        int,
        Meta(
            description="Bytes of disk for updates that are not settled yet; "
            "the oldest make room for new ones."
        ),
    ] = 64 * 1024 * 1024
    max_ledger_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Bytes of the ledger past which it forgets updates that are settled; "
            "0: never, for a witness of all that was measured.",
        ),
    ] = 16 * 1024 * 1024
    report_every_s: Annotated[
        float, Meta(description="Seconds between two reports when nothing has changed.")
    ] = 900.0
    work_timeout_s: Annotated[
        float,
        Meta(description="Seconds after which an engine that does not answer is ended."),
    ] = 3600.0
    health_file: Annotated[
        str,
        Meta(
            description="A file that shows every few seconds that the daemon lives and whether it "
            "is connected; `python -m shared.heartbeat` reads it."
        ),
    ] = ""
    log_level: Annotated[
        str, Meta(description="What is logged, on stderr: debug, info, warning or error.")
    ] = "info"

    @property
    def evaluates(self) -> bool:
        return self.trusted and bool(self.heldout)

    @property
    def kinds(self) -> list[str]:
        """The kinds of work that this device does."""
        return ["probe", "walk"] * bool(self.data) + ["evaluate"] * self.evaluates


def completed(settings: Settings) -> Settings:
    """`settings` with a device's name and a state directory, checked for what cannot work.

    Raises:
        ConfigError: names the setting and the mend.
    """
    device = device_name(settings.device)
    if settings.trusted and not settings.heldout:
        raise ConfigError("a trusted device needs rows to evaluate on: set heldout too")
    if settings.heldout and not settings.trusted:
        raise ConfigError("heldout is for trusted devices: set trusted too, or leave heldout out")
    if not settings.kinds:
        raise ConfigError("nothing to do: set data, or trusted and heldout")
    for name in ("data", "heldout"):
        if path := getattr(settings, name):
            _check_rows(name, path)
    for path in settings.models:
        if not os.access(Path(path).expanduser(), os.R_OK):
            raise ConfigError(
                f"models: {path} cannot be read; name a GGUF file, or a directory of them"
            )
    for name in ("threads", "max_spool_bytes", "report_every_s", "work_timeout_s"):
        if getattr(settings, name) <= 0:
            raise ConfigError(f"{name} must be more than 0")
    return msgspec.structs.replace(
        settings, device=device, state_dir=settings.state_dir or str(state_dir_of(device))
    )


def _check_rows(name: str, path: str) -> None:
    """A directory may be empty still; a file's rows are wanted now."""
    if hub.is_hub_name(path):
        hub.parse(path, data_set=True)
    elif not os.access(path, os.R_OK):
        raise ConfigError(f"{name}: {path} cannot be read; name {_ROWS}")
    elif not os.path.isdir(path) and not os.path.getsize(path):
        raise ConfigError(f"{name}: {path} is empty; name {_ROWS}")
    elif os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
        if b"\0" in head and not head.startswith(_GZIP):
            raise ConfigError(f"{name}: {path} is not text; give JSONL or CSV rows")


def device_name(given: str) -> str:
    """The device's name, or else this host's.

    Raises:
        ConfigError: it is none.
    """
    device = given or re.sub(r"[^A-Za-z0-9_-]", "-", platform.node())[:64] or "device"
    if not subjects.NAME.match(device):
        raise ConfigError(f"device {device!r}: use 1 to 64 of A-Z a-z 0-9 _ -")
    return device


def state_dir_of(device: str) -> Path:
    """Where a device keeps what it must not lose, unless it is told otherwise."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "seedwire" / device
