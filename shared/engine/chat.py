"""Conversations as the text that a model was trained on: its own chat template, rendered by Jinja.

Templates come with models and are not trusted: they run in a sandbox (`chat_sandbox`), which has no
way to the outside, and a budget. `llama_chat_apply_template` would need no Jinja, but
knows a list of templates by their looks and gives others the nearest; a model deserves its own.

What is private is known by rendering twice: once the messages themselves, once with unguessable
words in the place of what was said. A template that does more with contents than to place and to
strip them is rendered a third time, with the tags of reasoning and tools left standing; one that
makes something else of them is refused.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import NoReturn

import jinja2

from shared.engine import chat_sandbox
from shared.engine.pieces import Piece, joined
from shared.errors import EngineError

CHATML = (
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""For a model whose GGUF has no template."""

_LARGEST_TEMPLATE = 1 << 18
_LONGEST_COMPLAINT = 300
_ROLE = re.compile(r"[A-Za-z][A-Za-z_-]{0,31}")
_DATE = re.compile(r"(?:[^%]|%-?[A-Za-z%]){0,64}")
"""A width would be taken at its word."""
_NOTHING = re.compile(r"(?!)")
_TAGS = re.compile(r"(</?(?:think|thinking|reasoning|tool_call|tool_response|tools)>)")
_CONTROL = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])")
_RARE_SPACE = "\v"
_MEND = "give the GGUF another tokenizer.chat_template"
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)

Messages = Sequence[Mapping[str, str]]
"""Each has `role` and `content`; what else it has is ignored."""


class ChatTemplate:
    """One model's template."""

    def __init__(self, text: str | None, bos: str, eos: str, *, starts: bool = True) -> None:
        """`text` None: ChatML. `starts`: the tokenizer puts `bos` before a text; then `render`
        leaves it out there.

        Raises:
            EngineError: no Jinja template.
        """
        self._bos = bos
        self._eos = eos
        self._starts = starts
        self._secret = secrets.token_hex(16)
        self._hidden = re.compile(f"{self._secret}x(\\d+)x")
        self._now = datetime.now()  # noqa: DTZ005 - the user's day; one, so that texts stay alike
        source = CHATML if text is None else text
        if len(source) > _LARGEST_TEMPLATE:
            raise EngineError(f"the model's chat template has {len(source)} letters; {_MEND}")
        # Models say "today" if they are let, and a row would be another tomorrow.
        self._dated = "strftime_now" in source and "strftime_now is defined" not in source
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except (jinja2.TemplateError, SyntaxError, *_FAILURES) as error:
            why = str(error)[:_LONGEST_COMPLAINT]
            raise EngineError(f"the model's chat template is broken: {why}; {_MEND}") from error

    def render(self, messages: Messages, *, generation: bool = True) -> str:
        """The conversation's text; with `generation` up to where the assistant begins to speak.

        Raises:
            EngineError: the template refuses the messages; says why.
        """
        return self._rendered([(one["role"], one["content"]) for one in messages], generation)

    def pieces(self, messages: Messages, *, generation: bool = True) -> list[Piece]:
        """What `render` gives, and which parts of it are the messages' contents.

        Raises:
            EngineError: the template refuses the messages, or rewrites their contents.
        """
        said = [(one["role"], one["content"]) for one in messages]
        text = self._rendered(said, generation)
        for keep in (_NOTHING, _TAGS):
            pieces = self._marked(said, generation, keep)
            if joined(pieces) == text:
                return pieces
        raise EngineError(
            "the model's chat template rewrites what was said, so that it cannot be told from the "
            "template's own; leave such messages out, or use rows of prompt and completion"
        )

    def answer(self, content: str) -> list[Piece]:
        """What the model should say after the rendered messages: `content`, and its turn's end."""
        before, strips, after = self._turn
        left, right = strips
        content = content.lstrip() if left else content
        content = content.rstrip() if right else content
        return [Piece(before, False), Piece(content, True), Piece(after, False)]

    @property
    def end_of_turn(self) -> tuple[str, ...]:
        """The strings at which an answer is over; the first is the template's."""
        return tuple(dict.fromkeys(end for end in (self._turn[2].strip(), self._eos) if end))

    @cached_property
    def _turn(self) -> tuple[str, tuple[bool, bool], str]:
        """How an answer stands in the template.

        White space before it, whether its own white space goes on the left and on the right, and
        what ends it.
        """
        asked = [("user", "?")]
        try:
            prompt = self._rendered(asked, True)
            answered = [*asked, ("assistant", f"{_RARE_SPACE}{self._secret}{_RARE_SPACE}")]
            text = self._rendered(answered, False)
        except EngineError:
            return "", (False, False), self._eos
        before, found, after = text.partition(self._secret)
        if not found:
            return "", (False, False), self._eos
        strips = not before.endswith(_RARE_SPACE), not after.startswith(_RARE_SPACE)
        before, after = before.removesuffix(_RARE_SPACE), after.removeprefix(_RARE_SPACE)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        if self._eos and after.lstrip().startswith(self._eos):
            end = after[: after.index(self._eos) + len(self._eos)]
        elif control := _CONTROL.match(after):
            end = control[0]
        else:
            end = self._eos or after.rstrip() or "\n"
        return "" if lead.strip() else lead, strips, end

    def _marked(
        self, said: list[tuple[str, str]], generation: bool, keep: re.Pattern[str]
    ) -> list[Piece]:
        """The pieces, rendered with words of our own instead of contents."""
        hidden: list[str] = []

        def hide(text: str) -> str:
            """`text` with a word for all but the white space around it."""
            core = text.strip()
            if not core or keep.fullmatch(text):
                return text
            hidden.append(core)
            left = text[: len(text) - len(text.lstrip())]
            right = text[len(text.rstrip()) :]
            return f"{left}{self._secret}x{len(hidden) - 1}x{right}"

        marked = [(role, "".join(map(hide, keep.split(content)))) for role, content in said]
        parts = self._hidden.split(self._rendered(marked, generation))
        return [
            Piece(hidden[int(part)], True) if number % 2 else Piece(part, False)
            for number, part in enumerate(parts)
            if part
        ]

    def _rendered(self, said: list[tuple[str, str]], generation: bool) -> str:
        for role, _ in said:
            if not _ROLE.fullmatch(role):
                raise EngineError(f"role {role[:32]!r}: use system, user, assistant or tool")
        given: dict[str, object] = {
            "messages": [{"role": role, "content": content} for role, content in said],
            "add_generation_prompt": generation,
            "bos_token": self._bos,
            "eos_token": self._eos,
            "tools": None,
            "documents": None,
            "raise_exception": _raise,
        }
        if self._dated:
            given["strftime_now"] = self._today
        try:
            with chat_sandbox.budget(sum(len(role) + len(content) for role, content in said)):
                text = self._template.render(given)
        except _FAILURES as error:
            why = str(error)[:_LONGEST_COMPLAINT]
            raise EngineError(
                f"the model's chat template refuses these messages: {why}; give them in the "
                "roles and the order that it wants"
            ) from error
        return text.removeprefix(self._bos) if self._starts and self._bos else text

    def _today(self, form: str) -> str:
        if not _DATE.fullmatch(form):
            raise jinja2.TemplateError(f"no date is written as {form[:32]!r}")
        return self._now.strftime(form)


def _raise(why: object) -> NoReturn:
    raise jinja2.TemplateError(str(why))


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(indent, 16))


_ENVIRONMENT = chat_sandbox.environment(tojson=_to_json)
