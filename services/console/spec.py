"""A job's settings: defaults of its adapter and method, then a TOML file, then the command line.

The file's tables are those of JobSpec (`task`, `tuning`, `pacing`, `evaluation`) and `adapter`.
Pure but for reading the file.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from services.console.failure import Usage
from services.console.labels import spaced
from services.console.manifest import AdapterKind, AdapterOptions
from services.console.methods import METHODS
from shared.errors import ConfigError
from shared.messages import Evaluation, JobSpec, Pacing, Task, Tuning

Table = dict[str, object]
Parsed = TypeVar("Parsed", bound=msgspec.Struct)

LABEL_TEMPLATE = "{text}\nTopic:"

VERSIONS, MOST_APART = 10, 50
"""A job publishes so many versions of its adapter, but at most so many rounds apart."""

GRADIENT: Table = {
    "how": "exact",
    "directions": 512,
    "batch_rows": 4096,
    "step": 0.03,
    "momentum": 230,
}
"""Of a closed form without local steps.

Tried on ag_news with 1,500 rows, 100 rounds, output rows: step 0.03 with momentum 230 answers 71 %
(llama-3m) and 59 % (llama-1m) of held-out rows, 0.1 without momentum 63 % and 58 %.
"""

GENERATION: Table = {"batch_rows": 64, "local_steps": 8, "local_rows": 8, "local_rate": 0.03}
"""The default where whole answers are learned: a row has many tokens to be judged by, and each
costs arithmetic over the whole vocabulary.

Tried on e2e_nlg with llama-3m and 16 devices of 250 rows: after 16 rounds a held-out token costs
1.90 nats, with a local rate of 0.01 2.28; before, 5.65.
"""

DEFAULTS: dict[AdapterKind, dict[str, Table]] = {
    "last-block": {
        "adapter": {"rank": 4, "tune_a": True},
        "tuning": {
            "how": "exact",
            "rounds": 60,
            "directions": 8192,
            "batch_rows": 512,
            "normalise": "none",
            "step": 1.5,
            "final_step": 0.05,
            "momentum": 128,
            "local_steps": 4,
            "local_rate": 0.01,
            "eps": 1e-5,
        },
    },
    "output-rows": {"tuning": GRADIENT},
    "lora": {},
    "control": {},
    "prompt": {"tuning": {"eps": 0.1, "step": 0.02, "momentum": 230}},
}
"""Where an adapter wants other numbers than the messages' own defaults.

With local steps eps is a unit alone: what leaves the device are 2 eps W times the move's products,
in 2^-20 nat, and at 1e-5 they fit int32 up to weights W of millions. Local steps pass about once
over a device's rows: tried with llama-3m and 16 devices of 250 rows, 16 steps at 0.006 learn trec
in a fifth of the rounds (81 % after 20 of 60), but from there on by heart (79.8 % at the end, 4
steps: 81.0 %); on ag_news 8 steps end at a loss of 0.76, 4 at 0.68. Rank 4 ends at 82.6 and 76.1 %,
rank 2 at 81.0 and 74.3 %. After 60 rounds ag_news begins to be learned by heart as well: 73 % after
60 and 72 % after 100. A step of 1.5 reaches in 60 rounds what 1 does in 80.
"""

READ_BY: dict[str, tuple[str, ...]] = {
    "local_steps": ("seedwire", "fedkseed", "fedkseed-pro"),
    **dict.fromkeys(("candidates", "variance", "threshold"), ("fwdllm",)),
    **dict.fromkeys(("rank", "targets", "tune_a"), ("last-block", "lora")),
    "layers": ("last-block", "lora", "control"),
    **dict.fromkeys(("prompt_text", "prompt_tokens"), ("prompt",)),
}
"""Flags that are for some methods, or some adapters, alone."""

TABLES: dict[str, type[msgspec.Struct]] = {
    "task": Task,
    "tuning": Tuning,
    "pacing": Pacing,
    "evaluation": Evaluation,
    "adapter": AdapterOptions,
}

_WHERE = re.compile(r"`\$\.(\w+)(?:\.(\w+))?")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the operator asks for, before the model is known."""

    spec: JobSpec
    adapter: AdapterOptions


