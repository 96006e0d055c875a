"""What a command prints: text for people, or with --json JSON alone.

The idiom, for every command that comes:

    @commands.command("stop")
    def stop_job(name: str, servers: options.Servers = LOCAL, as_json: options.Json = False):
        printer = Printer(as_json=as_json)

        async def work(bus: NatsBus) -> None:
            ...
            printer.result({"job": name, "stopping": True}, f"job {name} ends")

        talk(servers, work, as_json=as_json)

With --json stdout holds one JSON object, or a line of JSON for each event, and nothing else; an
error is `{"error": ..., "code": ...}` on stderr. Progress bars go to `printer.bars` in any case.
Without a bus: `raise typer.Exit(outcome(command(), as_json=as_json))`.
"""

import os
import sys
from pathlib import Path

import msgspec
from rich.console import Console, RenderableType

console = Console()
"""Standard output, for people."""


class Printer:
    """Where one command's output goes."""

    def __init__(self, *, as_json: bool, out: Console | None = None) -> None:
        """`out` is where people read; standard output unless given."""
        self.as_json = as_json
        self.bars = Console(stderr=True, quiet=not sys.stderr.isatty())
        """Where bars are drawn: stderr, and only if it is a terminal, so that pipes stay clean."""
        self.people = self.bars if as_json else out or console
        """Takes what only people read. With --json it is that of the bars."""

    def result(self, value: object, text: RenderableType) -> None:
        """Print what came of the command: `value` as a line of JSON, or else `text`.

        `value` is a dict, or a msgspec Struct, whose keys are a promise to scripts.
        """
        if self.as_json:
            self.line(value)
        elif isinstance(text, str):
            self.people.print(text, highlight=False, soft_wrap=True, markup=False)
        else:
            self.people.print(text)

    def line(self, value: object) -> None:
        """Print `value` as one line of JSON, with --json; nothing otherwise."""
        if not self.as_json:
            return
        try:
            sys.stdout.write(json_line(value))
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read has had enough, as `head` has: no news to anybody
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None

    def remark(self, text: str) -> None:
        """Tell people something on the way; with --json nothing."""
        if not self.as_json:
            self.people.print(text, highlight=False, soft_wrap=True, markup=False)


def json_line(value: object) -> str:
    """`value` as JSON with a line's end; a path is its text."""
    return msgspec.json.encode(value, enc_hook=_text_of).decode() + "\n"


def _text_of(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"no JSON for a {type(value).__name__}")
