"""What changed since when: lets any number of readers catch up, each at its own pace.

A reader remembers one number. One that fell too far behind is told so, and reads everything.
"""

Key = tuple[str, str, str | int]
"""(what kind of row, job or "", name or number)."""

MAX_CHANGES = 50_000


class Journal:
    """The newest change of each key; past `limit` keys the oldest are forgotten."""

    def __init__(self, limit: int = MAX_CHANGES) -> None:
        self.version = 0
        """Of the last change; grows by one with each."""
        self._limit = limit
        self._changed: dict[Key, int] = {}
        """Oldest change first."""
        self._forgotten = 0

    def mark(self, kind: str, job: str, name: str | int) -> None:
        """This row is another one now, or gone."""
        key = (kind, job, name)
        self.version += 1
        self._changed.pop(key, None)
        self._changed[key] = self.version
        if len(self._changed) > self._limit:
            self._forgotten = self._changed.pop(next(iter(self._changed)))

    def since(self, version: int) -> list[Key] | None:
        """Each key that changed after `version`, once, oldest first; None: too long ago."""
        if version < self._forgotten:
            return None
        found: list[Key] = []
        for key in reversed(self._changed):
            if self._changed[key] <= version:
                break
            found.append(key)
        return found[::-1]
