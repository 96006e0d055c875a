"""The large model: asked for what it thinks of the next token, or for the next token itself.

Pull: its log-probabilities come here, as many as it tells, and the small models' difference is
added here. Push: the difference goes there as a bias on its logits, and one token comes back.
Neither is exact, and each answer says how far off it may be.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.proxy_inference.remote import link as links
from services.proxy_inference.remote.capabilities import MOST, Capabilities, probe
from services.proxy_inference.remote.dialect import Prompt
from services.proxy_inference.remote.link import PATIENT, Link, Patience, Refused
from services.proxy_inference.remote.reading import Answer, answer
from services.proxy_inference.remote.spelling import Alphabet, Spelling
from services.proxy_inference.remote.tail import NOTHING, Filled, Told, fill
from services.proxy_inference.sampling import Sampling
from shared.errors import ConfigError, EngineError, TransientError
from shared.logs import get

log = get("remote")

_BAN = -100.0
_LONG = 1000
"""Tokens; to spell so many and cut them again takes a millisecond, at every position."""


class RemoteLarge:
    """A large model on a server. Use `opened`. It belongs to the event loop that opened it."""

    def __init__(self, link: Link, capabilities: Capabilities, spelling: Spelling) -> None:
        self.capabilities = capabilities
        self.asked = 0
        """Answers that the server gave."""
        self._link = link
        self._spelling = spelling
        self.nameless = spelling.nameless
        """(n_vocab,): the tokens that the server has no name for."""
        if capabilities.names_ids:
            self.nameless = np.zeros(spelling.alphabet.size, bool)
        ends = {token: max(_BAN, -capabilities.reach) for token in spelling.alphabet.ends}
        # Of a position whose likeliest token ends the text, servers tell nothing at all.
        self._ban = ends if capabilities.reach and capabilities.before_bias else {}

    @property
    def retries(self) -> int:
        """Requests that had to be sent again."""
        return self._link.retries

    async def logits(self, tokens: Sequence[int], base: NDArray[np.floating]) -> Filled:
        """Pull: what it thinks of the token after `tokens`; `base` (n_vocab,) shapes the rest.

        Raises:
            TransientError: no answer, however often it was asked; names the server.
            EngineError: it refused, or answered what makes no sense.
        """
        return self.filled(await self.told(tokens), base)

    def filled(self, told: Told, base: NDArray[np.floating]) -> Filled:
        """The second half of `logits`, for whoever computes `base` while the server is asked."""
        return fill(told, base, self.nameless)

    def check(self, tokens: Sequence[int]) -> None:
        """Raises EngineError for a prompt that cannot be sent as it is meant; names the mend."""
        if not self.capabilities.takes_ids:
            self._spelling.prompt(tokens)

    def hears(self, tokens: Sequence[int]) -> bool:
        """Whether it can be asked what comes after `tokens`."""
        return self._prompt(tokens)[0] is not None

    async def told(self, tokens: Sequence[int]) -> Told:
        """What it says of the token after `tokens`: nothing where a server that takes only text
        cannot be asked, as in the middle of a character. Raises as `logits`."""
        can = self.capabilities
        prompt, count, drifted = await self._sent(tokens)
        if prompt is None:
            return NOTHING
        sampling = Sampling(temperature=0.0 if can.before_temperature else 1.0)
        said = await self._ask(prompt, count, top=can.top, sampling=sampling, bias=self._ban)
        if not said.positions:
            return NOTHING
        top = said.positions[0].top
        size = self._spelling.alphabet.size
        found: dict[int, float] = {}
        for one in top:
            token = self._spelling.token(one.text) if one.id is None else one.id
            if token is not None and 0 <= token < size:
                found.setdefault(token, min(one.logprob, 0.0))
        # The token that was chosen may have been added to the list: it bounds nothing.
        ranked = sorted((one.logprob for one in top), reverse=True)[: can.top]
        return Told(
            np.fromiter(found.keys(), np.int64, len(found)),
            np.fromiter(found.values(), np.float64, len(found)),
            min(ranked[-1], 0.0) if ranked else 0.0,
            drifted,
        )

    async def token(
        self,
        tokens: Sequence[int],
        bias: Mapping[int, float],
        sampling: Sampling,
        *,
        seed: int | None = None,
    ) -> int | None:
        """Push: the token that it draws after `tokens` with `bias` on its logits.

        Penalties and a request's own bias belong into `bias`: see `steering.push`. None where it is
        one that the server has no name for, one of `nameless`, or where it cannot be asked: see
        `hears`. Raises as `logits`.
        """
        can = self.capabilities
        prompt, count, _ = await self._sent(tokens)
        if prompt is None:
            return None
        number = secrets.randbelow(2**31) if seed is None else seed % 2**31
        top = 1 if can.names_ids else None
        said = await self._ask(prompt, count, top=top, sampling=sampling, bias=bias, seed=number)
        if said.tokens:
            if not 0 <= said.tokens[0] < self._spelling.alphabet.size:
                raise EngineError(f"{can.url}: token {said.tokens[0]} is not in this vocabulary")
            return said.tokens[0]
        if not said.text and said.ended:
            return self._spelling.alphabet.end
        return self._spelling.first(said.text)

    async def _sent(self, tokens: Sequence[int]) -> tuple[Prompt | None, int, bool]:
        """As `_prompt`; in a thread where it would hold up the others."""
        if self.capabilities.takes_ids or len(tokens) < _LONG:
            return self._prompt(tokens)
        return await asyncio.to_thread(self._prompt, tokens)

    def _prompt(self, tokens: Sequence[int]) -> tuple[Prompt | None, int, bool]:
        """What is sent for `tokens`, how many tokens that is, and whether they are others."""
        if self.capabilities.takes_ids:
            return tokens, len(tokens), False
        try:
            spelled = self._spelling.prompt(tokens)
        except EngineError:  # what was written, as what was asked has been checked
            spelled = None
        if spelled is None:
            return None, 0, True
        return spelled.text, spelled.count, spelled.drifted

    async def _ask(
        self,
        prompt: Prompt,
        count: int,
        *,
        top: int | None,
        sampling: Sampling,
        bias: Mapping[int, float],
        seed: int | None = None,
    ) -> Answer:
        can = self.capabilities
        body = can.dialect.body(can.model, prompt, top=top, sampling=sampling, bias=bias, seed=seed)
        said = answer(await self._link.post(can.dialect.path, body), can.url)
        self.asked += 1
        if said.prompt_tokens not in (None, count):
            raise EngineError(
                f"the large model at {can.url} read {said.prompt_tokens} tokens where {count} were "
                "meant: another model is served there now; start the proxy again"
            )
        return said


@asynccontextmanager
async def opened(
    url: str,
    alphabet: Alphabet,
    *,
    name: str = "",
    key: str = "",
    most: int = MOST,
    at_once: int = 16,
    patience: Patience = PATIENT,
) -> AsyncGenerator[RemoteLarge]:
    """The large model at `url`, examined; `alphabet` is the small models' vocabulary.

    `name` is the server's for it, where it has several; `most` log-probabilities are asked of a
    position, by at most `at_once` requests at a time.

    Raises:
        ConfigError: it cannot be used; names the server, what is missing and the mend.
    """
    async with links.opened(url, key, at_once=at_once, patience=patience) as link:
        spelling = Spelling(alphabet)
        found = await examined(link, spelling, await named(link, name), most=most)
        yield RemoteLarge(link, found, spelling)


async def examined(link: Link, spelling: Spelling, model: str, *, most: int = MOST) -> Capabilities:
    """What the large model `model` at `link` can do; raises as `opened`."""
    try:
        found = await probe(link, model, spelling, most=most)
    except TransientError as error:
        raise ConfigError(f"{error}; start it first, or mend --large") from error
    except Refused as error:
        raise ConfigError(f"{error}; see its own log") from error
    except EngineError as error:
        raise ConfigError(f"{error}; is it an OpenAI-compatible server?") from error
    log.info("large_model_found", **found.shown())
    return found


async def named(link: Link, name: str) -> str:
    """What the server calls the model that is meant.

    Raises:
        ConfigError: it has no such model, or several and none was named.
    """
    try:
        found: Any = msgspec.json.decode(await link.get("/v1/models"))
        names = [str(one["id"]) for one in found["data"]]
    except Refused as error:
        if error.status in (401, 403):
            raise ConfigError(f"{error}; give its key with --large-key") from error
        return name  # a server of one model need not list it
    except TransientError as error:
        raise ConfigError(f"{error}; start it first, or mend --large") from error
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--large {link.url}: /v1/models lists no models; is it an OpenAI-compatible server?"
        ) from error
    if name and name not in names:
        raise ConfigError(
            f"--large-name {name}: {link.url} has no such model; it has {', '.join(names[:20])}"
        )
    if not name and len(names) != 1:
        raise ConfigError(
            f"--large {link.url} has {len(names)} models; name one of them with --large-name: "
            f"{', '.join(names[:20])}"
        )
    return name or names[0]
