"""Whether an answer is the one that a model gives alone, but for near ties.

The layout of a batch moves the last bits of the logits, and so may let another of two tokens win
that are as good as equal. Measured on llama-3m with a LoRA, alone against eight together: the lead
of the first token changes by at most 0.009 nat in F16, but by 0.18 in Q8_0, whose kernels round
activations to 8 bits; so this is judged on models in F16 or F32.
"""

from dataclasses import dataclass
from typing import Any

TIE_NATS = 0.03
ALONE = 3
"""What `logprobs` a completion is to be asked for, to be the measure of others; for those, 0."""


@dataclass(frozen=True)
class Alone:
    """What a model says to a prompt when nothing else runs."""

    tokens: list[str]
    leads: list[float]
    """By how much each token led the next, in nats."""

    def explains(self, tokens: list[str], *, times: float = 1.0) -> bool:
        """Whether `tokens` are this answer, up to a near tie at the first that differs.

        Logits that are a sum of several have `times` the noise of one model's.
        """
        for lead, mine, theirs in zip(self.leads, self.tokens, tokens, strict=True):
            if mine != theirs:
                return lead < times * TIE_NATS
        return True


def alone(choice: Any) -> Alone:
    """A greedy answer's choice as the measure of others; one token may be biased away."""
    told = choice["logprobs"]
    leads = [
        own - max(value for value in top.values() if value < own)  # above it: what was biased away
        for own, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True)
    ]
    return Alone(told["tokens"], leads)


def tokens(choice: Any) -> list[str]:
    """The tokens of an answer that was asked for with `logprobs`."""
    return list(choice["logprobs"]["tokens"])
