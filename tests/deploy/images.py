"""What the Dockerfile and compose.yaml say, read from them, so that no test repeats it."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
PREFIX = "/opt/seedwire"


@dataclass(frozen=True)
class Stage:
    """One `FROM ... AS name`, with what it inherits from the stages before it."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()
    user: str = ""
    stop_signal: str = ""
    environment: str = ""
    """The stage whose virtual environment it copies."""
    runs: tuple[str, ...] = ()
    """Its own RUN lines."""


def stages(path: Path = DOCKERFILE) -> dict[str, Stage]:
    """Every stage of a Dockerfile, by name."""
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for word, rest in _instructions(path.read_text(encoding="utf-8")):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = replace(found.get(base, Stage(base)), name=name, runs=())
        elif current is not None:
            current = _with(current, word, rest)
        if current is not None:
            found[current.name] = current
    return found


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    words = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in words]


def _with(stage: Stage, word: str, rest: str) -> Stage:
    match word:
        case "ENV":
            pairs = dict(pair.split("=", 1) for pair in shlex.split(rest))
            return replace(stage, env={**stage.env, **pairs})
        case "ENTRYPOINT":
            return replace(stage, entrypoint=tuple(json.loads(rest)), command=())
        case "CMD":
            return replace(stage, command=tuple(json.loads(rest)))
        case "HEALTHCHECK":
            _, _, command = rest.partition("CMD ")
            return replace(stage, healthcheck=tuple(json.loads(command)) if command else ())
        case "USER":
            return replace(stage, user=rest)
        case "STOPSIGNAL":
            return replace(stage, stop_signal=rest)
        case "COPY" if rest.endswith(f" {PREFIX}"):
            named = re.match(r"--from=(\S+)", rest)
            return replace(stage, environment=named[1] if named else "")
        case "RUN":
            return replace(stage, runs=(*stage.runs, rest))
        case _:
            return stage


def images() -> dict[str, Stage]:
    """The stages that are images: those with an entry point."""
    return {name: stage for name, stage in stages().items() if stage.entrypoint}


def compose(*overrides: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """compose.yaml with these files on top; `variables` and defaults are put in."""
    merged: dict[str, Any] = {}
    for name in ("compose.yaml", *overrides):
        text = (DEPLOY / name).read_text(encoding="utf-8")
        merged = _merged(merged, _filled(yaml.safe_load(text), variables or {}))
    return merged


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    """Every ${NAME:-default} in its strings is what `variables` say, or its default."""
    if isinstance(value, dict):
        return {key: _filled(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, variables) for one in value]
    if isinstance(value, str):
        pattern = r"\$\{(\w+):-([^}]*)\}"
        return re.sub(pattern, lambda found: variables.get(found[1], found[2]), value)
    return value


def _merged(below: Any, above: Any) -> Any:
    """As compose merges files: maps by key, lists one after the other, all else replaced."""
    if isinstance(below, dict) and isinstance(above, dict):
        keys = {**below, **above}
        return {
            key: above[key]
            if key == "command" and key in above
            else _merged(below.get(key), above.get(key, below.get(key)))
            for key in keys
        }
    if isinstance(below, list) and isinstance(above, list) and below is not above:
        return [*below, *above]
    return above


def in_order(services: Mapping[str, Any]) -> list[str]:
    """The names of `services`, each after those it depends on."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        for before in services[name].get("depends_on", {}):
            visit(before)
        if name not in ordered:
            ordered.append(name)

    for name in services:
        visit(name)
    return ordered
