"""The broker in memory, and what an accountant at its side reads off the messages."""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

from shared import subjects
from shared.bus import Stored
from shared.codec import decode
from shared.memory_bus import MemoryBroker, MemoryBus, _Stream  # pyright: ignore[reportPrivateUsage]
from shared.messages import LogEvent, Message, SubmitUpdate

Fact = Callable[[LogEvent], None]


@dataclass
class Account:
    """What devices have spent by now, by their own updates: each key once, whatever came of it."""

    forward_tokens: int = 0
    updates: int = 0
    _keys: set[str] = field(default_factory=set[str])

    def take(self, update: SubmitUpdate) -> None:
        key = update.key.text()
        if key not in self._keys:
            self._keys.add(key)
            self.updates += 1
            self.forward_tokens += update.passes


class Wire(MemoryBroker):
    """Counts each update that it stores, and tells `fact` of each event of LOG."""

    def __init__(self, fact: Fact) -> None:
        super().__init__()
        self.account = Account()
        self.messages = 0
        self._fact = fact

    def connect(self, name: str) -> "Metered":
        client = self.clients[name] = Metered(self, name)
        return client

    def store(
        self,
        stream: "_Stream",  # pyright: ignore[reportPrivateUsage]
        subject: str,
        data: bytes,
        headers: Mapping[str, str],
    ) -> int:
        # Before it is stored: nobody has acted on it yet.
        if stream.spec.name == subjects.UPDATES_STREAM:
            self.account.take(decode(data, SubmitUpdate))
        sequence = super().store(stream, subject, data, headers)
        if stream.spec.name == subjects.LOG_STREAM:
            event = decode(data, Message)
            if isinstance(event, LogEvent):
                self._fact(event)
        return sequence

    def route(self, subject: str, data: bytes, headers: Mapping[str, str], reply: str = "") -> int:
        self.messages += 1
        return super().route(subject, data, headers, reply)


class Metered(MemoryBus):
    """A client whose reads of streams are counted too: `down` and `up` are bytes of messages."""

    def __init__(self, broker: Wire, name: str) -> None:
        super().__init__(broker, name)
        self._read = 0

    @property
    def up(self) -> int:
        return self.traffic.bytes_out

    @property
    def down(self) -> int:
        return self.traffic.bytes_in + self._read

    async def get(self, stream: str, sequence: int) -> Stored | None:
        return self._counted(await super().get(stream, sequence))

    async def get_last(
        self, stream: str, subject: str, *, timeout_s: float = 10.0
    ) -> Stored | None:
        return self._counted(await super().get_last(stream, subject, timeout_s=timeout_s))

    async def read(
        self, stream: str, subject: str, *, after: int = 0, up_to: int = 0
    ) -> AsyncGenerator[Stored, None]:
        async for one in super().read(stream, subject, after=after, up_to=up_to):
            self._counted(one)
            yield one

    def _counted(self, one: Stored | None) -> Stored | None:
        self._read += len(one.data) if one is not None else 0
        return one
