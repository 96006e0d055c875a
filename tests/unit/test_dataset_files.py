"""Files of rows as they are found: CSV of every kind, real lines, directories that grow."""

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.dataset import Counted, Dataset, Row, labels_in
from shared.dataset.growing import SETTLED_S
from shared.errors import EngineError
from shared.messages import Task

CHOICES = Task("choices", labels={"a": " A", "b": " B"})
TOKENS = Task("tokens")

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00\r") | st.sampled_from('",;\n\t'),
    min_size=1,
).filter(str.strip)
BROKEN = ["one cell", "three,of,them", "x,unknown", " ,a", '"quote in the middle"x,a']


def a_row(text: str, label: str = "a") -> str:
    return json.dumps({"text": text, "label": label}) + "\n"


def texts(found: Dataset) -> list[str]:
    assert all(isinstance(row, Row) for row in found.rows)
    return [row.body for row in found.rows if isinstance(row, Row)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(TEXTS, st.sampled_from(["a", "b"])) | st.sampled_from(BROKEN), min_size=1),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_of_a_csv_file_all_good_rows_are_used_and_bad_ones_named_by_their_real_line(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str] | str],
    delimiter: str,
    end: str,
    with_bom: bool,
) -> None:
    written, good, bad, line = io.StringIO(), list[str](), list[int](), 2
    writer = csv.writer(written, delimiter=delimiter, lineterminator=end)
    writer.writerow(["id", "text", "Label "])
    for number, row in enumerate(rows):
        before = written.tell()
        if isinstance(row, str):
            written.write(f"{number},{row}".replace(",", delimiter) + end)
            bad.append(line)
        else:
            writer.writerow([number, *row])
            good.append(row[0])
        line += written.getvalue()[before:].count("\n")
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" * with_bom + written.getvalue().encode())
    assert Counted(str(path)).records == len(rows)
    if not good:
        with pytest.raises(EngineError, match=f"no usable row among {len(bad)}; first: .*:2: "):
            Dataset(str(path), CHOICES)
        return
    found = Dataset(str(path), CHOICES)
    assert texts(found) == good
    assert found.refused_rows == len(bad)
    assert [int(why.split(":")[1]) for why in found.refused] == bad[:20]


@settings(deadline=None)
@given(st.lists(TEXTS | st.sampled_from([b"{", b"7", b'{"text": "\xff"}', b"  "]), min_size=1))
def test_of_a_jsonl_file_all_good_rows_are_used_and_bad_ones_named_by_their_real_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str | bytes]
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else a_row(x).strip().encode() for x in [*lines, "z"])
    )
    found = Dataset(str(path), CHOICES)
    assert texts(found) == [line for line in [*lines, "z"] if isinstance(line, str)]
    bad = [n for n, x in enumerate(lines, 1) if isinstance(x, bytes) and x.strip()]
    assert [int(why.split(":")[1]) for why in found.refused] == bad[:20]


def test_a_quote_that_is_never_closed_costs_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\nx,a\n"y,b\nz,a\n"w\nw",b\n')
    found = Dataset(str(path), CHOICES)
    assert texts(found) == ["x", "z", "w\nw"]
    assert [why.split(": ")[0] for why in found.refused] == [f"{path}:3"]


@pytest.mark.parametrize(
    ("name", "header", "why"),
    [
        ("rows.csv", "text;kind", "its header names neither text and label nor prompt"),
        ("rows.tsv", "text,label", "its header names neither text and label nor prompt"),
        ("rows.csv", "prompt,completion", "needs rows of text and label"),
    ],
)
def test_a_header_that_does_not_serve_is_named(
    tmp_path: Path, name: str, header: str, why: str
) -> None:
    path = tmp_path / name
    path.write_text(f"{header}\nx,a\n")
    with pytest.raises(EngineError, match=why):
        Dataset(str(path), CHOICES)


