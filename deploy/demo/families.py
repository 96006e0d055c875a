"""The demo's families of standard library modules, and which device holds which modules.

A module is named by its dotted name; a package stands for all modules below it. The demo's
pretraining text is drawn from *other* modules only, so no paragraph here has been read by the
model before the fleet tunes it (see `is_demo_path`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType

FAMILIES: tuple[str, ...] = ("protocol", "files", "numbers", "code")
"""The labels. With a leading space each is one token of the demo's model."""

PROMPT_TEMPLATE = "{text}\nTopic:"
"""What the model is asked; the suffix under which it was pretrained to name a text's origin."""

HELD_OUT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "protocol": ("imaplib", "smtplib", "poplib"),
        "files": ("zipfile", "tempfile", "pathlib"),
        "numbers": ("statistics", "fractions", "numbers", "calendar"),
        "code": ("pdb", "code", "trace", "dis"),
    }
)
"""Modules no device ever holds: the text on which the tuned model is judged."""

DEVICES: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {"protocol": ("http.client", "http.cookies"), "files": ("gzip", "bz2")},
    {"protocol": ("http.cookiejar",), "code": ("symtable", "pyclbr")},
    {"protocol": ("urllib",), "numbers": ("random",)},
    {"protocol": ("ftplib", "ssl"), "files": ("fileinput", "glob", "fnmatch"), "code": ("ast",)},
    {"files": ("shutil", "filecmp"), "code": ("bdb", "tokenize")},
    {"files": ("tarfile", "lzma", "posixpath"), "numbers": ("bisect", "heapq", "colorsys")},
    {"code": ("inspect",), "numbers": ("datetime", "_pydatetime"), "protocol": ("socketserver",)},
    {"numbers": ("_pydecimal",), "code": ("traceback", "codeop"), "files": ("genericpath",)},
)
"""For every device: family -> the modules whose documentation is its private text."""


def demo_modules() -> frozenset[str]:
    """Return the dotted names of all modules the demo uses, held out or on a device."""
    on_devices = {name for held in DEVICES for names in held.values() for name in names}
    held_out = {name for names in HELD_OUT.values() for name in names}
    return frozenset(on_devices | held_out)


_ALIASES = frozenset(
    {"cookies", "datetimetester", "decimal", "debugger", "httplib", "httpservers", "robotparser"}
    | {"urllib2", "urllibnet", "urlparse", "zipfile64", "zipimport", "zipapp"}
)
"""Further stems under which demo modules are implemented, tested or built upon."""


def is_demo_path(path: PurePosixPath) -> bool:
    """Tell whether a file, relative to the library, belongs to a demo module or tests one.

    Deliberately wide: `test/test_datetime.py` falls with `datetime`, and one module of a package
    takes its whole package along.
    """
    tops = _ALIASES | {_stem(name.split(".")[0]) for name in demo_modules()}
    stems = {_stem(part.removesuffix(".py")) for part in path.parts}
    return any(stem == top or stem.startswith(f"{top}_") for stem in stems for top in tops)


def _stem(name: str) -> str:
    return name.removeprefix("test_").removeprefix("_py").strip("_")
