"""The spool: durable, mended at the next start, and never fatal."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from edge_client.spool import Spool, SpoolFull
from shared.codec import decode, encode
from shared.messages import EvaluateResult, ProbeResult, SubmitUpdate, UpdateKey
from tests.chaos.disks import Platters, SimulatedDisk

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


def test_the_oldest_is_the_first_spooled_whatever_the_clock_said(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=ROOM)
    for part, hour in enumerate((9, 5, 7)):  # the device's clock was set back and forth
        spool.put(an_update(part))
        path = tmp_path / f"job-1.0.3.dev_a.{part}.update"
        os.utime(path, (3600 * hour, 3600 * hour))
    assert Spool(tmp_path, max_bytes=ROOM).keys == [f"job-1.0.3.dev_a.{part}" for part in range(3)]


class PowerCut(BaseException):
    """Nothing runs after this."""


class Session:
    """What a device does between two power cuts, and how far it came."""

    def __init__(self, platters: Platters, last_step: int) -> None:
        self.kept: list[str] = []
        self.let_go: list[str] = []
        self._left = last_step
        self._disk = SimulatedDisk(platters, self._step)

    def run(self) -> bool:
        """Whether it came to its end."""
        try:
            spool = Spool(Path("spool"), max_bytes=2 * len(encode(an_update())), disk=self._disk)
            for part in range(4):
                dropped = spool.put(an_update(part))
                self.kept.append(an_update(part).key.text())
                self.let_go += dropped
                if part == 1:
                    spool.settle(self.kept[1], "too_late")
                    self.let_go.append(self.kept[1])
        except PowerCut:
            return False
        return True

    def _step(self, what: str) -> None:
        self._left -= 1
        if self._left < 0:
            raise PowerCut


@pytest.mark.parametrize("seed", range(5))
def test_a_power_cut_at_any_step_loses_nothing_and_the_ledger_knows_all(seed: int) -> None:
    for last_step in range(200):
        platters = Platters(random.Random(seed))
        session = Session(platters, last_step)
        finished = session.run()
        platters.power_cut()
        again = Spool(Path("spool"), max_bytes=ROOM, disk=SimulatedDisk(platters, lambda _: None))
        assert again.bad == []
        data = platters.names["ledger.jsonl"].data
        lines = [json.loads(line) for line in data.splitlines()]
        spooled = {line["key"] for line in lines if line["what"] == "spooled"}
        done = {line["key"] for line in lines if line["what"] != "spooled"}
        held = set(again.keys)
        assert set(session.kept) <= spooled
        assert spooled == held | done
        assert not held & done
        assert set(session.let_go) <= done
        if finished:
            return
    pytest.fail("the session never came to its end")


def test_a_ledger_with_a_bound_keeps_what_is_held_and_the_number_of_the_last_part(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path, max_bytes=ROOM, max_ledger_bytes=500)
    for part in range(40):
        spool.put(an_update(part))
        if part != 7:
            spool.settle(an_update(part).key.text(), "folded")
        assert spool.ledger.size_bytes == (tmp_path / "ledger.jsonl").stat().st_size < 900
    assert ("job-1.0.3.dev_a.7", "spooled") in facts(tmp_path)
    assert len(facts(tmp_path)) < 10
    spool.settle("job-1.0.3.dev_a.7", "late")
    again = Spool(tmp_path, max_bytes=ROOM, max_ledger_bytes=500)
    assert again.keys == []
    assert again.ledger.last_spooled == "job-1.0.3.dev_a.39"


@pytest.mark.parametrize("killed", [False, True])
def test_a_word_that_the_ledger_has_no_room_for_is_written_when_there_is_some(
    killed: bool,
) -> None:
    platters = Platters(random.Random(1))
    disk = SimulatedDisk(platters, lambda _: None)
    spool = Spool(Path("spool"), max_bytes=ROOM, disk=disk)
    for part in range(2):
        spool.put(an_update(part))
    platters.full = True
    with pytest.raises(OSError, match="No space"):
        spool.settle("job-1.0.3.dev_a.0", "too_late")
    assert spool.keys == ["job-1.0.3.dev_a.1"]
    assert platters.names["job-1.0.3.dev_a.0.too_late.settled"].data == b"", "its room is free"
    platters.full = False
    if killed:
        platters.power_cut()
        spool = Spool(Path("spool"), max_bytes=ROOM, disk=disk)
    spool.settle("job-1.0.3.dev_a.1", "folded")
    assert sorted(platters.names) == ["ledger.jsonl"]
    lines = [json.loads(line) for line in platters.names["ledger.jsonl"].data.splitlines()]
    told = {line["key"][-1]: line["outcome"] for line in lines if line["what"] == "settled"}
    assert told == {"0": "too_late", "1": "folded"}


def test_a_start_on_a_full_disk_takes_up_what_the_ledger_does_not_know_yet() -> None:
    """Killed between the rename and the line, and then there is no room for the line."""
    platters = Platters(random.Random(1))
    disk = SimulatedDisk(platters, lambda _: None)
    Spool(Path("spool"), max_bytes=ROOM, disk=disk).put(an_update())
    platters.names["ledger.jsonl"].data = b""
    platters.full = True
    spool = Spool(Path("spool"), max_bytes=ROOM, disk=disk)
    assert spool.keys == ["job-1.0.3.dev_a.0"]
    with pytest.raises(OSError, match="No space"):
        spool.settle("job-1.0.3.dev_a.0", "folded")
    assert spool.keys == ["job-1.0.3.dev_a.0"], "its line can still be made from it"
    platters.full = False
    spool.settle("job-1.0.3.dev_a.0", "folded")
    lines = [json.loads(line) for line in platters.names["ledger.jsonl"].data.splitlines()]
    assert [line["what"] for line in lines] == ["spooled", "settled"]
