"""What services say of themselves."""

from typing import Annotated

from msgspec import Meta

from shared.messages.base import Message, Name, Seconds


class ServiceReport(Message, frozen=True):
    """A service's counters since it started; sent when they change, and each minute."""

    service: Name
    version: Annotated[str, Meta(max_length=40)]
    uptime_s: Seconds
    counters: Annotated[dict[str, int], Meta(max_length=500)]
    problem: str = ""
