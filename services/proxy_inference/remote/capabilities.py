"""What a server can do, found out by asking it; never from what it calls itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.proxy_inference.remote import tokenizers
from services.proxy_inference.remote.dialect import WAYS, Dialect, Prompt
from services.proxy_inference.remote.link import Link, Refused
from services.proxy_inference.remote.reading import Answer, Named, answer
from services.proxy_inference.remote.spelling import Spelling
from services.proxy_inference.sampling import Sampling
from shared.errors import ConfigError

MOST = 1000
"""Log-probabilities asked of a position: beyond this the ensemble hardly changes."""
_LADDER = (500, 100, 20, 5)
_ENOUGH = 20
"""With fewer, a bias on the server's own sampler is the better way."""
_REACHES = (100.0, 50.0, 20.0)
_ENTRIES = (1000, 300, 100, 30)

_ALONE = (
    "The capital of France is",
    "Once upon a time there was a little",
    "1, 2, 3, 4,",
    "def add(a, b):\n    return",
)
"""Some go on with a token that ends a text, of which servers tell nothing: then the next one."""
_AGAIN_AND_AGAIN = "one two three four one two three four one two three four one two"
_GREEDY = Sampling(temperature=0.0)
_HOT = Sampling(temperature=3.0)
_UNLIKELY = -20.0
"""Below this servers write what they like."""
_SAME = 0.1
"""Nats by which two answers to one question may differ, for other kernels and batches."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What was found out about a server."""

    url: str
    model: str
    dialect: Dialect
    takes_ids: bool
    """Prompts go as token ids; else as text, which the server tokenizes anew."""
    top: int = 0
    """How many log-probabilities are asked of a position; 0: it tells none."""
    told: int = 0
    """How many came when so many were asked."""
    names_ids: bool = False
    """They come with token ids; else as text, which not every token has."""
    before_temperature: bool = False
    before_bias: bool = False
    """What is told does not hang on what the sampler is told."""
    reach: float = 0.0
    """The largest bias by token id; 0: there is none."""
    entries: int = 0
    """How many tokens may have one."""
    agreement: tuple[str, ...] = ()
    """How the tokenizer was checked."""
    without: str = ""
    """Why it tells no log-probabilities."""

    @property
    def pulls(self) -> bool:
        """Log-probabilities are fetched and combined here; else a bias goes there, per token."""
        return self.top >= _ENOUGH or not self.reach

    def shown(self) -> dict[str, object]:
        """For the log and whoever asks."""
        return {
            "url": self.url,
            "model": self.model,
            "way": "pull" if self.pulls else "push",
            "prompts": "ids" if self.takes_ids else "text",
            "top_logprobs": self.told,
            "names": "ids" if self.names_ids else "text",
            "before_sampler": self.before_temperature and self.before_bias,
            "bias_reach": self.reach,
            "bias_entries": self.entries,
            "tokenizer_checked_by": list(self.agreement),
        }


async def probe(link: Link, model: str, spelling: Spelling, *, most: int = MOST) -> Capabilities:
    """What the server at `link` can do with `model`.

    Raises:
        ConfigError: it cannot be used; names the server, what is missing and the mend.
        TransientError: it does not answer.
    """
    found = await _Probe(link, model, spelling, most).way()
    if not found.top and not found.reach:
        raise ConfigError(
            f"--large {link.url}: it tells no log-probabilities ({found.without}) and takes no "
            "logit_bias: neither way to an ensemble is open. llama_cpp.server needs --logits_all "
            "true; llama-server and vLLM tell them by default"
        )
    return found


