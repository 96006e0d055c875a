"""What a model says at m positions, cut down to k tokens of each and one bucket for the rest.

Logits of several models add up bucket by bucket. That is exact for the k tokens; of the rest only
the log-sum-exp is known, so its sum takes the models to agree on the shape inside it. Over choices
the k tokens are all there are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Buckets:
    """Logits divided by the temperature, up to a constant of each position."""

    ids: NDArray[np.int32]
    """(m, k): the tokens."""
    logits: Floats
    """(m, k)"""
    rest: Floats
    """(m,): log-sum-exp of all other logits; -inf where there are none."""
    target: Floats
    """(m,): the logit of the token that followed; NaN where that is not known."""

    def log_shares(self) -> NDArray[np.float64]:
        """Log-probabilities of the k tokens and of the rest, in that order: (m, k + 1)."""
        together = np.concatenate([self.logits, self.rest[:, None]], axis=1).astype(np.float64)
        return together - _log_sum_exp(together)[:, None]

    def losses(self) -> NDArray[np.float64]:
        """The loss of the token that followed, in nats: (m,), NaN where it is not known."""
        together = np.concatenate([self.logits, self.rest[:, None]], axis=1).astype(np.float64)
        return _log_sum_exp(together) - self.target

    def right(self) -> NDArray[np.bool_]:
        """Whether no token of the k is likelier than the one that followed: (m,)."""
        return self.target >= self.logits.max(axis=1)

    def entropy(self) -> float:
        """Mean entropy over the buckets, in nats."""
        log_shares = self.log_shares()
        return float(-_weighted(np.exp(log_shares), log_shares).sum(axis=1).mean())


def steered(large: Buckets, tuned: Buckets, anchor: Buckets, alpha: float) -> Buckets:
    """The ensemble: `large` moved by `alpha` times what `tuned` says more than `anchor`.

    Source: Liu et al., arXiv:2401.08565, equation 1. All three are of the same tokens.
    """
    by = np.float32(alpha)
    rest = large.rest.copy()
    there = np.isfinite(rest)
    rest[there] += by * (tuned.rest[there] - anchor.rest[there])
    return Buckets(
        ids=large.ids,
        logits=(large.logits + by * (tuned.logits - anchor.logits)).astype(np.float32),
        rest=rest,
        target=(large.target + by * (tuned.target - anchor.target)).astype(np.float32),
    )


def divergence(teacher: Buckets, student: Buckets) -> float:
    """Mean KL(teacher || student) over the buckets, in nats."""
    of_teacher, of_student = teacher.log_shares(), student.log_shares()
    shares = np.exp(of_teacher)
    gap = _weighted(shares, of_teacher) - _weighted(shares, of_student)
    return float(gap.sum(axis=1).mean())


def cut(
    logits: Floats,
    targets: NDArray[np.int64],
    *,
    ids: NDArray[np.int32],
    choices: bool,
    temperature: float,
) -> Buckets:
    """`logits` (m, n) as buckets of the tokens `ids` (m, k).

    `targets` (m,): the token that followed, or -1. `choices`: there is nothing but the k tokens,
    and `targets` index them.
    """
    scaled = logits / np.float32(temperature)
    at_ids = np.take_along_axis(scaled, ids.astype(np.int64), axis=1)
    known = np.maximum(targets, 0)[:, None]
    target = np.take_along_axis(at_ids if choices else scaled, known, axis=1)[:, 0]
    target = np.where(targets >= 0, target, np.float32(np.nan))
    if choices or ids.shape[1] == logits.shape[1]:
        rest = np.full(len(logits), -np.inf, np.float32)
    else:
        np.put_along_axis(scaled, ids.astype(np.int64), -np.inf, axis=1)
        rest = _log_sum_exp(scaled).astype(np.float32)
    return Buckets(ids, at_ids, rest, target.astype(np.float32))


def likeliest(logits: Floats, k: int) -> NDArray[np.int32]:
    """The k likeliest tokens of each position, in ascending order of their numbers: (m, k)."""
    k = min(k, logits.shape[1])
    found = np.argpartition(logits, -k, axis=1)[:, -k:]
    return np.sort(found, axis=1).astype(np.int32)


def joined(parts: list[Buckets]) -> Buckets:
    """The positions of all `parts`, in order."""
    return Buckets(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "logits", "rest", "target")
        )
    )


def _weighted(shares: NDArray[np.float64], log_shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """`shares` times `log_shares`, where there is a share."""
    return shares * np.where(shares > 0, log_shares, 0.0)


def _log_sum_exp(logits: NDArray[np.float64] | Floats) -> NDArray[np.float64]:
    """(m, n) to (m,)"""
    largest = logits.max(axis=1)
    sums = np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
    return largest + np.log(sums)
