"""The adapter: fixed-point numbers over a frozen base, moved by commits, proved by a digest.

Theta = 2^-24 * theta, int32; theta = 0 is the base model. All arithmetic is on integers, so every
process that applies the same commits holds the same bytes. Knows no engine: what a block means in
the model is the engine's business.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from shared import directions
from shared.codec import decode_manifest
from shared.errors import InvalidUpdate, MalformedMessage
from shared.messages import Block, Commit, Manifest, Term

UNIT = 2.0**-24
"""One step of theta's integers."""

MAX_COEFFICIENT = 2**22
_INT32 = np.iinfo(np.int32)


def size(block: Block) -> int:
    """How many parameters a block has."""
    count = 1
    for length in block.shape:
        count *= length
    return count


@dataclass(frozen=True)
class Layout:
    """Where each block of a manifest lies in theta."""

    manifest: Manifest

    @cached_property
    def offsets(self) -> list[int]:
        """First parameter of each block, and d at the end: (blocks + 1,)."""
        offsets = [0]
        for block in self.manifest.blocks:
            offsets.append(offsets[-1] + size(block))
        return offsets

    @property
    def d(self) -> int:
        return self.offsets[-1]

    @property
    def everything(self) -> tuple[int, int]:
        """The scope of all blocks."""
        return (0, len(self.manifest.blocks))

    def span(self, scope: tuple[int, int]) -> tuple[int, int]:
        """(first parameter, count) of the blocks [first, first + count).

        Raises:
            InvalidUpdate: the scope leaves the manifest.
        """
        first, count = scope
        if first + count > len(self.manifest.blocks):
            raise InvalidUpdate(f"scope {scope} in a manifest of {len(self.manifest.blocks)}")
        return self.offsets[first], self.offsets[first + count] - self.offsets[first]

    @cached_property
    def scales(self) -> NDArray[np.uint8] | None:
        """The scale exponent of every parameter, (d,) uint8; None where all are 0."""
        if not any(block.scale for block in self.manifest.blocks):
            return None
        counts = [size(block) for block in self.manifest.blocks]
        return np.repeat(np.array([b.scale for b in self.manifest.blocks], np.uint8), counts)

    @cached_property
    def magnitudes(self) -> NDArray[np.float32]:
        """What a unit step along a direction moves each parameter by: (d,) float32."""
        if self.scales is None:
            return np.ones(self.d, np.float32)
        return np.exp2(self.scales.astype(np.float32))

    def check(self) -> None:
        """Find a manifest whose parts do not fit together.

        Raises:
            MalformedMessage: names the block and what is wrong with it.
        """
        slots = {
            (block.tensor, block.slot): block.d_in
            for block in self.manifest.blocks
            if block.kind == "lora_b"
        }
        for number, block in enumerate(self.manifest.blocks):
            where = f"block {number} ({block.kind} of {block.tensor})"
            if block.kind in ("output_rows", "prompt"):
                if len(block.shape) != 2 or block.shape[0] != len(block.rows):
                    raise MalformedMessage(f"{where}: shape must be [rows, n_embd]")
            elif len(block.shape) != 1:
                raise MalformedMessage(f"{where}: shape must be one length")
            if (block.kind == "prompt") == (block.unit is UNSET):
                raise MalformedMessage(f"{where}: a prompt, and nothing else, has a unit")
            if block.kind == "lora_b" and not block.d_in:
                raise MalformedMessage(f"{where}: d_in is missing")
            if block.kind == "lora_a" and slots.get((block.tensor, block.slot)) != block.shape[0]:
                raise MalformedMessage(f"{where}: no lora_b of slot {block.slot} has such an A")
        if self.d != self.manifest.d:
            raise MalformedMessage(f"manifest says d = {self.manifest.d}, its blocks {self.d}")


class Snapshot(msgspec.Struct, frozen=True):
    """An adapter's numbers as they lie in a blob; `velocity` is empty without momentum."""

    epoch: int
    round: int
    theta: bytes
    velocity: bytes