def test_prompts_and_completions_come_as_csv_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("completion\tprompt\tlabel\nyes\tshall we?\ta\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"prompt": "p", "completion": "c"}\n')
    rows = Dataset(str(tmp_path), TOKENS).rows
    assert rows == [Row("", "shall we?", "", "yes", -1), Row("", "p", "", "c", -1)]
    assert labels_in(str(tmp_path), at_most=9) == {"a"}


def test_a_directory_is_read_in_the_order_of_names_without_what_is_no_row_file(
    tmp_path: Path,
) -> None:
    for name in ("b.jsonl", "a.JSONL", ".h.jsonl", "~c.jsonl", "c.jsonl.part", "d.jsonl~", "e.txt"):
        (tmp_path / name).write_text(a_row(name))
    (tmp_path / "sub.jsonl").mkdir()
    found = Dataset(str(tmp_path), CHOICES)
    assert texts(found) == ["a.JSONL", "b.jsonl"]
    assert found.refused_rows == 0


def test_a_directory_may_be_empty_but_not_full_of_refused_rows(tmp_path: Path) -> None:
    found = Dataset(str(tmp_path), CHOICES)
    with pytest.raises(EngineError, match=r"no usable row yet in .*; put \*\.jsonl, \*\.csv"):
        found.require()
    (tmp_path / "a.jsonl").write_text("?\n")
    with pytest.raises(EngineError, match="no usable row among 1"):
        Dataset(str(tmp_path), CHOICES)


def test_what_is_written_later_takes_part_and_half_a_line_waits(tmp_path: Path) -> None:
    growing = tmp_path / "b.jsonl"
    growing.write_text(a_row("one") + '{"text": "tw')
    found, counted = Dataset(str(tmp_path), CHOICES), Counted(str(tmp_path))
    held = found.rows
    assert (texts(found), found.refused) == (["one"], [])
    with growing.open("a") as file:
        file.write('o", "label": "b"}\n' + a_row("three").strip())
    (tmp_path / "a.csv").write_text('text,label\nzero,a\n"not')
    found.refresh()
    assert (texts(found), found.refused) == (["zero", "one", "two", "three"], [])
    assert len(held) == 1, "whoever holds rows keeps what was there"
    with growing.open("a") as file:
        file.write("\n?\n")
    with (tmp_path / "a.csv").open("a") as file:
        file.write(' yet",b\n')
    found.refresh()
    assert texts(found) == ["zero", "not yet", "one", "two", "three"]
    assert [why.split(": ")[0] for why in found.refused] == [f"{growing}:4"]
    assert counted.look()
    assert counted.records == 6
    assert not counted.look()


def test_a_last_csv_record_without_newline_is_taken_when_its_file_has_come_to_rest(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\none,a\ntwo,b")
    found = Dataset(str(tmp_path), CHOICES)
    assert texts(found) == ["one"]
    status = path.stat()
    os.utime(path, (status.st_atime, status.st_mtime - SETTLED_S - 1))
    found.refresh()
    assert texts(found) == ["one", "two"]


@pytest.mark.parametrize("how", ["cut", "replaced", "rewritten", "gone", "longer and other"])
def test_a_file_that_is_not_what_it_was_is_read_anew(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(a_row("one") + a_row("two"))
    (tmp_path / "b.jsonl").write_text(a_row("other"))
    found, counted = Dataset(str(tmp_path), CHOICES), Counted(str(tmp_path))
    if how == "cut":
        path.write_text(a_row("one"))
    elif how == "replaced":
        (tmp_path / "new").write_text(a_row("1") + a_row("2") + a_row("3"))
        (tmp_path / "new").rename(path)
    elif how == "rewritten":
        path.write_text(a_row("uno") + a_row("dos"))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif how == "gone":
        path.unlink()
    else:
        path.write_text(a_row("1") + a_row("2") + a_row("3") + a_row("4"))
    found.refresh()
    wanted = {
        "cut": ["one"],
        "replaced": ["1", "2", "3"],
        "rewritten": ["uno", "dos"],
        "gone": [],
        "longer and other": ["1", "2", "3", "4"],
    }[how]
    assert texts(found) == [*wanted, "other"]
    assert counted.look()
    assert counted.records == len(wanted) + 1


def test_a_file_that_grows_is_read_on_and_not_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(a_row(str(number)) for number in range(1000)))
    found = Dataset(str(tmp_path), CHOICES)
    before = found.rows
    with path.open("a") as file:
        file.write(a_row("more"))
    found.refresh()
    assert len(found.rows) == 1001
    assert all(old is new for old, new in zip(before, found.rows, strict=False))


def test_a_cut_off_gzip_file_gives_what_it_holds_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    random = os.urandom(20_000).hex()
    whole = gzip.compress((a_row("one") + a_row(random)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    found = Dataset(str(path), CHOICES)
    assert texts(found) == ["one"]
    assert any("no gzip data" in why or "not JSON" in why for why in found.refused)
    in_directory = Dataset(str(tmp_path), CHOICES)
    assert (texts(in_directory), in_directory.refused) == (["one"], [])
    path.write_bytes(whole)
    in_directory.refresh()
    assert texts(in_directory) == ["one", random]
