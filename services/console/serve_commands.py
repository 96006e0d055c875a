"""`seedwire serve ...`: which version a proxy serves, back to an older one, and on again."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from services.console import options
from services.console.failure import Failure, told
from services.console.printing import Printer
from services.console.proxy_client import URL, ProxyClient, Url

commands = typer.Typer(no_args_is_help=True, help="See and choose which version is served.")


@commands.command("versions")
def list_versions(url: Url = URL, as_json: options.Json = False) -> None:
    """Show the versions that a server holds, and which one serves."""
    printer = Printer(as_json=as_json)

    def work(client: ProxyClient) -> None:
        answer = client.get("/v1/seedwire/versions")
        printer.result(answer, _table(answer))
        for digest, why in answer["refused"].items():
            printer.remark(f"refused: {digest[:12]}: {why}")
        if answer["problem"]:
            printer.remark(f"waiting: {answer['problem']}")

    _ask(url, work, as_json=as_json)


@commands.command("routes")
def list_routes(url: Url = URL, as_json: options.Json = False) -> None:
    """Show what each mode came to on the validation rows, and which one answers."""
    printer = Printer(as_json=as_json)

    def work(client: ProxyClient) -> None:
        answer = client.get("/v1/seedwire/routes")
        printer.result(answer, _routes(answer))
        by = "by --mode" if answer["set_by_operator"] else "where a request does not say"
        alpha = "" if answer["alpha"] is None else f" at alpha {answer['alpha']:g}"
        if answer["serving"] is None:
            printer.remark("nothing is served yet")
        else:
            printer.remark(f"{answer['serving']}: {answer['mode']}{alpha} answers, {by}")
        if answer["measuring"]:
            printer.remark(f"measuring {answer['measuring']}")
        if answer["problem"]:
            printer.remark(f"not measured: {answer['problem']}")

    _ask(url, work, as_json=as_json)


@commands.command("rollback")
def roll_back(
    url: Url = URL,
    round: Annotated[
        int | None,
        typer.Option(min=0, help="Serve this round; without it, the version before the present."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Serve an older version, and stay with it until `seedwire serve follow`."""
    printer = Printer(as_json=as_json)

    def work(client: ProxyClient) -> None:
        body: dict[str, object] = {} if round is None else {"round": round}
        answer = client.post("/v1/seedwire/rollback", body)
        printer.result(answer, f"{_now(answer)}; `seedwire serve follow` goes with the best again")

    _ask(url, work, as_json=as_json)


@commands.command("follow")
def follow(url: Url = URL, as_json: options.Json = False) -> None:
    """Serve the best version again (or the newest), and what comes to be better."""
    printer = Printer(as_json=as_json)

    def work(client: ProxyClient) -> None:
        answer = client.post("/v1/seedwire/follow", {})
        printer.result(answer, f"following: {_now(answer)}")

    _ask(url, work, as_json=as_json)


def _ask(url: str, work: Callable[[ProxyClient], None], *, as_json: bool) -> None:
    try:
        work(ProxyClient(url))
    except Failure as failure:
        raise typer.Exit(told(failure, failure.code, as_json=as_json)) from failure


def _now(answer: dict[str, Any]) -> str:
    return f"{answer['serving']} serves ({answer['system_fingerprint']})"


def _routes(answer: dict[str, Any]) -> Table:
    table = Table("version", "mode", "alpha", "loss", "accuracy", "gain", "")
    for name, measured in answer["versions"].items():
        for line in measured["routes"]:
            gain = f"{_number(line['gain'], 4)} ± {_number(line['standard_error'], 4)}"
            shown = [_number(line["loss"], 4), _number(line["accuracy"], 3), gain]
            alpha = "" if line["alpha"] is None else f"{line['alpha']:g}"
            table.add_row(name, line["mode"], alpha, *shown, "best" if line["best"] else "")
    return table


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _table(answer: dict[str, Any]) -> Table:
    table = Table("version", "digest", "")
    rows = {version["model"]: version["digest"][:12] for version in answer["versions"]}
    if answer["serving"] is not None:
        rows.setdefault(answer["serving"], answer["system_fingerprint"].rpartition("-")[2])
    for name, digest in rows.items():
        notes = ["serves"] if name == answer["serving"] else []
        notes += ["pinned"] if name == answer["pinned"] else []
        table.add_row(name, digest, ", ".join(notes))
    return table
