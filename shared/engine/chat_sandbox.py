"""Jinja as models' chat templates are written for, with no way to the outside and none to go on.

Jinja's own sandbox keeps a template from Python; it does not keep one from a loop in a loop, or
from a text that doubles a hundred times. Here everything that a template does is charged to the
budget of the rendering: each turn of a loop, each call, each letter that it makes or puts out.
What cannot be charged before it is made is not there at all.
"""

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

BUDGET = 1 << 22
"""Letters that a template may make for a short conversation; a step costs as many as `STEP`."""
BUDGET_A_LETTER = 64
"""And for each letter of the conversation."""
STEP = 16

_LONGEST_REPEAT = 1 << 12
_LARGEST_NUMBER = 1 << 64
_WIDTHS = re.compile(r"\d{4}|\*|\{[^{}]*\{")
_NO_METHODS = frozenset({"encode", "expandtabs", "to_bytes", "translate"})
_LEFT_OUT = frozenset(
    {
        *("batch", "center", "filesizeformat", "format", "pprint", "random", "slice"),
        *("truncate", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"),
    }
)
"""Filters that make much of little, and that no chat template has use for."""


@dataclass
class _Budget:
    left: int


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def budget(letters: int) -> Generator[None]:
    """What is rendered meanwhile may do so much as a conversation of `letters` needs, and more.

    Raises:
        SecurityError: it did more.
    """
    token = _budget.set(_Budget(BUDGET + BUDGET_A_LETTER * letters))
    try:
        yield
    finally:
        _budget.reset(token)


def environment(**filters: Callable[..., object]) -> jinja2.Environment:
    """An environment for templates that nobody vouches for, with `filters` as well."""
    made = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, _Generation],
        optimized=False,  # what is worked out while compiling is charged to nobody
    )
    ours = {"replace": _replace, "join": _join, "indent": _indent}
    made.filters.update(cast("dict[str, Any]", {**filters, **ours}))
    for name, function in list(made.filters.items()):
        if name in _LEFT_OUT:
            del made.filters[name]
        else:
            made.filters[name] = _metered(function)
    del made.globals["lipsum"]
    return made


def _charge(units: int) -> None:
    found = _budget.get()
    if found is not None:
        found.left -= units
        if found.left < 0:
            raise SecurityError("it does too much: a loop in a loop, or a text that grows")


def _step() -> bool:
    _charge(STEP)
    return True


def _size(value: object) -> int:
    if isinstance(value, int):
        return value.bit_length() // 8
    return len(value) if isinstance(value, Sized) else 1


def _charged(value: object) -> object:
    """`value`, paid for; an iterator pays as it goes."""
    if isinstance(value, Iterator):
        return _counted(cast("Iterator[object]", value))
    _charge(_size(value))
    return value


def _counted(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        _step()
        yield value


def _said(value: object) -> object:
    """What is put out, a set block's text included."""
    _charge(STEP + _size(value))
    return value


def _joined(*parts: object) -> str:
    texts = [str(part) for part in parts]
    _charge(STEP + sum(map(len, texts)))
    return "".join(texts)


def _metered(function: Callable[..., object]) -> Callable[..., object]:
    @wraps(function)
    def metered(*args: Any, **named: Any) -> object:
        _step()
        return _charged(function(*args, **named))

    return metered


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    return _replaced(str(text), str(old), str(new), -1 if count is None else count)


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old)
    _charge((found if count < 0 else min(found, count)) * len(new))
    return text.replace(old, new, count)


def _join(values: Iterable[object], d: object = "", attribute: str | None = None) -> str:
    texts = [
        str(one if attribute is None else cast("Any", one)[attribute]) for one in _counted(values)
    ]
    return _joined_by(str(d), texts)


def _joined_by(separator: str, texts: Iterable[object]) -> str:
    whole = [str(one) for one in _counted(texts)]
    _charge(sum(map(len, whole)) + len(separator) * len(whole))
    return separator.join(whole)


def _indent(text: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    space = width if isinstance(width, str) else " " * min(width, _LONGEST_REPEAT)
    lines = str(text).split("\n")
    _charge(len(space) * len(lines))
    indented = [
        space + line if (line or blank) and (number or first) else line
        for number, line in enumerate(lines)
    ]
    return "\n".join(indented)


class _Metering(NodeTransformer):
    """Puts a charge into everything that a template can do often."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  Jinja's
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_call("charge_step"), node.test, lineno=node.lineno)
        node.body.insert(0, _stepping(node))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802  Jinja's
        self.generic_visit(node)
        node.body.insert(0, _stepping(node))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802  Jinja's
        self.generic_visit(node)
        node.body.insert(0, _stepping(node))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802  Jinja's
        self.generic_visit(node)
        node.nodes = [
            _call(
                "charge_said", nodes.Const(one.data) if isinstance(one, nodes.TemplateData) else one
            )
            for one in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  Jinja's
        self.generic_visit(node)
        return _call("charge_joined", *node.nodes)


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, list(arguments), [], None, None)


def _stepping(node: nodes.Node) -> nodes.Node:
    return nodes.ExprStmt(_call("charge_step"), lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    charge_step = staticmethod(_step)
    charge_said = staticmethod(_said)
    charge_joined = staticmethod(_joined)

    def _generate(
        self,
        source: nodes.Template,
        name: str | None,
        filename: str | None,
        defer_init: bool = False,
    ) -> str:
        metered = cast("nodes.Template", _Metering().visit(source))
        metered.set_environment(self)
        return super()._generate(metered, name, filename, defer_init)

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> object:
        numbers = [one for one in (left, right) if isinstance(one, int)]
        if operator == "**" or (
            operator == "*" and len(numbers) == 1 and numbers[0] > _LONGEST_REPEAT
        ):
            raise SecurityError(f"{operator} of so much is not allowed")
        if any(abs(one) > _LARGEST_NUMBER for one in numbers):
            raise SecurityError("numbers so large are not allowed")
        if operator == "%" and isinstance(left, str):
            _formatting(left, right if isinstance(right, tuple) else (right,))
        elif operator == "*" and len(numbers) == 1:
            _charge(max(numbers[0], 0) * max(_size(left), _size(right)))
        return _charged(super().call_binop(context, operator, left, right))

    def call(
        self, context: jinja2.runtime.Context, callee: Any, /, *args: Any, **named: Any
    ) -> object:
        of, name = getattr(callee, "__self__", None), getattr(callee, "__name__", "")
        if callee is _step or callee is _said or callee is _joined:
            return callee(*args)
        _step()
        numbers = [one for one in (*args, *named.values()) if isinstance(one, int)]
        if of is not None and max(numbers, default=0) > _LONGEST_REPEAT:
            raise SecurityError(f"{name} of so much is not allowed")
        if isinstance(of, str):
            if name == "replace" and len(args) in (2, 3) and not named:
                return _replaced(of, *args)
            if name == "join" and len(args) == 1:
                return _joined_by(of, args[0])
        elif name in ("format", "format_map"):
            text = getattr(getattr(callee, "__wrapped__", None), "__self__", "")
            _formatting(str(text), (*args, *named.values()))
        return _charged(super().call(context, callee, *args, **named))


def _formatting(text: str, values: Iterable[object]) -> None:
    """A format may repeat its values, and pad them; it pays for the most that it can."""
    if _WIDTHS.search(text):
        raise SecurityError("formats of such widths are not allowed")
    _charge(1000 * text.count("{") + 1000 * text.count("%"))
    _charge(len(text) * max((_size(one) for one in values), default=0) // 2)


class _Generation(Extension):
    """The tag `generation` marks what an assistant said, for trainers; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
