"""The broker in memory with a witness at its side, and clients that can vanish."""

from collections.abc import Callable, Mapping

from shared.memory_bus import MemoryBroker, MemoryBus, _Stream  # pyright: ignore[reportPrivateUsage]

Stored = Callable[[str, int, str, bytes], None]
"""(stream, sequence, subject, data)"""
Said = Callable[[str, bytes], None]
"""(subject, data)"""


class WatchedBroker(MemoryBroker):
    """Tells of everything it stores and everything it is handed."""

    def __init__(self, stored: Stored, said: Said) -> None:
        super().__init__()
        self._stored = stored
        self._said = said

    def connect(self, name: str) -> "ChaosClient":
        client = self.clients[name] = ChaosClient(self, name)
        return client

    def store(
        self,
        stream: "_Stream",  # pyright: ignore[reportPrivateUsage]
        subject: str,
        data: bytes,
        headers: Mapping[str, str],
    ) -> int:
        sequence = super().store(stream, subject, data, headers)
        self._stored(stream.spec.name, sequence, subject, data)
        return sequence

    def published(self, subject: str, data: bytes, headers: Mapping[str, str]) -> None:
        self._said(subject, data)
        super().published(subject, data, headers)


class ChaosClient(MemoryBus):
    """A client that can be left behind by its process."""

    def __init__(self, broker: WatchedBroker, name: str) -> None:
        super().__init__(broker, name)
        self.broker = broker

    def abandon(self) -> None:
        """The process at its end is gone: what it had not sent is lost."""
        self.cut_off()
        self._closed = True
        self._outgoing.clear()
        if self.broker.clients.get(self.name) is self:
            del self.broker.clients[self.name]
        for one in self.broker.subscribers:
            if one.client is self:
                one.mailbox.close()
