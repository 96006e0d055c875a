"""Sites of a job's rows, kept from round to round: they depend on deeper parameters alone."""

from collections import OrderedDict
from collections.abc import Hashable

from shared.engine.closed_form import Kept

CACHE_BYTES = 64 * 2**20


class SiteCache:
    """Sites by row of data, the least recently used dropped beyond `limit_bytes`."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._stamp = b""
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()

    def stand(self, stamp: bytes) -> None:
        """Forget everything unless it was measured at the same `stamp` of the deeper parameters."""
        if stamp != self._stamp:
            self._kept.clear()
            self._size_bytes = 0
            self._stamp = stamp

    def get(self, key: Hashable) -> Kept | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, sites: Kept) -> None:
        self._kept[key] = sites
        self._size_bytes += sites.size_bytes
        while self._size_bytes > self._limit_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._size_bytes -= dropped.size_bytes
