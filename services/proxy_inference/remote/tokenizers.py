"""Whether a server's tokenizer is ours, as far as it lets itself be asked.

By the ids that it says a text has, where it has an endpoint for that; by how many tokens it counts
in texts; by what its likeliest tokens are called.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from services.proxy_inference.remote.link import Link, Refused
from services.proxy_inference.remote.reading import Named
from services.proxy_inference.remote.spelling import Spelling
from shared.errors import ConfigError

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1984, 3.14159 + 2,718 = 2721.14159; 100% of it.",
    "naïve café, größer, señor, œuvre",
    "Привет, мир! Γειά σου, שלום",
    "東京は日本の首都です。你好",
    "def f(x):\n\treturn {'a': [x ** 2, None]}  # done\n\n\n",
    "   leading, trailing and      inner spaces   ",
    "emoji: 🙂👩‍👩‍👧, arrows → ⇒, dashes – —",
    "antidisestablishmentarianism unbelievably McDonald's DON'T don't",
    "https://example.org/a_b?c=d&e=%20f <b>bold</b> \\n \\u00e9",
)
_PLACES = ("/tokenize", "/extras/tokenize")
_PIECES = 400
"""So many of the vocabulary's own pieces, spread over it, make one more text."""
_ODD = 0.05
"""The share of names that may look otherwise in another tokenizer's spelling."""


async def by_tokens(link: Link, model: str, spelling: Spelling) -> str:
    """How it was checked, or "" where the server has no endpoint for it.

    Raises:
        ConfigError: it gives a text other tokens than we do.
    """
    for place in _PLACES:
        texts = [*TEXTS, _mixture(spelling)]
        for text in texts:
            theirs = await _tokens(link, place, model, text)
            if theirs is None:
                break
            ours = spelling.alphabet.tokenize(text, start=False)
            if theirs not in (ours, spelling.start + ours):
                raise _differs(link.url, text, f"{theirs[:8]}", f"{ours[:8]}")
        else:
            return f"{place}: the ids of {len(texts)} texts"
    return ""


async def by_counts(
    url: str, count: Callable[[str], Awaitable[int | None]], spelling: Spelling
) -> str:
    """How it was checked, or "" where the server counts no tokens.

    Raises:
        ConfigError: it counts other tokens than we do.
    """
    for text in TEXTS:
        theirs = await count(text)
        if theirs is None:
            return ""
        ours = len(spelling.alphabet.tokenize(text, start=True))
        if theirs != ours:
            raise _differs(url, text, f"{theirs} tokens", str(ours))
    return f"usage.prompt_tokens of {len(TEXTS)} texts"


def by_names(
    url: str, numbered: Sequence[Named], named: Sequence[Named], spelling: Spelling
) -> str:
    """How it was checked, or "" where there are no names.

    `numbered` and `named` are the likeliest tokens of one position, by id where the server tells
    ids, and by text.

    Raises:
        ConfigError: names stand for other tokens than ours, or for none.
    """
    alphabet = spelling.alphabet
    ours = {
        one: _plain(alphabet.bytes_of(one.id))
        for one in numbered
        if one.id is not None and 0 <= one.id < alphabet.size
    }
    compared = {one: text for one, text in ours.items() if text}
    if compared:
        # Texts that are no UTF-8 look alike, so that the two lists do not go side by side.
        names = {one.text.strip() for one in named}
        odd = [
            f"token {one.id} is {text!r} here, {one.text!r} there"
            if one.text
            else f"no likely token there is {text!r}, which token {one.id} is here"
            for one, text in compared.items()
            if (one.text.strip() != text.strip() if one.text else text.strip() not in names)
        ]
    else:
        compared = {one: "" for one in named if one.text}
        odd = [
            f"{one.text!r} is no token here" for one in compared if one.text not in spelling.texts
        ]
    if len(odd) > _ODD * len(compared):
        raise ConfigError(
            f"--large {url}: its tokenizer is not this model's: {odd[0]}; serve a large model of "
            "the same family"
        )
    return f"names of {len(compared)} likely tokens" if compared else ""


async def _tokens(link: Link, place: str, model: str, text: str) -> list[int] | None:
    """What the server says the ids are; None where it does not say."""
    body: dict[str, object] = {"content": text, "prompt": text, "input": text}
    body |= {"add_special": True, "parse_special": True}
    if model:
        body["model"] = model
    try:
        found: Any = msgspec.json.decode(await link.post(place, body))
        return [int(token) for token in found["tokens"]]
    except (Refused, msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None


def _mixture(spelling: Spelling) -> str:
    """Pieces from all over the vocabulary, run together."""
    alphabet = spelling.alphabet
    step = max(alphabet.size // _PIECES, 1)
    pieces = [
        alphabet.bytes_of(token).decode(errors="ignore") for token in range(0, alphabet.size, step)
    ]
    text = "".join(pieces)
    return alphabet.controls.sub("", text)


def _plain(data: bytes) -> str:
    """A token's text; "" for half a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _differs(url: str, text: str, theirs: str, ours: str) -> ConfigError:
    return ConfigError(
        f"--large {url}: its tokenizer is not this model's: {text[:40]!r} is {theirs} there, "
        f"{ours} here; serve a large model of the same family"
    )
