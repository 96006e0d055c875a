"""What reads foreign bytes raises what it documents, takes no time and no memory for them."""

import struct
import time
from pathlib import Path

import pytest

from shared.dataset import records
from shared.engine.chat import ChatTemplate
from shared.engine.gguf_file import read_header
from shared.errors import EngineError
from tests.chaos.abuse.fuzzing import fuzz
from tests.chaos.abuse.targets import TARGETS, Target

INPUTS = 1500
MOST_TEMPLATE_S = 5.0


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_documented_errors_comes_out(name: str) -> None:
    found = fuzz(TARGETS[name], seed=1, inputs=INPUTS, limit_s=10.0)
    assert not found.findings, [(one.why, one.data.hex()) for one in found.findings]


def test_the_fuzzer_finds_what_hides_behind_three_conditions() -> None:
    def guarded(data: bytes) -> None:
        from shared.subjects import last_token

        assert last_token(data.decode(errors="replace")) != "boom", "found"

    target = Target(guarded, [b"a.b"], [b".boom", b"x"])
    assert "found" in fuzz(target, seed=1, inputs=3000).findings[0].why


@pytest.mark.parametrize(
    "tail",
    [
        struct.pack("<QQ", 2**63, 0),
        struct.pack("<QQ", 0, 2**63),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**62),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**62),
        struct.pack("<QQ", 1, 0) + struct.pack("<Q", 1) + b"w" + struct.pack("<I", 2**32 - 1),
        struct.pack("<QQ", 1, 0)
        + struct.pack("<Q", 1)
        + b"w"
        + struct.pack("<IQIQ", 1, 2**64 - 1, 0, 0),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**64 - 1),
    ],
)
def test_a_small_gguf_that_claims_to_be_huge_is_damaged(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + tail + b"\0" * 900)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"damaged|cut short"):
        read_header(str(path))
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set x = 'aaaaaaaa' %}" + "{% set x = x ~ x %}" * 60,
        "{% set x = 'aaaaaaaa' %}" + "{% set x = x + x %}" * 60,
        "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
        "{% set x = 'a' * 4000 %}" + "{% set x = x.replace('a', x) %}" * 6,
        "{% set x = 'a' * 4000 %}" + "{% set x = x|replace('a', x) %}" * 6,
        "{{ ('a' * 4000).join(range(99999)|map('string')) }}",
        "{% set x = 3 %}" + "{% set x = x * x %}" * 60,
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>{}}'.format(1, 999999999) }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ '\\t'.expandtabs(tabsize=999999999) }}",
        "{{ ('a' * 4000).translate({97: 'a' * 4000}) }}",
        "{{ lipsum(n=999999999) }}",
        "{{ strftime_now('%0999999999d') }}",
        "{% for a in 'aa' %}" * 30 + "{% endfor %}" * 30,
        "{{ range(99999)|map('string')" + "|map('string')" * 5000 + "|list }}",
    ],
)
def test_a_template_that_would_not_end_is_refused_in_time(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError):
        ChatTemplate(text, "", "").render([{"role": "user", "content": "hi"}])
    assert time.monotonic() - began < MOST_TEMPLATE_S


def test_a_line_without_end_is_passed_over_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_LONGEST_LINE", 100)
    good = b'{"prompt": "p", "completion": "c"}\n'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + b"x" * 1234 + b"\n" + good + b"y" * 555)
    place = records.Place()
    with path.open("rb") as file:
        found = list(records.records(str(path), file, place, closed=True))
    assert [(one.line, bool(one.refusal), one.whole) for one in found] == [
        (1, False, True),
        (2, True, True),
        (3, False, True),
        (4, True, False),
    ]
    assert place.offset == len(good) * 2 + 1235
