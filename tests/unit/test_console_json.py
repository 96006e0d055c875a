"""Every command can speak JSON to programs; errors too."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from services.console import __main__ as console
from services.console.failure import EXIT_FAILURE, EXIT_USAGE, Failure, outcome
from services.console.printing import Printer
from services.console.sparkline import BARS, PLAIN, bars_for, sparkline
from shared.runtime import project_version

PEOPLE_ONLY = {"up", "chat"}
"""They run until they are stopped, and are talked with."""


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def test_every_command_takes_json_and_explains_itself() -> None:
    found = dict(commands(typer.main.get_command(console.app)))
    assert {"job submit", "job list", "job stop", "job watch", "devices", "doctor"} <= found.keys()
    for name, command in found.items():
        assert command.help, f"seedwire {name} needs a docstring: it is the help"
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options or name in PEOPLE_ONLY, (
            f"seedwire {name} has no --json: see services/console/printing.py"
        )
        for parameter in command.params:
            hidden = getattr(parameter, "hidden", False)
            assert parameter.help or hidden, f"seedwire {name} {parameter.name} has no help"


def test_json_goes_to_stdout_alone_and_text_for_people_nowhere_near(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = Printer(as_json=True)
    printer.remark("only people read this")
    printer.result({"file": Path("a b"), "size_bytes": 3}, "for people")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ('{"file":"a b","size_bytes":3}\n', "")
    assert printer.people.stderr


def test_people_read_what_is_written_and_no_markup_is_made_of_it() -> None:
    written = io.StringIO()
    printer = Printer(as_json=False, out=Console(file=written, width=40))
    printer.result({"x": 1}, "a [bold]label[/bold] " + "long " * 20)
    printer.line({"x": 1})
    assert written.getvalue() == "a [bold]label[/bold] " + "long " * 20 + "\n"


def test_a_failure_is_json_on_stderr_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    async def fails() -> None:
        raise Failure('no "such" job')

    assert outcome(fails(), as_json=True) == EXIT_FAILURE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert json.loads(printed.err) == {"error": 'no "such" job', "code": EXIT_FAILURE}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("job watch --json", "JOB"),
        ("job submit --json --name x", "--model"),
        ("job list --json --servrs x", "--servrs"),
        ("jobs --json", "jobs"),
        ("job submit --json --name x --model m --rounds none", "rounds"),
        ("job stop --json a.b --servers nats://127.0.0.1:1", "no broker lets us in"),
    ],
)
def test_wrong_usage_is_json_too(
    line: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.console.client.CONNECT_S", 0.2)
    monkeypatch.setattr("sys.argv", ["seedwire", *line.split()])
    with pytest.raises(SystemExit) as exit:
        console.main()
    printed = capsys.readouterr()
    told = json.loads(printed.err)
    assert printed.out == ""
    assert (told["code"], words in told["error"]) == (exit.value.code, True), told
    assert told["code"] in (EXIT_USAGE, 69)


@pytest.mark.parametrize("more", [[], ["job", "list"]])
def test_the_version_is_all_that_is_printed_where_it_is_asked_for(
    more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["seedwire", "--version", *more])
    with pytest.raises(SystemExit) as exit:
        console.main()
    assert (exit.value.code, capsys.readouterr().out) == (0, f"{project_version()}\n")


def test_without_a_command_the_help_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["seedwire"])
    with pytest.raises(SystemExit):
        console.main()
    shown = capsys.readouterr()
    for name in ("up", "job", "devices", "doctor", "--install-completion", "--version"):
        assert name in shown.out + shown.err


# ---- the curve


@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=200), st.integers(2, 40))
def test_a_curve_has_its_ends_and_its_extremes_in_order(values: list[float], width: int) -> None:
    line = sparkline(values, width=width)
    assert len(line) == min(len(values), width)
    heights = [BARS.index(bar) for bar in line]
    if values[0] < values[-1]:
        assert heights[0] <= heights[-1]
    if len(values) <= width and min(values) < max(values):
        assert heights[values.index(max(values))] == len(BARS) - 1
        assert heights[values.index(min(values))] == 0


def test_a_curve_is_plain_where_bars_cannot_be_written() -> None:
    assert (bars_for("utf-8"), bars_for("latin-1"), bars_for("?")) == (BARS, PLAIN, PLAIN)
    assert sparkline([0.0, 0.5, 1.0], bars=PLAIN) == "_+@"
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == BARS[0] * 2
