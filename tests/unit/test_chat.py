"""Conversations become what each model's own template makes of them, private text marked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engine.chat import ChatTemplate
from shared.engine.pieces import Piece, joined
from shared.errors import EngineError
from tests.support.chat_templates import ALL, ANSWERED, ASKED, GEMMA, MESSAGES, MORE, SYSTEM, Known


def a_template(known: Known, *, starts: bool = True) -> ChatTemplate:
    return ChatTemplate(known.text, known.bos, known.eos, starts=starts)


def messages_for(name: str) -> list[dict[str, str]]:
    return MESSAGES[1:] if name in {"gemma", "llama2"} else MESSAGES


@pytest.mark.parametrize("name", ALL)
def test_a_conversation_is_rendered_as_its_model_knows_it(name: str) -> None:
    known, messages = ALL[name], messages_for(name)
    assert a_template(known, starts=False).render(messages) == known.rendered
    ours = a_template(known).render(messages)
    assert known.bos + ours == known.rendered or (ours == known.rendered and name == "phi3")


@pytest.mark.parametrize("name", ALL)
def test_what_was_said_is_private_and_all_else_is_the_template_s(name: str) -> None:
    template, messages = a_template(ALL[name]), messages_for(name)
    pieces = template.pieces(messages)
    assert joined(pieces) == template.render(messages)
    said = [SYSTEM, ASKED, ANSWERED, MORE.strip()][-len(messages) :]
    assert [text for text, private in pieces if private] == said
    assert not any(word in text for text, private in pieces if not private for word in said)


@pytest.mark.parametrize("name", ALL)
def test_an_answer_ends_as_a_turn_ends_in_the_template(name: str) -> None:
    known, messages = ALL[name], messages_for(name)
    template = a_template(known)
    assert template.end_of_turn[0] == known.end
    assert known.eos in template.end_of_turn
    whole = template.render(messages[:-1], generation=False)
    asked, answer = template.render(messages[:-2]), joined(template.answer(ANSWERED))
    if name == "qwen3":  # it shows the place of the thoughts that were not thought
        asked += "<think>\n\n</think>\n\n"
    assert whole.startswith(asked + answer)
    spaced = joined(template.answer(f"{ANSWERED}\n"))
    trims = name in {"llama3", "gemma", "llama2"}
    assert spaced == (answer if trims else answer.replace(ANSWERED, f"{ANSWERED}\n"))


TRICKS = ["<|im_end|>", "</s>", "{{ 1 }}", "{% raw %}", "x0x", "\n", " ", "a", "é", "[INST]"]


@settings(deadline=None)
@given(st.sampled_from(sorted(ALL)), st.lists(st.sampled_from(TRICKS), min_size=1).map("".join))
def test_whatever_was_said_stays_private(name: str, said: str) -> None:
    if not said.strip():
        return
    messages = [{"role": "user", "content": said}]
    pieces = a_template(ALL[name]).pieces(messages)
    assert joined(pieces) == a_template(ALL[name]).render(messages)
    (private,) = [text for text, is_private in pieces if is_private]
    assert private == said.strip()


def test_thoughts_of_earlier_turns_go_as_the_template_wants_and_the_rest_stays_private() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm <|im_end|>\n</think>\n\nb <|im_end|>"},
        {"role": "user", "content": "c"},
    ]
    pieces = a_template(ALL["qwen3"]).pieces(messages)
    assert [text for text, private in pieces if private] == ["a", "b <|im_end|>", "c"]
    assert not any("hm" in text for text, _ in pieces)


def test_a_template_that_rewrites_what_was_said_is_refused() -> None:
    shouting = ChatTemplate("{{ messages[0].content | upper }}", "", "</s>")
    assert shouting.render([{"role": "user", "content": "hey"}]) == "HEY"
    with pytest.raises(EngineError, match="rewrites what was said"):
        shouting.pieces([{"role": "user", "content": "hey"}])


def test_a_model_without_a_template_speaks_chatml() -> None:
    template = ChatTemplate(None, "<s>", "</s>")
    assert template.render(MESSAGES) == ALL["chatml"].rendered
    assert template.end_of_turn == ("<|im_end|>", "</s>")
    assert template.answer("x") == [Piece("", False), Piece("x", True), Piece("<|im_end|>", False)]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (MESSAGES, "System role not supported; give them in the roles and the order"),
        (MESSAGES[1:2] * 2, "Conversation roles must alternate"),
        ([{"role": "user<end_of_turn>", "content": "x"}], "use system, user, assistant or tool"),
    ],
)
def test_messages_that_the_template_refuses_are_an_error_with_its_reason(
    messages: list[dict[str, str]], why: str
) -> None:
    for render in (a_template(GEMMA).render, a_template(GEMMA).pieces):
        with pytest.raises(EngineError, match=why):
            render(messages)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for n in range(1000000000) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ undefined_function() }}",
    ],
)
def test_a_hostile_or_failing_template_is_an_error_and_nothing_else(text: str) -> None:
    with pytest.raises(EngineError, match="refuses these messages"):
        ChatTemplate(text, "", "").render([{"role": "user", "content": "x"}])


def test_a_broken_template_names_the_mend() -> None:
    with pytest.raises(
        EngineError, match=r"broken: .*; give the GGUF another tokenizer\.chat_temp"
    ):
        ChatTemplate("{% if %}", "", "")


def test_the_words_that_trainers_of_templates_use_are_known() -> None:
    text = "{% generation %}{{ {'ä': 1} | tojson }}{% endgeneration %}{{ strftime_now('%Y')[:2] }}"
    assert ChatTemplate(text, "", "").render([]) == '{"ä": 1}20'
    guarded = "{{ strftime_now('%Y') if strftime_now is defined else 'no date' }}"
    assert ChatTemplate(guarded, "", "").render([]) == "no date"
