"""Settings of the edge daemon."""

import os
import platform
import re
from pathlib import Path
from typing import Literal

import msgspec

from shared import subjects
from shared.errors import ConfigError

PREFIX = "SEEDWIRE_EDGE"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon that measures for Seedwire on one device; private data never leaves it."""

    device: str = ""
    """What the device is called: one subject token; empty: made from the host's name."""
    servers: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    user: str = ""
    password: str = ""
    token: str = ""
    creds_file: str = ""
    ca_file: str = ""
    data: str = ""
    """JSONL rows to tune on; may be empty on a device that only evaluates."""
    heldout: str = ""
    """JSONL rows to evaluate on; used only where `trusted`."""
    trusted: bool = False
    state_dir: str = ""
    """Spool, downloaded models, caches; empty: under the user's XDG state directory."""
    models: list[str] = []
    """GGUF files, or directories of them, that the device has already."""
    threads: int = 1
    engine: Literal["llama", "fake"] = "llama"
    max_spool_bytes: int = 64 * 1024 * 1024
    report_every_s: float = 900.0
    work_timeout_s: float = 3600.0
    """An engine that is silent for longer is ended."""
    log_level: str = "info"

    @property
    def evaluates(self) -> bool:
        return self.trusted and bool(self.heldout)

    @property
    def kinds(self) -> list[str]:
        """The kinds of work that this device does."""
        return ["probe"] * bool(self.data) + ["evaluate"] * self.evaluates


def completed(settings: Settings) -> Settings:
    """`settings` with a device's name and a state directory, checked for what cannot work.

    Raises:
        ConfigError: names the setting and the mend.
    """
    device = settings.device or re.sub(r"[^A-Za-z0-9_-]", "-", platform.node())[:64] or "device"
    if not subjects.NAME.match(device):
        raise ConfigError(f"device {device!r}: use 1 to 64 of A-Z a-z 0-9 _ -")
    if not settings.kinds:
        raise ConfigError("nothing to do: set data, or trusted and heldout")
    for name in ("data", "heldout"):
        path = getattr(settings, name)
        if path and not os.access(path, os.R_OK):
            raise ConfigError(f"{name}: {path} cannot be read; name a JSONL file")
    for name in ("threads", "max_spool_bytes", "report_every_s", "work_timeout_s"):
        if getattr(settings, name) <= 0:
            raise ConfigError(f"{name} must be more than 0")
    return msgspec.structs.replace(
        settings, device=device, state_dir=settings.state_dir or str(_state_home() / device)
    )


def _state_home() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "seedwire"
