"""Settings of a process: one frozen Struct, from a TOML file, the environment and the command line.

Later sources win: file, then `<PREFIX>_<FIELD>` variables, then `--field value`. Unknown keys fail.
"""

import argparse
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from shared.errors import ConfigError

Settings = TypeVar("Settings", bound=msgspec.Struct)

SECRETS = frozenset({"password", "token"})
_USER_INFO = re.compile(r"//[^/@]*@")


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
    fields = msgspec.structs.fields(kind)
    parser = argparse.ArgumentParser(prog=program, description=(kind.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", metavar="FILE", help="a TOML file of the settings below")
    for field in fields:
        option = "--" + field.name.replace("_", "-")
        default = "" if field.default is msgspec.NODEFAULT else f" (default: {field.default!r})"
        listed = field.type in (list[str], tuple[str, ...])
        parser.add_argument(
            option,
            dest=field.name,
            default=None,
            metavar="VALUE",
            nargs="+" if listed else None,
            help=f"or {prefix}_{field.name.upper()}{default}",
        )
    arguments = vars(parser.parse_args(list(argv)))
    path = arguments.pop("config")
    merged: dict[str, object] = dict(_from_file(path)) if path else {}
    environ = os.environ if environ is None else environ
    known = {field.name: field for field in fields}
    for name, value in environ.items():
        if name.startswith(prefix + "_") and (key := name[len(prefix) + 1 :].lower()) in known:
            listed = known[key].type in (list[str], tuple[str, ...])
            merged[key] = value.split(",") if listed else value
    merged.update({key: value for key, value in arguments.items() if value is not None})
    unknown = merged.keys() - known.keys()
    if unknown:
        raise ConfigError(f"{path}: unknown settings {sorted(unknown)}; known: {sorted(known)}")
    try:
        return msgspec.convert(merged, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{program}: {error}") from error


def shown(settings: msgspec.Struct) -> dict[str, object]:
    """The settings for the log, without secrets: those fields, and what stands in an address."""
    return {
        key: "***" if key in SECRETS and value else _without_secrets(value)
        for key, value in msgspec.structs.asdict(settings).items()
    }


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
