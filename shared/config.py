"""Settings of a process: one frozen Struct, from a TOML file, the environment and the command line.

Later sources win: file, then `<PREFIX>_<FIELD>` variables, then `--field value`. Unknown keys fail.
What `--help` says of a field is the `description` of its msgspec Meta.
"""

import argparse
import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo

from shared.errors import ConfigError

Settings = TypeVar("Settings", bound=msgspec.Struct)

SECRETS = frozenset({"api_key", "large_key", "password", "ticket", "token"})
_USER_INFO = re.compile(r"//[^/@]*@")
_ORCHESTRATED = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_\w+)$")
"""Variables that Kubernetes sets of its own, besides NAME_PORT=tcp://..."""
_LINK = re.compile(r"(tcp|udp|sctp)://")


def load(
    kind: type[Settings],
    *,
    program: str,
    prefix: str,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of this process.

    Raises:
        ConfigError: an unreadable file, an unknown key, or a value of the wrong form; names it.
    """
    known = {field.name: field for field in msgspec.structs.fields(kind)}
    parser = argparse.ArgumentParser(prog=program, description=(kind.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", metavar="FILE", help="A TOML file of the settings below.")
    for field in known.values():
        _add_option(parser, field, _variable(prefix, field.name))
    arguments = vars(parser.parse_args(list(argv)))
    path = arguments.pop("config")
    given: dict[str, tuple[str, object]] = {}  # by setting: what names the source, and the value
    for name, value in (_from_file(path) if path else {}).items():
        given[name] = (f"{path}: {name}", value)
    environ = os.environ if environ is None else environ
    for name, field in known.items():
        variable = _variable(prefix, name)
        text = environ.get(variable)
        if text is not None and not _is_orchestrated(variable, text):
            given[name] = (variable, text.split(",") if _is_list(field) else text)
    given |= {
        name: (_option(name), value) for name, value in arguments.items() if value is not None
    }
    unknown = given.keys() - known.keys()
    if unknown:
        raise ConfigError(f"{path}: unknown settings {sorted(unknown)}; known: {sorted(known)}")
    values = {name: _converted(known[name], *given[name]) for name in given}
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{program}: {error}") from error


def misspelt(
    kind: type[msgspec.Struct], prefix: str, environ: Mapping[str, str] | None = None
) -> list[str]:
    """A sentence for each variable of `prefix` that sets nothing; values are not told."""
    known = [_variable(prefix, field.name) for field in msgspec.structs.fields(kind)]
    sentences: list[str] = []
    for name, text in sorted((os.environ if environ is None else environ).items()):
        ours = name.startswith(f"{prefix}_") and name not in known
        if ours and not _is_orchestrated(name, text):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            sentences.append(f"{name} sets nothing; did you mean {near[0]}?")
    return sentences


def shown(settings: msgspec.Struct, *, changed_only: bool = False) -> dict[str, object]:
    """The settings for the log, without secrets: those fields, and what stands in an address.

    With `changed_only`, those alone that differ from their defaults.
    """
    defaults = {
        field.name: field.default
        if field.default_factory is msgspec.NODEFAULT
        else field.default_factory()
        for field in msgspec.structs.fields(settings)
    }
    return {
        key: "***" if key in SECRETS and value else _without_secrets(value)
        for key, value in msgspec.structs.asdict(settings).items()
        if not (changed_only and value == defaults.get(key, msgspec.NODEFAULT))
    }


def _variable(prefix: str, name: str) -> str:
    return f"{prefix}_{name.upper()}"


def _is_orchestrated(variable: str, text: str) -> bool:
    """Whether Kubernetes set it, for a Service that has our name."""
    if _ORCHESTRATED.search(variable) is not None:
        return True
    return variable.endswith("_PORT") and _LINK.match(text) is not None


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_option(parser: argparse.ArgumentParser, field: FieldInfo, variable: str) -> None:
    """`parser` knows the option of a field, with its description, default and variable."""
    bare, described = _described(field.type)
    form: dict[str, Any] = {"metavar": "VALUE"}
    if _is_list(field):
        form["nargs"] = "+"
    elif bare is bool:
        form = {"metavar": "true|false", "nargs": "?", "const": "true"}
    elif get_origin(bare) is Literal:
        form["metavar"] = "|".join(map(str, get_args(bare)))
    default = field.default
    if isinstance(default, tuple):
        default = " ".join(map(str, cast("tuple[object, ...]", default)))
    elif isinstance(default, bool):
        default = str(default).lower()
    shown = default not in ("", msgspec.NODEFAULT)
    notes = f"[{f'default: {default}; ' if shown else ''}{variable}]"
    text = f"{described} {notes}".strip().replace("%", "%%")
    parser.add_argument(_option(field.name), dest=field.name, default=None, help=text, **form)


def _described(kind: Any) -> tuple[Any, str]:
    """A type without its annotations, and the description that stands among them."""
    if get_origin(kind) is not Annotated:
        return kind, ""
    bare, *notes = get_args(kind)
    texts = [note.description for note in notes if isinstance(note, msgspec.Meta)]
    return bare, " ".join(filter(None, texts))


def _is_list(field: FieldInfo) -> bool:
    return get_origin(_described(field.type)[0]) in (list, tuple)


def _converted(field: FieldInfo, source: str, value: object) -> object:
    """What `source` says, as the field's type; a plain string is a list of one.

    Raises:
        ConfigError: it is of the wrong form; names the source and, but for a secret, the value.
    """
    if isinstance(value, str) and _is_list(field):
        value = [value]
    try:
        return msgspec.convert(value, field.type, strict=False)
    except msgspec.ValidationError as error:
        bare, _ = _described(field.type)
        if get_origin(bare) is Literal:
            why = f"Expected {' or '.join(map(str, get_args(bare)))}"
        else:
            why = str(error).split(" - at ")[0].replace("`", "")
        if field.name not in SECRETS:
            got = "" if ", got " in why else ", got"
            why = f"{why}{got} {json.dumps(_without_secrets(value), default=str)}"
        raise ConfigError(f"{source}: {why}") from error


def _without_secrets(value: object) -> object:
    if isinstance(value, str):
        return _USER_INFO.sub("//***@", value)
    if isinstance(value, (list, tuple)):
        return [_without_secrets(one) for one in cast("Sequence[object]", value)]
    return value


def _from_file(path: str) -> Mapping[str, object]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
