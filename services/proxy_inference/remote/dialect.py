"""How a completion is asked for: OpenAI's way with this or that extension, or llama-server's. Pure.

Filters that are not named in a request have a server's own defaults, which cut the distribution
short; so all that we know of are named, and switched off, as far as the server takes the names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from services.proxy_inference.sampling import Sampling

Json = dict[str, object]
Prompt = str | Sequence[int]

PLAIN = Sampling()


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to ask."""

    path: str
    """Below the server's address; /v1 is part of it."""
    own: bool = False
    """llama-server's own names instead of OpenAI's."""
    filters: Literal["zero", "minus", "none"] = "none"
    """What top_k switches itself off with, if the server knows top_k, min_p and penalties."""
    by_id: bool = False
    """The likeliest tokens are asked for by id."""

    def body(
        self,
        model: str,
        prompt: Prompt,
        *,
        top: int | None = None,
        length: int = 1,
        sampling: Sampling = PLAIN,
        bias: Mapping[int, float] | None = None,
        seed: int | None = None,
    ) -> Json:
        """A request for `length` tokens, each with its `top` likeliest; None: no log-probabilities.

        Of `sampling`, its penalties and its bias are not sent: a server counts them its own way.
        """
        asked: Json = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": False,
        }
        if model:
            asked["model"] = model
        if seed is not None:
            asked["seed"] = seed
        if self.own:
            asked |= {"n_predict": length, "cache_prompt": True, "return_tokens": True}
            if top is not None:
                asked |= {"n_probs": top, "post_sampling_probs": False}
            if bias:
                asked["logit_bias"] = [[token, value] for token, value in bias.items()]
        else:
            asked["max_tokens"] = length
            if top is not None:
                asked["logprobs"] = top
            if bias:
                asked["logit_bias"] = {str(token): value for token, value in bias.items()}
            if self.by_id:
                asked["return_tokens_as_token_ids"] = True
        if self.filters != "none":
            off = 0 if self.filters == "zero" else -1
            asked |= {"top_k": sampling.top_k or off, "min_p": sampling.min_p}
            asked |= {"repeat_penalty": 1.0, "repetition_penalty": 1.0}
        return asked

    def serves(self, sampling: Sampling) -> bool:
        """Whether the server applies all filters of `sampling`."""
        return self.filters != "none" or not (sampling.top_k or sampling.min_p)


OPENAI = "/v1/completions"
OWN = "/completion"

WAYS = (
    Dialect(OPENAI, filters="zero", by_id=True),
    Dialect(OPENAI, filters="minus", by_id=True),
    Dialect(OPENAI),
    Dialect(OWN, own=True, filters="zero"),
)
"""In the order in which they are tried."""
