"""The spool: durable, mended at the next start, and never fatal."""

import json
from pathlib import Path

import numpy as np
import pytest

from edge_client.spool import Spool, SpoolFull
from shared.codec import decode, encode
from shared.messages import EvaluateResult, ProbeResult, SubmitUpdate, UpdateKey

ROOM = 1 << 20


def an_update(part: int = 0, *, differences: list[int] | None = None) -> SubmitUpdate:
    numbers = np.array(differences or [5, -7, 2**31 - 1, 2**31 - 1], "<i4")
    return SubmitUpdate(
        key=UpdateKey("job-1", 0, 3, "dev_a", part),
        digest="a" * 64,
        result=ProbeResult("probe", [(0, len(numbers))], numbers.tobytes(), b"", 9, 4),
        work_s=0.5,
    )


def ledger(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "ledger.jsonl").read_bytes().splitlines()]


def facts(directory: Path) -> list[tuple[object, object]]:
    return [(line["key"], line["what"]) for line in ledger(directory)]


def test_an_update_survives_a_restart_until_it_is_settled(tmp_path: Path) -> None:
    update = an_update()
    Spool(tmp_path, max_bytes=ROOM).put(update)
    again = Spool(tmp_path, max_bytes=ROOM)
    assert again.keys == [update.key.text()]
    assert decode(again.read(update.key.text()) or b"", SubmitUpdate) == update
    assert again.settle(update.key.text(), "folded")
    assert not again.settle(update.key.text(), "duplicate")
    assert not Spool(tmp_path, max_bytes=ROOM).keys
    assert not list(tmp_path.glob("*.update"))


def test_the_ledger_holds_what_a_witness_needs_and_no_more(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=ROOM)
    spool.put(an_update())
    evaluated = SubmitUpdate(
        key=UpdateKey("job-1", 0, 3, "dev_a", 1),
        digest="a" * 64,
        result=EvaluateResult(10, 5, 12, 3.0),
        work_s=0.5,
    )
    spool.put(evaluated)
    spool.settle("job-1.0.3.dev_a.0", "late")
    assert ledger(tmp_path) == [
        {"key": "job-1.0.3.dev_a.0", "what": "spooled", "sum": 2**32 - 4, "weight": 4},
        {"key": "job-1.0.3.dev_a.1", "what": "spooled", "sum": None, "weight": 12},
        {"key": "job-1.0.3.dev_a.0", "what": "settled", "outcome": "late"},
    ]
    assert spool.ledger.last_spooled == "job-1.0.3.dev_a.1"


def test_a_key_that_is_held_keeps_its_first_measurement(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=ROOM)
    spool.put(an_update())
    spool.put(an_update(differences=[1]))
    assert decode(spool.read("job-1.0.3.dev_a.0") or b"", SubmitUpdate) == an_update()
    assert len(ledger(tmp_path)) == 1


def test_torn_and_foreign_files_are_set_aside(tmp_path: Path) -> None:
    whole = encode(an_update())
    (tmp_path / "job-1.0.3.dev_a.0.update").write_bytes(whole[:-9])
    (tmp_path / "job-1.0.3.dev_a.9.update").write_bytes(whole)
    (tmp_path / "job-1.0.3.dev_a.5.tmp").write_bytes(whole[:5])
    spool = Spool(tmp_path, max_bytes=ROOM)
    assert spool.keys == []
    assert sorted(spool.bad) == ["job-1.0.3.dev_a.0.update", "job-1.0.3.dev_a.9.update"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bad", ".bad", ".jsonl"]


def test_a_kill_between_rename_and_ledger_is_mended(tmp_path: Path) -> None:
    """Both crash windows: the file without its line, and the settled line with its file."""
    Spool(tmp_path, max_bytes=ROOM).put(an_update(0))
    (tmp_path / "ledger.jsonl").write_bytes(b'{"key":"job-1.0.3.dev')
    spool = Spool(tmp_path, max_bytes=ROOM)
    assert facts(tmp_path) == [("job-1.0.3.dev_a.0", "spooled")]
    spool.ledger.settled("job-1.0.3.dev_a.0", "folded")
    assert Spool(tmp_path, max_bytes=ROOM).keys == []
    assert facts(tmp_path)[1:] == [("job-1.0.3.dev_a.0", "settled")]


def test_a_full_spool_drops_its_oldest(tmp_path: Path) -> None:
    size = len(encode(an_update()))
    spool = Spool(tmp_path, max_bytes=2 * size)
    assert [spool.put(an_update(part)) for part in range(3)] == [[], [], ["job-1.0.3.dev_a.0"]]
    assert spool.keys == ["job-1.0.3.dev_a.1", "job-1.0.3.dev_a.2"]
    assert facts(tmp_path)[-1] == ("job-1.0.3.dev_a.0", "superseded")


def test_a_disk_that_refuses_the_new_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, max_bytes=len(encode(an_update())))
    spool.put(an_update(0))

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", refuse)
        with pytest.raises(SpoolFull):
            spool.put(an_update(1))
    assert spool.keys == ["job-1.0.3.dev_a.0"]


def test_a_disk_that_refuses_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, max_bytes=ROOM)

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", refuse)
        with pytest.raises(SpoolFull, match=f"free space at {tmp_path}"):
            spool.put(an_update())
    assert not spool.keys
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]
    assert ledger(tmp_path) == []
    assert spool.put(an_update()) == []
    assert spool.keys == [an_update().key.text()]
