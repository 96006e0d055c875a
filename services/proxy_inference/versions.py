"""Which version serves: a job's best on held-out rows, or its newest, or the one on command.

Never one that was refused. Pure: facts of the log and what lies on disk go in, a version to serve
comes out. Versions that are overtaken before they are served are skipped, not queued.
"""

from collections.abc import Iterable

import msgspec

from services.proxy_inference.preferring import Prefer, Preference
from shared.messages import BlobRef, EpochOpened, JobOpened, JobSpec, LogEvent, ModelPublished

BASE = "base"

_PUBLISHED_KNOWN = 64
"""So many published versions of a job are remembered, and its best."""

_ANOTHER_LOG = 2**53


class Version(msgspec.Struct, frozen=True):
    """One published adapter. `sequence` is its place in the log."""

    job: str
    epoch: int
    round: int
    digest: str
    snapshot: BlobRef
    sequence: int

    @property
    def name(self) -> str:
        return f"{self.job}@{self.round}"

    @property
    def fingerprint(self) -> str:
        return f"{self.name}-{self.digest[:12]}"


class Pin(msgspec.Struct, frozen=True):
    """The operator's word: this round of this job, until it is told to follow again."""

    job: str
    round: int


class UnknownVersion(Exception):
    """No such version can be served; the text says which can."""


