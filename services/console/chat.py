"""`seedwire chat`: talk to the served model, or have lines labelled: typed, given or piped."""

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from services.console import options
from services.console.failure import EXIT_INTERRUPTED, Failure, told
from services.console.printing import Printer
from services.console.proxy_client import URL, ProxyClient, Url

BARS_SHOWN = 10
BAR_WIDTH = 24
HINT = "Ctrl-D ends, Ctrl-C stops an answer, /new forgets the conversation"


def chat_command(
    url: Url = URL,
    model: Annotated[
        str | None, typer.Option(help="JOB, JOB@ROUND or base; without it, the one that serves.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Say this, print the answer, and end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=100.0, help="0: always the likeliest token.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer, in tokens.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="small, large or ensemble; without it, what the server finds best."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(min=0.0, max=10.0, help="How strongly the small model steers the large one."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Talk to the served model; for a job with labels, have each line labelled."""
    printer = Printer(as_json=as_json)
    way = {"proxy_mode": mode, "proxy_alpha": alpha}
    asked: dict[str, object] = {"model": model}
    asked |= {name: value for name, value in way.items() if value is not None}
    if temperature is not None:
        asked["temperature"] = temperature
    if max_tokens is not None:
        asked["max_tokens"] = max_tokens
    try:
        client = ProxyClient(url)
        name, labels = client.labels(model)
        if labels:
            _Classifier(client, printer, name, asked).run(message)
        else:
            _Talk(client, printer, name, asked, system).run(message)
    except Failure as failure:
        raise typer.Exit(told(failure, failure.code, as_json=as_json)) from failure
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from interrupt


class _Talk:
    """A conversation, which the server is told whole each time: it keeps none."""

    def __init__(
        self,
        client: ProxyClient,
        printer: Printer,
        name: str,
        asked: dict[str, object],
        system: str | None,
    ) -> None:
        self._client = client
        self._printer = printer
        self._name = name
        self._asked = asked
        self._told = [{"role": "system", "content": system}] if system else []
        self._said: list[dict[str, str]] = []

    def run(self, message: str | None) -> None:
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.read()
            if not message or message.isspace():
                raise Failure("nothing came on standard input")
        if message is not None:
            self._once(message)
            return
        self._printer.remark(f"{self._name}. {HINT}.")
        for line in _lines("> "):
            if line == "/new":
                self._said.clear()
                self._printer.remark("a new conversation")
                continue
            self._said.append({"role": "user", "content": line})
            self._said.append({"role": "assistant", "content": self._answer()})

    def _once(self, message: str) -> None:
        self._said.append({"role": "user", "content": message})
        if not self._printer.as_json:
            self._answer()
            return
        answer = self._client.post("/v1/chat/completions", self._body())
        choice = answer["choices"][0]
        self._printer.line(
            {
                "content": choice["message"]["content"],
                "finish_reason": choice["finish_reason"],
                "model": answer["model"],
                "system_fingerprint": answer["system_fingerprint"],
                "usage": answer["usage"],
            }
        )

    def _body(self) -> dict[str, object]:
        return self._asked | {"messages": [*self._told, *self._said]}

    def _answer(self) -> str:
        """The answer, shown as it comes; Ctrl-C ends it there."""
        text = ""
        try:
            with closing(self._client.stream("/v1/chat/completions", self._body())) as events:
                for event in events:
                    piece = _text_of(event)
                    text += piece
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        if not text.endswith("\n"):
            sys.stdout.write("\n")
        return text


class _Classifier:
    """Each line gets a label."""

    def __init__(
        self, client: ProxyClient, printer: Printer, name: str, asked: dict[str, object]
    ) -> None:
        self._client = client
        self._printer = printer
        self._name = name
        labelling = ("model", "proxy_mode", "proxy_alpha")
        self._asked = {name: asked[name] for name in labelling if name in asked}

    def run(self, message: str | None) -> None:
        if message is not None:
            self._label(message)
            return
        if sys.stdin.isatty():
            self._printer.remark(f"{self._name} labels each line. Ctrl-D ends.")
        for line in _lines("> "):
            self._label(line)

    def _label(self, text: str) -> None:
        answer = self._client.post("/v1/classify", self._asked | {"text": text})
        self._printer.result(answer, bars(answer["probabilities"]))


def bars(shares: dict[str, float]) -> Table:
    """The likeliest labels, each with a bar and its share in percent."""
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(width=BAR_WIDTH)
    table.add_column(justify="right")
    ranked = sorted(shares.items(), key=lambda pair: -pair[1])
    for number, (label, share) in enumerate(ranked[:BARS_SHOWN]):
        style = "bold" if number == 0 else ""
        filled = round(share * BAR_WIDTH)
        bar = "█" * filled + "·" * (BAR_WIDTH - filled)
        table.add_row(Text(label, style), Text(bar, style), Text(f"{share:.1%}", style))
    if len(ranked) > BARS_SHOWN:
        rest = sum(share for _, share in ranked[BARS_SHOWN:])
        table.add_row(Text(f"{len(ranked) - BARS_SHOWN} others"), "", Text(f"{rest:.1%}"))
    return table


def _text_of(event: dict[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _lines(prompt: str) -> Iterator[str]:
    """Lines that say something: typed at a prompt with editing and history, or piped."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # gives input() its editing and history

    readline.set_history_length(1000)
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            return
        if line:
            yield line
