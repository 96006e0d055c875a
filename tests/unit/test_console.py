"""The console: manifests from models, settings from three places."""

import json
from pathlib import Path
from typing import cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.aggregator.opening import open_job
from services.console.failure import Failure, Usage
from services.console.labels import labels_of, parse_labels
from services.console.manifest import AdapterKind, AdapterOptions, layer_numbers, manifest
from services.console.spec import GRADIENT, Wanted, read_file, wanted
from shared.adapter import Adapter, size
from shared.codec import decode_manifest, encode_manifest
from shared.engine.protocol import Facts
from shared.errors import ConfigError
from shared.messages import Manifest, SubmitJob, Variant

DIGEST = "d" * 64
VARIANT = Variant(DIGEST, 1000, "tiny.gguf")


def some_facts(
    *, layers: int = 4, width: int = 8, tied: bool = False, tokens: int = 0, closed: bool = True
) -> Facts:
    """A llama-shaped model, its attention's values narrower than its queries.

    `closed`: its last block has a closed form.
    """
    matrices = {"token_embd.weight": [100, width]}
    if not tied:
        matrices["output.weight"] = [100, width]
    for layer in range(layers):
        matrices[f"blk.{layer}.attn_q.weight"] = [width, width]
        matrices[f"blk.{layer}.attn_k.weight"] = [width // 2, width]
        matrices[f"blk.{layer}.attn_v.weight"] = [width // 2, width]
        matrices[f"blk.{layer}.attn_output.weight"] = [width, width]
        matrices[f"blk.{layer}.ffn_gate.weight"] = [3 * width, width]
        matrices[f"blk.{layer}.ffn_up.weight"] = [3 * width, width]
        matrices[f"blk.{layer}.ffn_down.weight"] = [width, 3 * width]
    return Facts(
        architecture="llama",
        n_embd=width,
        n_layer=layers,
        n_vocab=100,
        n_ctx_train=128,
        tied=tied,
        matrices=matrices,
        tokens=list(range(50, 50 + tokens)),
        last_block=[name for name in matrices if name.startswith(f"blk.{layers - 1}.")]
        if closed
        else [],
        prompt=[7, 8, 9],
        prompt_rms=0.25,
    )


def build(facts: Facts, options: AdapterOptions, *, labels: int = 0) -> Manifest:
    words = {f"label{number}": f" word{number}" for number in range(labels)}
    return manifest(facts, options, labels=words, variant=VARIANT, seed=7, momentum=False)


# ---- manifests


@given(
    layers=st.integers(2, 6),
    width=st.sampled_from([8, 16, 64]),
    rank=st.integers(1, 5),
    labels=st.integers(2, 9),
    kind=st.sampled_from(["last-block", "output-rows", "lora", "control", "prompt"]),
    tune_a=st.booleans(),
)
def test_whatever_it_builds_is_an_adapter_of_the_model(
    layers: int, width: int, rank: int, labels: int, kind: AdapterKind, tune_a: bool
) -> None:
    facts = some_facts(layers=layers, width=width, tokens=labels)
    options = AdapterOptions(kind=kind, rank=rank, tune_a=tune_a)
    made = build(facts, options, labels=labels)
    data = encode_manifest(made)
    assert decode_manifest(data) == made
    assert len(Adapter(data).theta) == made.d == sum(size(block) for block in made.blocks)
    expected = {
        "output-rows": labels * width,
        "lora": layers * rank * (width + width // 2 + tune_a * 2 * width),
        "last-block": rank * (10 * width + tune_a * 9 * width) + labels * width,
        "control": (layers - 1) * width,
        "prompt": 8 * width,
    }
    assert made.d == expected[kind]
    for block in made.blocks:
        if block.kind == "lora_b":
            assert [block.shape[0], block.d_in] == facts.matrices[block.tensor]
            assert 0 <= block.slot < rank


def test_output_rows_are_one_block_of_the_labels_tokens_in_their_order() -> None:
    (block,) = build(some_facts(tokens=3), AdapterOptions(kind="output-rows"), labels=3).blocks
    assert (block.tensor, block.rows, block.shape) == ("output.weight", [50, 51, 52], [3, 8])


def test_the_last_block_is_its_matrices_and_the_labels_rows_where_they_move_alone() -> None:
    options = AdapterOptions(kind="last-block", rank=2)
    *lora, rows = build(some_facts(tokens=3), options, labels=3).blocks
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert [block.tensor for block in lora] == [f"blk.3.{n}.weight" for n in names for _ in "12"]
    assert (rows.kind, rows.rows) == ("output_rows", [50, 51, 52])
    for facts, labels in ((some_facts(tokens=3, tied=True), 3), (some_facts(), 0)):
        kinds = {block.kind for block in build(facts, options, labels=labels).blocks}
        assert kinds == {"lora_b"}
    named = msgspec.structs.replace(options, targets=["ffn_down"], layers="3")
    lora = build(some_facts(), named).blocks
    assert {block.tensor for block in lora} == {"blk.3.ffn_down.weight"}


def test_rows_of_so_many_labels_that_they_outweigh_the_lora_stay() -> None:
    options = AdapterOptions(kind="last-block", rank=1)
    for labels, kinds in ((10, {"lora_b", "output_rows"}), (11, {"lora_b"})):
        made = build(some_facts(tokens=labels), options, labels=labels)
        assert {block.kind for block in made.blocks} == kinds


def test_control_spares_the_first_layer_and_lora_does_not() -> None:
    control = build(some_facts(), AdapterOptions(kind="control"))
    assert [block.layer for block in control.blocks] == [1, 2, 3]
    lora = build(some_facts(), AdapterOptions(kind="lora", rank=1, layers="0-1"))
    assert [block.tensor for block in lora.blocks] == [
        f"blk.{layer}.{name}.weight" for name in ("attn_q", "attn_v") for layer in (0, 1)
    ]


@pytest.mark.parametrize(
    ("tokens", "rows"), [(8, [8, 9, 7, 8, 9, 7, 8, 9]), (2, [8, 9]), (0, [7, 8, 9])]
)
def test_a_prompt_repeats_its_text_or_takes_its_end_and_counts_in_its_size(
    tokens: int, rows: list[int]
) -> None:
    (block,) = build(some_facts(), AdapterOptions(kind="prompt", prompt_tokens=tokens)).blocks
    assert (block.rows, block.shape, block.unit) == (rows, [len(rows), 8], 0.25)


def test_two_words_with_the_same_first_token_are_refused_by_name() -> None:
    facts = msgspec.structs.replace(some_facts(), tokens=[5, 6, 5])
    labels = {"a": " sport", "b": " world", "c": " sports"}
    with pytest.raises(
        Failure,
        match=r"' sport' and ' sports' .*: add --labels c=WORD \(it goes with --labels-from",
    ):
        manifest(facts, AdapterOptions(), labels=labels, variant=VARIANT, seed=7, momentum=False)


@pytest.mark.parametrize(
    ("facts", "options", "labels", "mend"),
    [
        (some_facts(tied=True, tokens=2), AdapterOptions("output-rows"), 2, "--adapter lora"),
        (some_facts(), AdapterOptions("output-rows"), 0, "--labels"),
        (some_facts(closed=False), AdapterOptions(), 0, "no closed form; use --adapter output-"),
        (some_facts(), AdapterOptions(layers="1-2"), 0, "last-block tunes layer 3 alone; use"),
        (some_facts(), AdapterOptions(targets=["output"]), 0, "output.weight has no closed form"),
        (some_facts(), AdapterOptions(kind="lora", targets=["attn_z"]), 0, "attn_q, attn_v, ffn"),
        (some_facts(tied=True), AdapterOptions(kind="lora", targets=["output"]), 0, "ffn_down"),
        (some_facts(), AdapterOptions(kind="lora", layers="2-9"), 0, "layers 0-3"),
        (some_facts(), AdapterOptions(kind="control", layers="0"), 0, "layers 1-3"),
        (some_facts(), AdapterOptions(kind="lora", layers="some"), 0, "2-5"),
        (some_facts(), AdapterOptions(kind="lora", rank=4096), 0, "lower --rank"),
        (some_facts(layers=1), AdapterOptions(kind="control"), 0, "too few"),
        (
            msgspec.structs.replace(some_facts(), prompt=[]),
            AdapterOptions(kind="prompt"),
            0,
            "give --prompt-text",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_mend(
    facts: Facts, options: AdapterOptions, labels: int, mend: str
) -> None:
    with pytest.raises(Failure, match=mend):
        build(facts, options, labels=labels)


@given(st.integers(0, 20), st.integers(0, 20))
def test_a_run_of_layers_holds_both_its_ends(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert list(layer_numbers(f"{low}-{high}", 0, 21)) == list(range(low, high + 1))


# ---- settings


def test_a_flag_beats_the_file_and_the_file_the_default() -> None:
    file = {"tuning": {"rounds": 7, "step": 0.5}, "adapter": {"rank": 9}, "snapshot_every": 3}
    asked = wanted({"tuning": {"step": 0.25, "eps": None}}, cast("dict[str, object]", file))
    assert (asked.spec.tuning.rounds, asked.spec.tuning.step) == (7, 0.25)
    kind = asked.adapter.kind
    assert (kind, asked.adapter.rank, asked.spec.snapshot_every) == ("last-block", 9, 3)


LABELLED: dict[str, dict[str, object]] = {"task": {"labels": {"1": "world", "2": "sports"}}}


def accepted(asked: Wanted, facts: Facts) -> bool:
    """The aggregator takes the job that is made of it."""
    made = manifest(
        facts,
        asked.adapter,
        labels=asked.spec.task.labels,
        variant=VARIANT,
        seed=1,
        momentum=asked.spec.tuning.momentum > 0,
    )
    return bool(open_job(SubmitJob(job="j", spec=asked.spec, manifest=encode_manifest(made))))


@pytest.mark.parametrize("labelled", [True, False])
def test_the_last_block_with_local_steps_is_the_default(labelled: bool) -> None:
    asked = wanted(LABELLED if labelled else {}, {})
    assert asked.spec.task.loss == ("choices" if labelled else "tokens")
    assert (asked.adapter.kind, asked.spec.tuning.how) == ("last-block", "exact")
    assert asked.spec.tuning.local_steps > 0
    assert asked.spec.tuning.normalise == "none"
    assert asked.spec.pacing.enough_probes % asked.spec.tuning.directions == 0
    assert asked.spec.task.labels == ({"1": " world", "2": " sports"} if labelled else {})
    assert accepted(asked, some_facts(tokens=2 if labelled else 0))


def test_a_model_without_a_closed_form_is_tuned_by_its_labels_rows_or_by_lora() -> None:
    rows = wanted(LABELLED, {}, last_block=False)
    assert (rows.adapter.kind, rows.spec.tuning.how) == ("output-rows", "exact")
    lora = wanted({}, {}, last_block=False)
    assert (lora.adapter.kind, lora.spec.tuning.how) == ("lora", "probe")
    for asked, tokens in ((rows, 2), (lora, 0)):
        assert asked.spec.tuning.local_steps == 0
        assert accepted(asked, some_facts(tokens=tokens, closed=False))
    named = wanted({"adapter": {"kind": "last-block"}}, {}, last_block=False)
    with pytest.raises(Failure, match="use --adapter output-rows"):
        accepted(named, some_facts(closed=False))


@pytest.mark.parametrize("kind", [None, "last-block"])
@pytest.mark.parametrize("labelled", [True, False])
def test_probes_take_no_local_steps(labelled: bool, kind: str | None) -> None:
    flags = {
        **(LABELLED if labelled else {}),
        "tuning": {"how": "probe"},
        "adapter": {"kind": kind},
    }
    asked = wanted(flags, {})
    assert asked.adapter.kind == (kind or ("output-rows" if labelled else "lora"))
    assert (asked.spec.tuning.how, asked.spec.tuning.local_steps) == ("probe", 0)
    assert accepted(asked, some_facts(tokens=2 if labelled else 0))


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"tuning": {"candidates": 3}}, "--candidates is for --method fwdllm, not for seedwire"),
        (
            {"tuning": {"method": "mezo", "local_steps": 3}},
            "--local-steps is for --method seedwire",
        ),
        (
            {"adapter": {"prompt_text": "So:"}},
            "--prompt-text is for --adapter prompt, not for last",
        ),
        ({"adapter": {"kind": "control", "rank": 3}}, "--rank is for --adapter last-block or lora"),
    ],
)
def test_a_flag_that_nobody_would_read_is_refused(
    flags: dict[str, dict[str, object]], why: str
) -> None:
    with pytest.raises(Usage, match=why):
        wanted(flags, {})


def test_without_local_steps_the_last_block_takes_the_gradients_numbers() -> None:
    asked = wanted({"tuning": {"local_steps": 0, "rounds": 9}}, {})
    usual = GRADIENT | {"local_steps": 0, "rounds": 9}
    assert asked.adapter == wanted({}, {}).adapter
    assert {name: getattr(asked.spec.tuning, name) for name in usual} == usual
    assert accepted(asked, some_facts())
    file = wanted({}, {"tuning": {"local_steps": 0}})
    assert file.spec.tuning.directions == GRADIENT["directions"]


def test_exact_without_labels_waits_for_what_the_model_can() -> None:
    flags: dict[str, dict[str, object]] = {"tuning": {"how": "exact"}}
    assert accepted(wanted(flags, {}), some_facts())
    with pytest.raises(Failure, match="give --labels or --labels-from"):
        accepted(wanted(flags, {}, last_block=False), some_facts(closed=False))


@pytest.mark.parametrize("method", ["mezo", "fwdllm", "fedkseed", "fedkseed-pro"])
@pytest.mark.parametrize("adapter", [None, "last-block", "output-rows", "control"])
def test_a_papers_method_brings_numbers_that_the_aggregator_takes(
    method: str, adapter: str | None
) -> None:
    labels = {"a": "world", "b": "sports"}
    flags: dict[str, dict[str, object]] = {
        "task": {"labels": labels},
        "tuning": {"method": method, "eps": 0.02},
        "adapter": {"kind": adapter},
        "pacing": {"enough_devices": 4},
    }
    asked = wanted(flags, {})
    facts, options = some_facts(tokens=2), asked.adapter
    made = manifest(
        facts,
        options,
        labels=asked.spec.task.labels,
        variant=VARIANT,
        seed=1,
        momentum=asked.spec.tuning.momentum > 0,
    )
    assert made.distribution == "gauss8"
    kinds = {
        "last-block": {"lora_b", "output_rows"},
        "output-rows": {"output_rows"},
        "control": {"control"},
    }
    assert {block.kind for block in made.blocks} == kinds.get(adapter or "", {"lora_b"})
    tuning, pacing = asked.spec.tuning, asked.spec.pacing
    assert (tuning.method, tuning.how, tuning.eps) == (method, "probe", 0.02)
    steps = {"mezo": 4 * 1, "fwdllm": 100}.get(method, 4 * 200)
    assert pacing.enough_probes == steps
    assert open_job(SubmitJob(job="j", spec=asked.spec, manifest=encode_manifest(made)))


def test_a_method_that_there_is_not_is_usage() -> None:
    with pytest.raises(Usage, match="--method magic: there are seedwire, mezo, fwdllm"):
        wanted({}, {"tuning": {"method": "magic"}})


def test_a_template_that_ends_in_space_leaves_words_alone() -> None:
    flags = {"task": {"labels": {"a": "x", "b": "y"}, "template": "{text} is "}}
    assert wanted(flags, {}).spec.task.labels == {"a": "x", "b": "y"}


def test_a_wrong_flag_is_usage_and_a_wrong_file_is_configuration(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="--eps"):
        wanted({"tuning": {"eps": -1.0}}, {})
    with pytest.raises(ConfigError, match=r"tuning\.eps"):
        wanted({}, {"tuning": {"eps": -1.0}})
    with pytest.raises(ConfigError, match=r"tuning\.steps; known: .*step"):
        wanted({}, {"tuning": {"steps": 1}})
    with pytest.raises(ConfigError, match=r"\[tuning\]"):
        wanted({}, {"tuning": 3})
    (tmp_path / "job.toml").write_text("[tuning\n")
    with pytest.raises(ConfigError, match="not TOML"):
        read_file(tmp_path / "job.toml")


def test_exact_with_another_adapter_is_refused() -> None:
    with pytest.raises(Usage, match="output-rows"):
        wanted({"tuning": {"how": "exact"}, "adapter": {"kind": "lora"}}, {})


def test_labels_come_from_the_command_line_or_the_rows(tmp_path: Path) -> None:
    assert parse_labels("a=one,b") == {"a": "one", "b": "b"}
    for wrong in ("a,,b", "a=1,a=2", "=x"):
        with pytest.raises(Usage):
            parse_labels(wrong)
    rows = [{"text": "t", "label": "b"}, {"text": "t", "label": 3}, {"prompt": "p"}, "no object"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot JSON\n")
    assert labels_of(tmp_path / "data.jsonl") == {"3": "3", "b": "b"}


def test_a_tied_model_without_a_closed_form_is_tuned_by_a_lora() -> None:
    flags = {"task": {"labels": {"a": "apple", "b": "banana"}}}
    found = wanted(flags, {}, last_block=False, own_rows=False)
    assert (found.adapter.kind, found.spec.tuning.how) == ("lora", "probe")


def test_local_steps_without_a_closed_form_are_refused_before_anything_is_uploaded() -> None:
    flags = {"tuning": {"local_steps": 4}, "adapter": {"kind": "lora"}}
    with pytest.raises(Usage, match="--local-steps needs"):
        wanted(flags, {})


def test_probes_of_output_rows_take_a_probes_numbers() -> None:
    flags = {
        "task": {"labels": {"a": "apple", "b": "banana"}},
        "tuning": {"how": "probe"},
        "adapter": {"kind": "output-rows"},
    }
    assert wanted(flags, {}).spec.tuning.batch_rows == 32


@pytest.mark.parametrize(
    ("every", "patience", "why"),
    [(0, 2, "counts measurements"), (20, 3, "never runs out where 60 rounds")],
)
def test_patience_that_cannot_run_out_is_refused(every: int, patience: int, why: str) -> None:
    evaluation: dict[str, object] = {"every_rounds": every, "patience": patience}
    given: dict[str, dict[str, object]] = {"evaluation": evaluation, "tuning": {"rounds": 60}}
    with pytest.raises(Usage, match=why):
        wanted(given, {})
    given["evaluation"]["every_rounds"] = 10
    assert wanted(given, {}).spec.evaluation.patience == patience
