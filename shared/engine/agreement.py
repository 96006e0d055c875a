"""Whether two models' tokenizers are one, by what they hold and by what they do.

Logits can be added only where a number means the same token to both. Names in the headers prove
nothing: the spellings of all tokens are compared, and how some texts are cut.
"""

from shared.engine.llama import Vocabulary

_TEXTS = (
    "The quick brown fox can't jump over 12345 lazy dogs; it's 3.14159 km away!",
    "  two  spaces,\ta tab,\r\nlines\n\n\nand trailing   ",
    "Füße, naïve café, Ελληνικά, русский, 日本語, العربية, हिन्दी, 👩‍💻🚀",
    "def f(x):\n    return {'a': [x**2 for x in range(10)], \"b\": None}  # ok",
    "I'LL WE'VE DON'T THEY'RE CamelCaseWords snake_case_words http://a.b/c?d=e&f=%20",
)


def disagreement(small: Vocabulary, large: Vocabulary) -> str:
    """In what they differ, for a person to read; empty where they agree.

    One may have more tokens than the other at its end, as models are padded to round sizes.
    """
    both = min(small.size, large.size)
    if abs(small.size - large.size) > both // 50 + 64:
        return f"one has {small.size} tokens, the other {large.size}"
    for token in range(both):
        mine, other = small.spelling(token), large.spelling(token)
        if mine != other:
            return f"token {token} is {mine!r} in one and {other!r} in the other"
    if small.end != large.end:
        return f"texts end with token {small.end} in one and {large.end} in the other"
    for text in _TEXTS:
        mine, other = small.tokenize(text, start=True), large.tokenize(text, start=True)
        if mine != other:
            return f"they cut {text[:30]!r} into different tokens: {mine[:8]} and {other[:8]}"
    return ""
