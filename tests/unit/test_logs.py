"""Logs: what comes too often is left out and counted."""

import os
import pty
import subprocess
import sys
from collections.abc import MutableMapping
from typing import Any

import pytest
import structlog

from shared.logs import BURST, Sparing


def test_one_event_a_million_times_costs_few_lines_and_hides_no_other() -> None:
    now = 0.0
    sparing = Sparing(lambda: now)

    def lines(event: str, count: int, method: str = "warning") -> list[MutableMapping[str, Any]]:
        found: list[MutableMapping[str, Any]] = []
        for _ in range(count):
            try:
                found.append(sparing(None, method, {"event": event}))
            except structlog.DropEvent:
                continue
        return found

    assert len(lines("update_rejected", 10_000)) == BURST
    assert lines("round_closed", 1) == [{"event": "round_closed"}]
    assert len(lines("message_failed", 10_000, "error")) == 10_000
    now = 60.0
    again = lines("update_rejected", 1)
    assert again == [{"event": "update_rejected", "left_out": 10_000 - int(BURST)}]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_lines_for_people_in_colour_unless_that_is_unwanted(no_color: str) -> None:
    program = "from shared import logs; logs.configure('t'); logs.get('t').info('fact', rows=3)"
    master, slave = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", program], stderr=slave, env=environment, check=True)
    os.close(slave)
    line = os.read(master, 4096).decode()
    os.close(master)
    assert "fact" in line
    assert "{" not in line
    assert ("\x1b[" in line) == (not no_color)


@pytest.mark.parametrize("method", ["info", "warning"])
def test_lines_now_and_then_all_stay(method: str) -> None:
    now = 0.0
    sparing = Sparing(lambda: now)
    for _ in range(1000):
        now += 0.25
        assert "left_out" not in sparing(None, method, {"event": "round_closed"})
