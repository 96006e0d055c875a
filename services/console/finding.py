"""What `seedwire doctor` found out, one thing each."""

from typing import Literal

import msgspec

State = Literal["ok", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at, how it is, and, where it is not well, the mend."""

    check: str
    """What was looked at: broker, streams, aggregator, device, model, data, ..."""
    state: State
    """`warning`: it works, but not for everything or not for long. `problem`: it does not."""
    text: str
    mend: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warning(check: str, text: str, mend: str) -> Finding:
    return Finding(check, "warning", text, mend)


def problem(check: str, text: str, mend: str) -> Finding:
    return Finding(check, "problem", text, mend)