class _Probe:
    """One server's examination."""

    def __init__(self, link: Link, model: str, spelling: Spelling, most: int) -> None:
        self._link = link
        self._model = model
        self._spelling = spelling
        ladder = [count for count in _LADDER if count < most]
        self._ladder = [min(most, spelling.alphabet.size), *ladder]

    async def way(self) -> Capabilities:
        """The first way to ask that is understood, or one after it that tells ids as well."""
        first: Capabilities | None = None
        why: list[str] = []
        for dialect in WAYS:
            if first is not None and dialect.path == first.dialect.path:
                continue
            try:
                found = await self._spoken(dialect)
            except Refused as error:
                if error.status in (401, 403):
                    raise ConfigError(f"{error}; give its key with --large-key") from error
                why.append(f"{dialect.path}: {error}")
                continue
            found = await self._steered(await self._telling(found))
            if first is None:
                first = found
            if found.names_ids:
                return await self._agreed(found)
        if first is None:
            raise ConfigError(
                f"--large {self._link.url}: it completes no text ({why[0]}); give the address of "
                "an OpenAI-compatible server, http://HOST:PORT/v1"
            )
        return await self._agreed(first)

    async def _spoken(self, dialect: Dialect) -> Capabilities:
        """Whether a plain completion is understood, of token ids or at least of text.

        Raises:
            Refused: neither.
        """
        found = Capabilities(self._link.url, self._model, dialect, takes_ids=True)
        tokens = self._tokens(_ALONE[0])
        try:
            if (await self._asked(found, tokens)).prompt_tokens == len(tokens):
                return found
        except Refused:
            pass  # not as ids; whether as text is seen next
        found = replace(found, takes_ids=False)
        await self._asked(found, _ALONE[0])
        return found

    async def _telling(self, found: Capabilities) -> Capabilities:
        """How many log-probabilities it tells, by what names, and of which distribution."""
        for count in self._ladder:
            try:
                said, text = await self._something(found, count)
            except Refused as error:
                found = replace(found, without=str(error))
                continue
            if said is None or not said.positions[0].top:
                found = replace(found, without="its answers have none")
                continue
            top = said.positions[0].top
            self._check_sum(top)
            by_id = all(one.id is not None for one in top)
            dialect = replace(found.dialect, by_id=found.dialect.by_id and by_id)
            found = replace(
                found, dialect=dialect, top=count, told=len(top), names_ids=by_id, without=""
            )
            await self._check_drafts(found)
            hot = await self._asked(found, text, top=count, sampling=_HOT)
            same = bool(hot.positions) and self._same(top, hot.positions[0].top)
            return replace(found, before_temperature=same)
        return found

    async def _steered(self, found: Capabilities) -> Capabilities:
        """Whether a bias by token id decides what is chosen, how far it goes and for how many."""
        plain, text = await self._something(found, found.top or None)
        chosen = None if plain is None else self._written(plain)
        target = next(
            token
            for token in range(self._spelling.alphabet.size)
            if not self._spelling.nameless[token] and token != chosen
        )
        reach = entries = 0
        for reach in _REACHES:
            if await self._chooses(found, text, {target: reach}) == target:
                break
        else:
            return found
        for entries in _ENTRIES:
            slight = dict.fromkeys(range(min(entries, self._spelling.alphabet.size)), 0.01)
            if await self._chooses(found, text, slight | {target: reach}) == target:
                break
        else:
            return found
        found = replace(found, reach=reach, entries=entries)
        if not found.top or plain is None:
            return found
        biased = await self._asked(found, text, top=found.top, bias={target: reach})
        same = bool(biased.positions) and self._same(
            plain.positions[0].top, biased.positions[0].top
        )
        return replace(found, before_bias=same)

    async def _agreed(self, found: Capabilities) -> Capabilities:
        """With how its tokenizer was compared with ours.

        Raises:
            ConfigError: they differ, or nothing could be compared.
        """

        async def count(text: str) -> int | None:
            return (await self._asked(found, text)).prompt_tokens

        async def named() -> list[Named]:
            by_name = replace(found, dialect=replace(found.dialect, by_id=False))
            said, _ = await self._something(by_name, found.top)
            return [] if said is None else said.positions[0].top

        async def numbered() -> list[Named]:
            said, _ = await self._something(found, found.top)
            return [] if said is None else said.positions[0].top

        checks = [
            await tokenizers.by_tokens(self._link, self._model, self._spelling),
            await tokenizers.by_counts(self._link.url, count, self._spelling),
        ]
        if found.top:
            names = tokenizers.by_names(
                self._link.url, await numbered(), await named(), self._spelling
            )
            checks.append(names)
        agreement = tuple(check for check in checks if check)
        if not agreement:
            raise ConfigError(
                f"--large {self._link.url}: nothing tells whether its tokenizer is this model's: "
                "no /tokenize, no usage.prompt_tokens, no names of tokens"
            )
        return replace(found, agreement=agreement)

    async def _something(self, found: Capabilities, top: int | None) -> tuple[Answer | None, str]:
        """A greedy answer that has a position, and to what; None where there is none."""
        for text in _ALONE:
            said = await self._asked(found, text, top=top)
            if said.positions or (top is None and said.text):
                return said, text
        return None, _ALONE[0]

    async def _chooses(self, found: Capabilities, text: str, bias: dict[int, float]) -> int | None:
        try:
            said = await self._asked(found, text, top=1 if found.names_ids else None, bias=bias)
        except Refused:
            return None
        return self._written(said)

    async def _check_drafts(self, found: Capabilities) -> None:
        """Raises ConfigError where drafted tokens are told as certain, which they are not."""
        said = await self._asked(found, _AGAIN_AND_AGAIN, top=min(found.top, 20), length=16)
        for place in said.positions:
            others = [one.logprob for one in place.top if one.logprob < 0.0]
            if place.chosen.logprob == 0.0 and (not others or max(others) > -12.0):
                raise ConfigError(
                    f"--large {self._link.url}: it tells log-probability 0 for tokens that are not "
                    "certain, as servers do for tokens that they drafted; start it without "
                    "speculation (no -md, no --spec-type)"
                )

    def _check_sum(self, top: Sequence[Named]) -> None:
        """Raises ConfigError for what are no log-probabilities."""
        if any(one.logprob > 1e-3 for one in top):
            raise ConfigError(
                f"--large {self._link.url}: what it calls log-probabilities are none: "
                f"{max(one.logprob for one in top):.3g} is above 0; start vLLM with "
                "--logprobs-mode raw_logprobs"
            )

    async def _asked(
        self,
        found: Capabilities,
        prompt: str | list[int],
        *,
        top: int | None = None,
        length: int = 1,
        sampling: Sampling = _GREEDY,
        bias: dict[int, float] | None = None,
    ) -> Answer:
        sent: Prompt = prompt
        if found.takes_ids and isinstance(prompt, str) and (top or bias):
            sent = self._tokens(prompt)
        dialect = found.dialect
        body = dialect.body(
            found.model, sent, top=top, length=length, sampling=sampling, bias=bias, seed=1
        )
        return answer(await self._link.post(dialect.path, body), self._link.url)

    def _tokens(self, text: str) -> list[int]:
        return self._spelling.alphabet.tokenize(text, start=True)

    def _written(self, said: Answer) -> int | None:
        return said.tokens[0] if said.tokens else self._spelling.token(said.text)

    def _same(self, one: Sequence[Named], other: Sequence[Named]) -> bool:
        """Whether two lists tell the same log-probabilities, as far as a name is one token's."""
        first, second = self._by_token(one), self._by_token(other)
        both = first.keys() & second.keys()
        if 2 * len(both) < min(len(first), len(second)):
            return False
        return bool(both) and max(abs(first[key] - second[key]) for key in both) < _SAME

    def _by_token(self, told: Sequence[Named]) -> dict[int, float]:
        found: dict[int, float] = {}
        for one in told:
            token = self._spelling.token(one.text) if one.id is None else one.id
            if token is not None and one.logprob > _UNLIKELY:
                found[token] = one.logprob
        return found