class Adapter:
    """Theta (and V, with momentum) after the close of `round`."""

    def __init__(self, manifest_bytes: bytes) -> None:
        """Theta = 0 at round 0 of the epoch that `manifest_bytes` describes.

        Raises:
            MalformedMessage: not a manifest, or one whose parts do not fit together.
        """
        self.manifest = decode_manifest(manifest_bytes)
        self.layout = Layout(self.manifest)
        self.layout.check()
        self._manifest_digest = hashlib.sha256(manifest_bytes).digest()
        self.round = 0
        self.theta: NDArray[np.int32] = np.zeros(self.layout.d, np.int32)
        momentum = self.manifest.update_rule == "momentum"
        self.velocity: NDArray[np.int64] | None = (
            np.zeros(self.layout.d, np.int64) if momentum else None
        )
        self._digest: str | None = None

    @classmethod
    def fresh(cls, manifest_bytes: bytes) -> "Adapter":
        return cls(manifest_bytes)

    @classmethod
    def placed(cls, manifest_bytes: bytes, round: int, theta: NDArray[np.int32]) -> "Adapter":
        """At `theta` (d,) int32 after `round`, without velocity."""
        adapter = cls(manifest_bytes)
        adapter.round, adapter.theta = round, theta.astype(np.int32)
        return adapter

    @classmethod
    def from_bytes(cls, manifest_bytes: bytes, data: bytes) -> "Adapter":
        """The adapter of a snapshot.

        Raises:
            MalformedMessage: the snapshot is not one, or belongs to another manifest.
        """
        adapter = cls(manifest_bytes)
        try:
            snapshot = msgspec.msgpack.decode(data, type=Snapshot)
            theta = np.frombuffer(snapshot.theta, "<i4")
            velocity = np.frombuffer(snapshot.velocity, "<i8")
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise MalformedMessage(f"not a snapshot: {error}") from error
        wanted = 0 if adapter.velocity is None else adapter.layout.d
        if (
            snapshot.epoch != adapter.manifest.epoch
            or len(theta) != adapter.layout.d
            or len(velocity) != wanted
        ):
            raise MalformedMessage("the snapshot belongs to another manifest")
        adapter.round = snapshot.round
        adapter.theta = theta.astype(np.int32)
        if adapter.velocity is not None:
            adapter.velocity = velocity.astype(np.int64)
        return adapter

    def to_bytes(self) -> bytes:
        """A snapshot, for `from_bytes`."""
        velocity = b"" if self.velocity is None else self.velocity.astype("<i8").tobytes()
        theta = self.theta.astype("<i4").tobytes()
        return msgspec.msgpack.encode(Snapshot(self.manifest.epoch, self.round, theta, velocity))

    def values(self) -> NDArray[np.float32]:
        """Theta as floats: (d,) float32."""
        return (self.theta * UNIT).astype(np.float32)

    def digest(self) -> str:
        """What proves two holders to be in step; 64 hexadecimal digits."""
        if self._digest is None:
            sha = hashlib.sha256(b"seedwire1")
            sha.update(self._manifest_digest)
            sha.update(self.manifest.epoch.to_bytes(4, "little"))
            sha.update(self.round.to_bytes(4, "little"))
            sha.update(self.theta.astype("<i4", copy=False).data)
            if self.velocity is not None:
                sha.update(self.velocity.astype("<i8", copy=False).data)
            self._digest = sha.hexdigest()
        return self._digest

    def after(self, round: int, commit: Commit | None) -> "Adapter":
        """The adapter after the close of `round`; this one stays as it is.

        Raises:
            OverflowError: theta would leave int32. A logged commit never does.
        """
        successor = copy.copy(self)
        successor.apply(round, commit)
        return successor

    def apply(self, round: int, commit: Commit | None) -> None:
        """Move to after the close of `round`.

        Raises:
            OverflowError: theta would leave int32; nothing has moved. A logged commit never does.
        """
        if commit is not None:
            theta, velocity = self._moved(commit)
            self.theta, self.velocity = theta, velocity
        self.round = round
        self._digest = None

    def fitting(self, commit: Commit) -> Commit:
        """`commit`, its coefficients halved until theta stays within int32.

        If the momentum alone would leave int32, it is dropped first.
        """
        while True:
            try:
                self._moved(commit)
            except OverflowError:
                terms = [halved(term) for term in commit.terms]
                commit = Commit(momentum=0, terms=terms)
            else:
                return commit

    def total(self, terms: Sequence[Term]) -> NDArray[np.int64]:
        """The sum of all terms' directions, before the blocks' scales: (d,) int64."""
        whole: NDArray[np.int64] | None = None
        for term in terms:
            start, count = self.layout.span(term.scope)
            part = directions.total(
                self.manifest.seed,
                term.stream_round,
                term.ranges,
                coefficients(term),
                start,
                count,
                self.manifest.distribution,
            )
            if whole is None and count == self.layout.d:
                whole = part
                continue
            if whole is None:
                whole = np.zeros(self.layout.d, np.int64)
            whole[start : start + count] += part
        return np.zeros(self.layout.d, np.int64) if whole is None else whole

    def _moved(self, commit: Commit) -> tuple[NDArray[np.int32], NDArray[np.int64] | None]:
        step = self.total(commit.terms)
        velocity = None
        if self.velocity is not None:
            step += (self.velocity * commit.momentum) >> 8
            velocity, step = step, step.copy()
        # In place: at d = 1e6 every copy is 8 MB.
        if self.layout.scales is not None:
            step <<= self.layout.scales
        step += self.theta
        if step.min() < _INT32.min or step.max() > _INT32.max:
            raise OverflowError("theta would leave int32")
        return step.astype(np.int32), velocity


def next_epoch(manifest: Manifest) -> Manifest:
    """The same adapter, over the same A, in the epoch that follows."""
    return msgspec.structs.replace(manifest, epoch=manifest.epoch + 1, a_epoch=manifest.epoch_of_a)


def coefficients(term: Term) -> NDArray[np.int32]:
    """A term's coefficients: (n,) int32, n = directions in its ranges."""
    return np.frombuffer(term.coefficients, "<i4").astype(np.int32, copy=False)


def term(
    stream_round: int,
    scope: tuple[int, int],
    ranges: list[tuple[int, int]],
    values: NDArray[np.int64],
) -> Term:
    """The Term of integer coefficients (n,), held within +-2^22."""
    held = np.clip(values, -MAX_COEFFICIENT, MAX_COEFFICIENT).astype("<i4")
    return Term(stream_round, scope, ranges, held.tobytes())


def halved(term: Term) -> Term:
    """The same directions with half the coefficients, rounded towards zero."""
    half = (coefficients(term) / 2).astype("<i4")
    return msgspec.structs.replace(term, coefficients=half.tobytes())