def wanted(
    flags: Mapping[str, Mapping[str, object]],
    file: Table,
    *,
    last_block: bool = True,
    own_rows: bool = True,
) -> Wanted:
    """Merge defaults, file and flags; `flags` maps table to field to value, None where not given.

    `last_block`: the model's last block has a closed form, so that it is tuned unless told
    otherwise. `own_rows`: its output matrix is not its embedding table, so that rows can be.

    Raises:
        ConfigError: the file has an unknown key or a value of the wrong form; names it.
        Usage: a flag does.
    """
    _check_names(file)
    given = {
        table: {name: value for name, value in fields.items() if value is not None}
        for table, fields in flags.items()
    }
    labelled = bool({**_table(file, "task"), **given.get("task", {})}.get("labels"))
    method = _method({**_table(file, "tuning"), **given.get("tuning", {})})
    own = METHODS[method].tables
    tuning = {**own.get("tuning", {}), **_table(file, "tuning"), **given.get("tuning", {})}
    how = tuning.get("how")
    rows = (labelled and own_rows) or how == "exact"
    usual: AdapterKind = "output-rows" if rows else "lora"
    asked: Table = {
        "kind": "last-block" if last_block and how != "probe" else usual,
        **own.get("adapter", {}),
        **_table(file, "adapter"),
        **given.get("adapter", {}),
    }
    adapter = _parsed({"adapter": asked}, _AdapterTable, given).adapter
    ours = DEFAULTS[adapter.kind]
    if how == "probe" and adapter.kind in ("last-block", "output-rows"):
        ours: dict[str, Table] = {}
    elif adapter.kind == "last-block" and tuning.get("local_steps") == 0:
        ours = {**ours, "tuning": GRADIENT}
    elif adapter.kind == "last-block" and not labelled:
        ours = {**ours, "tuning": {**ours["tuning"], **GENERATION}}
    rest = ours.get("adapter", {})
    adapter = _parsed({"adapter": {**rest, **asked}}, _AdapterTable, given).adapter
    merged: Table = {key: value for key, value in file.items() if key not in TABLES}
    defaults = ours | {"task": _task_defaults(labelled=labelled)}
    for table in TABLES.keys() - {"adapter"}:
        usual_there = defaults.get(table, {}) | own.get(table, {})
        merged[table] = usual_there | _table(file, table) | given.get(table, {})
    _let_follow(merged, method)
    spec = _parsed(merged, JobSpec, given)
    if spec.tuning.how == "exact" and adapter.kind not in ("last-block", "output-rows"):
        raise Usage("--how exact needs --adapter last-block or output-rows; use --how probe")
    moves = method == "seedwire" and spec.tuning.local_steps
    if moves and (spec.tuning.how, spec.tuning.normalise) != ("exact", "none"):
        raise Usage(
            "--local-steps needs --adapter last-block on a model with a closed form for it (or how "
            "= exact and normalise = none in --spec)"
        )
    _check_read(given.get("tuning", {}), "method", method)
    _check_read(given.get("adapter", {}), "adapter", adapter.kind)
    task = msgspec.structs.replace(spec.task, labels=spaced(spec.task))
    return Wanted(msgspec.structs.replace(spec, task=task), adapter)


def read_file(path: Path) -> Table:
    """The tables of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _check_read(given: Table, flag: str, chosen: str) -> None:
    """Find a flag that what was chosen by `flag` takes no notice of."""
    for name in given:
        readers = READ_BY.get(name, (chosen,))
        if chosen not in readers:
            shown = name.replace("_", "-")
            raise Usage(f"--{shown} is for --{flag} {' or '.join(readers)}, not for {chosen}")


class _AdapterTable(msgspec.Struct):
    adapter: AdapterOptions


def _task_defaults(*, labelled: bool) -> Table:
    if labelled:
        return {"loss": "choices", "template": LABEL_TEMPLATE}
    return {"loss": "tokens"}


def _method(tuning: Table) -> str:
    method = tuning.get("method", Tuning().method)
    if not isinstance(method, str) or method not in METHODS:
        raise Usage(f"--method {method}: there are {', '.join(METHODS)}")
    return method


def _let_follow(merged: Table, method: str) -> None:
    """Settle what hangs on other settings.

    With `exact` and `mezo` every device answers the whole pool, a walk has its steps, and of
    `fwdllm` the devices answer a pool between them. A short job is served while it learns, too.
    """
    tuning, pacing = _table(merged, "tuning"), _table(merged, "pacing")
    name = "local_steps" if method.startswith("fedkseed") else "directions"
    each = tuning.get(name, getattr(Tuning(), name))
    devices = 1 if method == "fwdllm" else pacing.get("enough_devices", Pacing().enough_devices)
    follows = method != "seedwire" or tuning.get("how") == "exact"
    if follows and isinstance(each, int) and isinstance(devices, int):
        pacing.setdefault("enough_probes", each * devices)
    rounds = tuning.get("rounds", Tuning().rounds)
    if isinstance(rounds, int):
        merged.setdefault("snapshot_every", min(MOST_APART, max(1, rounds // VERSIONS)))
    evaluation, every = _table(merged, "evaluation"), merged.get("snapshot_every")
    if isinstance(every, int):
        evaluation.setdefault("every_rounds", every)
    patience, often = evaluation.get("patience"), evaluation.get("every_rounds")
    if isinstance(patience, int) and isinstance(often, int) and isinstance(rounds, int):
        _check_patience(patience, often, rounds)


def _check_patience(patience: int, often: int, rounds: int) -> None:
    """Find one that never runs out."""
    if patience and not often:
        raise Usage("--patience counts measurements: let --evaluate-every be at least 1")
    if patience and patience * often >= rounds:
        raise Usage(
            f"--patience {patience} never runs out where {rounds} rounds are measured every"
            f" {often}: let --evaluate-every be less"
        )


def _parsed(value: Table, kind: type[Parsed], flags: Mapping[str, Table]) -> Parsed:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        where = _WHERE.search(str(error))
        if where and where[2] in flags.get(where[1], {}):
            raise Usage(f"--{where[2].replace('_', '-')}: {error}") from error
        raise ConfigError(f"job settings: {error}") from error


def _check_names(file: Table) -> None:
    known = {field.name for field in msgspec.structs.fields(JobSpec)} | TABLES.keys()
    for key, value in file.items():
        if key not in known:
            raise ConfigError(f"unknown setting {key}; known: {', '.join(sorted(known))}")
        if key not in TABLES:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{key} is a table: write [{key}]")
        names = {field.name for field in msgspec.structs.fields(TABLES[key])}
        unknown = cast("Table", value).keys() - names
        if unknown:
            raise ConfigError(
                f"unknown setting {key}.{min(unknown)}; known: {', '.join(sorted(names))}"
            )


def _table(tables: Table, name: str) -> Table:
    return cast("Table", tables.get(name, {}))