class Versions:
    """Everything known of the fleet's versions."""

    def __init__(
        self,
        job: str = "",
        *,
        pin: Pin | None = None,
        prefer: Prefer = "best",
        served: str = "",
    ) -> None:
        """`job`: serve this one alone; empty: the one that published last.

        `served` is the digest of what served before a restart; it serves on until the log is read.
        """
        self.pin = pin
        self._preference = Preference(prefer)
        self._served = served
        self.refused: dict[str, str] = {}
        """Why, by digest of the adapter."""
        self._only = job
        self._specs: dict[str, JobSpec] = {}
        self._manifests: dict[tuple[str, int], bytes] = {}
        self._anchors: dict[tuple[str, int], BlobRef] = {}
        self._known: dict[tuple[str, int], Version] = {}
        """By job and round; a later epoch's takes an earlier one's place."""
        self._kept: set[tuple[str, int]] = set()
        """Those on disk."""
        self._logged: set[str] = set()
        """Digests that this broker's log has published."""

    def see(self, sequence: int, event: LogEvent) -> None:
        """Take in one fact of the log."""
        self._preference.see(event)
        match event:
            case JobOpened():
                self._specs[event.job] = event.spec
            case EpochOpened():
                self._manifests[event.job, event.epoch] = event.manifest
                if event.anchor is not None:
                    self._anchors[event.job, event.epoch] = event.anchor
            case ModelPublished():
                version = Version(
                    event.job, event.epoch, event.round, event.digest, event.snapshot, sequence
                )
                self._add(version)
                self._logged.add(version.digest)
            case _:
                pass

    def keep(self, version: Version, spec: JobSpec, manifest: bytes) -> None:
        """The version lies on disk; what it needs beside its numbers is known."""
        self._specs.setdefault(version.job, spec)
        self._manifests.setdefault((version.job, version.epoch), manifest)
        self._add(version)
        self._kept.add((version.job, version.round))

    def anchor(self, version: Version) -> BlobRef | None:
        """What stands for the base model beside this version; None: the base model itself."""
        return self._anchors.get((version.job, version.epoch))

    def history_read(self) -> None:
        """All that the log has is known: what it does not have came before it, from another."""
        for key, version in self._known.items():
            if version.digest not in self._logged and version.sequence >= 0:
                before = version.sequence - _ANOTHER_LOG
                self._known[key] = msgspec.structs.replace(version, sequence=before)
        self._served = ""

    def forget(self, version: Version) -> None:
        """The version lies on disk no more."""
        self._kept.discard((version.job, version.round))

    def refuse(self, version: Version, why: str) -> None:
        """The version cannot be served, now or later."""
        self.refused[version.digest] = why

    def miss(self, version: Version) -> bool:
        """The store does not have it; whether another is wanted in its place."""
        self._preference.miss(version.digest)
        return self.wanted() != version

    def wanted(self) -> Version | None:
        """The version that should serve; None if nothing was published."""
        if self.pin is not None:
            pinned = self._known.get((self.pin.job, self.pin.round))
            if pinned is not None and pinned.digest not in self.refused:
                return pinned
        usable = [one for one in self._usable() if self._only in ("", one.job)]
        newest = max(usable, key=lambda one: one.sequence, default=None)
        if newest is None:
            return None
        served = next((one for one in usable if one.digest == self._served), None)
        return served or self._best(newest.job) or newest

    def of(self, job: str, round: int | None = None) -> Version:
        """A job's version after `round`, or the one that is preferred (or pinned).

        Raises:
            UnknownVersion: there is none.
        """
        if round is None and self.pin is not None and self.pin.job == job:
            round = self.pin.round
        found = [one for one in self._usable(job) if round in (None, one.round)]
        if not found:
            raise UnknownVersion(self._no_version(job, round))
        best = self._best(job) if round is None else None
        return best or max(found, key=lambda one: one.sequence)

    def rollback(self, serving: Version | None, round: int | None) -> Pin:
        """Pin `round` of the job that serves, or what came before its present version.

        Raises:
            UnknownVersion: it is not on disk.
        """
        if serving is None:
            raise UnknownVersion("the base model serves; there is no version to go back from")
        kept = [one for one in self._usable(serving.job) if (one.job, one.round) in self._kept]
        if round is None:
            found = [one for one in kept if one.sequence < serving.sequence]
        else:
            found = [one for one in kept if one.round == round]
        if not found:
            rounds = ", ".join(str(one.round) for one in sorted(kept, key=lambda one: one.sequence))
            there = f"on disk: {'round' if len(kept) == 1 else 'rounds'} {rounds}"
            what = f"older than round {serving.round}" if round is None else f"of round {round}"
            there = there if kept else "none is on disk"
            raise UnknownVersion(f"{serving.job}: no version {what} is kept; {there}")
        chosen = max(found, key=lambda one: one.sequence)
        self.pin = Pin(chosen.job, chosen.round)
        return self.pin

    def follow(self) -> None:
        """Serve the preferred again, and whatever comes; what was refused is tried again."""
        self.pin = None
        self.refused.clear()
        self._served = ""

    def listed(self) -> list[Version]:
        """Versions that can be asked for by name, newest first: those on disk, and the wanted."""
        wanted = self.wanted()
        kept = [
            one for one in self._usable() if (one.job, one.round) in self._kept or one == wanted
        ]
        return sorted(kept, key=lambda one: -one.sequence)

    def surplus(self, count: int, serving: Iterable[Version]) -> list[Version]:
        """Versions on disk beyond the newest `count` of each job, but for those in use."""
        held = {one.name for one in serving} | {f"{p.job}@{p.round}" for p in [self.pin] if p}
        held |= {best.name for job in {job for job, _ in self._kept} if (best := self._best(job))}
        surplus: list[Version] = []
        for job in {job for job, _ in self._kept}:
            kept = [self._known[key] for key in self._kept if key[0] == job]
            kept.sort(key=lambda one: -one.sequence)
            surplus += [one for one in kept[count:] if one.name not in held]
        return surplus

    def spec(self, job: str) -> JobSpec | None:
        return self._specs.get(job)

    def manifest(self, version: Version) -> bytes | None:
        return self._manifests.get((version.job, version.epoch))

    def kept(self, version: Version) -> bool:
        return (version.job, version.round) in self._kept

    def _add(self, version: Version) -> None:
        known = self._known.get((version.job, version.round))
        if known is not None and known.digest != version.digest:
            self._kept.discard((version.job, version.round))
        self._known[version.job, version.round] = version
        mine = sorted(
            (one for one in self._known.values() if one.job == version.job),
            key=lambda one: one.sequence,
        )
        best = self._best(version.job) if len(mine) > _PUBLISHED_KNOWN else None
        for old in mine[:-_PUBLISHED_KNOWN]:
            if (old.job, old.round) not in self._kept and old != best:
                del self._known[old.job, old.round]

    def _best(self, job: str) -> Version | None:
        """What did best on held-out rows, of what can be had; None where nothing was measured."""
        usable = {one.digest: one for one in self._usable(job)}
        kept = {self._known[key].digest for key in self._kept if key[0] == job}
        epochs = {digest: one.epoch for digest, one in usable.items()}
        best = self._preference.best(job, epochs, kept)
        return None if best is None else usable[best]

    def _usable(self, job: str = "") -> list[Version]:
        return [
            one
            for one in self._known.values()
            if job in ("", one.job) and one.digest not in self.refused
        ]

    def _no_version(self, job: str, round: int | None) -> str:
        if job not in {one.job for one in self._known.values()}:
            known = sorted({one.job for one in self._known.values()}) or ["none yet"]
            return f"no job {job!r} has published a version; jobs that have: {', '.join(known)}"
        rounds = ", ".join(str(one.round) for one in self.listed() if one.job == job)
        what = "no version that can be served" if round is None else f"no round {round}"
        return f"{job} has {what}; rounds at hand: {rounds or 'none'}"
