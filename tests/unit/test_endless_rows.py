"""What unpacks without end is refused by its line, in little memory; rows before it are used."""

import gzip
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.dataset import Counted, Dataset, records
from shared.errors import EngineError
from shared.messages import Task

MIB = 1 << 20
MOST_BYTES = 48 * MIB
ROWS = b'{"prompt": "p", "completion": "c"}\n' * 3
TABLE = b"prompt,completion\np,c\nq,d\nr,e\n"


def packed(path: Path, head: bytes, piece: bytes, mib: int) -> Path:
    """A small file of `head` and of `mib` MiB of `piece`, again and again."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(mib):
            file.write(piece * (MIB // len(piece)))
    return path


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("name", "head", "piece", "mib", "line", "why"),
    [
        ("rows.jsonl.gz", ROWS, b"x" * MIB, 24, 4, "longer than 4194304 bytes"),
        ("rows.csv.gz", TABLE, b"x" * MIB, 24, 5, "longer than 4194304 bytes"),
        ("rows.csv.gz", TABLE, b'"x\n",', 1, 5, "longer than 131072 lines"),
        ("rows.csv.gz", TABLE, b'"%s\n",' % (b"x" * 1000), 24, 5, "longer than 4194304 bytes"),
    ],
)
def test_text_without_end_is_refused_by_its_line_and_takes_little_memory(
    tmp_path: Path, name: str, head: bytes, piece: bytes, mib: int, line: int, why: str
) -> None:
    path = packed(tmp_path / name, head, piece, mib=mib)
    found = Dataset(str(path), Task("tokens"))
    assert len(found.rows) == 3
    assert found.refused[0].startswith(f"{path}:{line}: {why}")
    assert Counted(str(path)).records >= 4
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.csv.gz"])
def test_the_end_of_an_endless_line_is_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(records, "_LONGEST_LINE", 100)
    monkeypatch.setattr(records, "_ENDLESS_LINE", MIB)
    head = TABLE if ".csv" in name else ROWS
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "wb") as file:
        file.write(head + b"x" * 3 * MIB + b"\n" + head)
    found = Dataset(str(tmp_path / name), Task("tokens"))
    assert len(found.rows) == 3
    assert found.refused_rows == 1
    assert found.refused[0].endswith("longer than 100 bytes; the rest of the file is not read")


def test_a_table_whose_header_never_ends_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_LONGEST_LINE", 100)
    path = packed(tmp_path / "rows.csv.gz", b"", b"prompt,", mib=1)
    with pytest.raises(EngineError, match=r"rows.csv.gz:1: its header is longer than 100 bytes"):
        Dataset(str(path), Task("tokens"))
