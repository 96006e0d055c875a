"""Distillation: the student is the fleet's model, the teacher the ensemble, and steps go downhill.

Random models of a few layers, in transformers and as the same GGUF file.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from shared.adapter import Adapter, Layout
from shared.codec import encode_manifest
from shared.engine.gguf_file import read_header
from shared.engine.llama import LlamaEngine
from shared.engine.model import Adaptation, Example
from shared.errors import EngineError
from shared.messages import Block, JobSpec, Manifest, Task, Variant
from tests.support import hf_gguf, tiny_gguf
from tests.support.hf_gguf import SHAPE, Twin
from tests.support.jobs import a_job

pytest.importorskip("peft", reason="peft is not installed")

from services.distiller import config, distilling, public, working
from services.distiller.buckets import Buckets, cut, divergence, likeliest, steered
from services.distiller.distilling import Settings
from services.distiller.kept import Kept
from services.distiller.large import Large
from services.distiller.public import Public
from services.distiller.student import Student, check_tokens
from services.distiller.waiting import Waiting

LABELS = {"one": "g", "two": "h", "three": "q"}
TASKS = {
    "choices": Task("choices", "{text}\nit is ", LABELS, max_tokens=48),
    "tokens": Task("tokens", max_tokens=48),
}
TEXTS = ["the inner ear", "a bin in the bar", "he ate the other tin", "in the end", "that is it"]
SETTINGS = Settings(steps=60, batch_rows=4, rate=0.02, answers=0.0)

Twins = Callable[..., Twin]
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def a_twin(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    def build(architecture: str = "llama", *, seed: int = 1) -> Twin:
        folder = tmp_path_factory.mktemp(f"{architecture}-{seed}")
        twin = hf_gguf.twin(folder, architecture, seed=seed)
        twin.hf.save_pretrained(folder)
        return twin

    return build


def some_blocks(twin: Twin) -> list[Block]:
    """LoRA on some matrices, of which some rows of A move, and output rows in two blocks."""
    blocks: list[Block] = []
    for name, shape in read_header(str(twin.path)).tensors.items():
        if name.startswith("blk.") and len(shape) == 2 and not name.startswith("blk.0.ffn"):
            d_in, d_out = shape
            blocks += [Block("lora_b", name, [d_out], slot=n, d_in=d_in) for n in range(2)]
            if name.startswith("blk.1."):
                blocks.append(Block("lora_a", name, [d_in], slot=1))
    rows = [[12, 40], [77]]
    return blocks + [
        Block("output_rows", "output.weight", [len(some), SHAPE.width], rows=some) for some in rows
    ]


def an_adaptation(twin: Twin, blocks: list[Block]) -> Adaptation:
    made = Manifest(0, twin.architecture, 7, blocks, [Variant("0" * 64, 1, "tiny")], 1)
    offsets = Layout(msgspec.structs.replace(made, d=1)).offsets
    return Adaptation(twin.architecture, 7, 0, blocks, offsets)


def a_student(twin: Twin) -> tuple[Student, Adaptation]:
    blocks = an_adaptation(twin, some_blocks(twin))
    return Student(twin.path.parent, blocks), blocks


def values(blocks: Adaptation, seed: int = 2, spread: float = 0.1) -> Floats:
    random = np.random.default_rng(seed).standard_normal(blocks.offsets[-1])
    return (spread * random).astype(np.float32)


def write(path: Path, loss: str, *, labels: bool = True) -> Path:
    """Rows of the texts and of runs of them."""
    rows: list[dict[str, str]] = []
    for number in range(20):
        text = " ".join(TEXTS[number % 5 :][: 1 + number % 3]) + f" {number}"
        if loss == "tokens":
            rows.append({"prompt": text, "completion": TEXTS[number % 4]})
        elif labels:
            rows.append({"text": text, "label": list(LABELS)[number % 3]})
        else:
            rows.append({"text": text})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Lesson:
    """A small model, a large one, and what the large one says of public rows."""

    def __init__(
        self, a_twin: Twins, folder: Path, loss: str, *, k: int = 16, temperature: float = 1.0
    ) -> None:
        self.student, self.blocks = a_student(a_twin())
        large = Large(a_twin(seed=2).path, threads=1, max_tokens=48)
        path = write(folder / "rows.jsonl", loss)
        self.rows = public.read(path, TASKS[loss], large.model, 100)
        self.unlabelled = Public(
            [replace(one, targets=np.full_like(one.targets, -1)) for one in self.rows.examples],
            self.rows.choices,
        )
        self.large = large.heard(self.rows, k=k, width=SHAPE.vocabulary, temperature=temperature)
        self.whole = large.heard(
            self.rows, k=SHAPE.vocabulary, width=SHAPE.vocabulary, temperature=1.0
        )
        large.close()
        self.nothing = np.zeros(self.blocks.offsets[-1], np.float32)

    def entropy(self, tuned: Floats, anchor: Floats) -> float:
        return distilling.judged(self.student, tuned, anchor, self.rows, self.large, 1.0).entropy


@pytest.mark.parametrize("architecture", tiny_gguf.ARCHITECTURES)
def test_the_student_says_what_a_device_says_at_the_same_theta(
    a_twin: Twins, architecture: str
) -> None:
    twin = a_twin(architecture)
    student, blocks = a_student(twin)
    theta = values(blocks)
    student.stand(theta)
    np.testing.assert_allclose(student.values(), theta, atol=3e-7)
    examples = [
        Example(np.array(tokens, np.int32), np.array([1, 2, 3], np.int32))
        for tokens in ([5, 12, 40, 77, 9], [3, 250, 61], [18, 7, 7, 200, 33, 12, 40])
    ]
    device = LlamaEngine().open(str(twin.path), blocks, 1, 48)
    device.stand(theta)
    wanted = np.concatenate([logits.copy() for logits in device.logits(examples)])
    device.close()
    said = student.logits(examples).detach().numpy()
    # The device's cache holds half-precision numbers.
    assert np.abs(said - wanted).max() < 0.03
    student.stand(np.zeros_like(theta))
    base = student.logits(examples).detach().numpy()
    assert np.abs(base - wanted).max() > 0.3


def test_buckets_of_one_model_are_its_probabilities_and_whole_ones_add_up_exactly() -> None:
    random = np.random.default_rng(4)
    large, tuned, base = (random.standard_normal((6, 40)).astype(np.float32) for _ in range(3))
    targets = random.integers(0, 40, 6)

    def probabilities(logits: NDArray[np.float32 | np.float64]) -> NDArray[np.float64]:
        raised = np.exp(logits.astype(np.float64))
        return raised / raised.sum(axis=1, keepdims=True)

    def as_buckets(logits: Floats, ids: NDArray[np.int32]) -> Buckets:
        return cut(logits, targets, ids=ids, choices=False, temperature=1.0)

    for k in (5, 40):
        ids = likeliest(large, k)
        buckets = as_buckets(large, ids)
        shares = np.exp(buckets.log_shares())
        np.testing.assert_allclose(
            shares[:, :k], np.take_along_axis(probabilities(large), ids.astype(np.int64), axis=1),
            rtol=1e-5,
        )  # fmt: skip
        np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-6)
        own = probabilities(large)[np.arange(6), targets]
        np.testing.assert_allclose(buckets.losses(), -np.log(own), rtol=1e-4)
    all_of_them = likeliest(large, 40)
    three = [as_buckets(logits, all_of_them) for logits in (large, tuned, base)]
    ensemble = steered(three[0], three[1], three[2], 1.5)
    wanted = probabilities(large + np.float32(1.5) * (tuned - base))
    np.testing.assert_allclose(np.exp(ensemble.log_shares())[:, :40], wanted, rtol=1e-4)
    assert divergence(ensemble, ensemble) == 0.0
    direct = (wanted * (np.log(wanted) - np.log(probabilities(tuned)))).sum(axis=1).mean()
    assert divergence(ensemble, three[1]) == pytest.approx(direct, rel=1e-4)


@pytest.mark.parametrize("loss", ["tokens", "choices"])
def test_a_step_s_loss_is_the_teacher_s_divergence_and_the_answers(
    a_twin: Twins, tmp_path: Path, loss: str
) -> None:
    temperature, alpha = 1.7, 0.8
    lesson = Lesson(a_twin, tmp_path, loss, temperature=temperature)
    rows, large, student = lesson.rows, lesson.large, lesson.student
    tuned, anchor = values(lesson.blocks), values(lesson.blocks, 3)
    told: list[float] = []
    settings = Settings(
        alpha=alpha,
        answers=0.3,
        temperature=temperature,
        steps=1,
        batch_rows=len(rows.examples),
    )
    distilling.distil(
        student, tuned, anchor, rows, large, settings, lambda _, loss: told.append(loss)
    )
    at_tuned = student.heard(tuned, rows, large, temperature)
    teacher = steered(large, at_tuned, student.heard(anchor, rows, large, temperature), alpha)
    gap = temperature**2 * divergence(teacher, at_tuned)
    answers = student.heard(tuned, rows, large, 1.0).losses().mean()
    # A token that is none of the k is in the rest, whose mass is known: no loss is approximate.
    assert told == [pytest.approx(gap + 0.3 * answers, rel=1e-4)]


@pytest.mark.parametrize("loss", ["tokens", "choices"])
def test_logits_that_are_too_much_at_once_are_learned_from_in_parts_to_the_same_end(
    a_twin: Twins, tmp_path: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = Lesson(a_twin, tmp_path, loss)
    given = (lesson.student, values(lesson.blocks, spread=0.02), lesson.nothing)
    settings = replace(SETTINGS, steps=3, answers=0.5, batch_rows=7)
    told: list[list[float]] = [[], []]
    made: list[Floats] = []
    for losses, most in zip(told, (1 << 24, 8 * SHAPE.vocabulary), strict=True):
        monkeypatch.setattr("services.distiller.student._AT_ONCE", most)
        made.append(
            distilling.distil(
                *given,
                lesson.rows,
                lesson.large,
                settings,
                lambda _, loss, losses=losses: losses.append(loss),
            )
        )
        runs = [run.stop - run.start for run in lesson.student.runs(lesson.rows.examples)]
        assert sum(runs) == len(lesson.rows.examples)
        if most < 1 << 24:
            assert len(runs) > 2
            assert max(runs) <= 8
    np.testing.assert_allclose(told[1], told[0], rtol=1e-4)
    # Adam makes much of small differences where a gradient is nearly nothing.
    assert np.abs(made[1] - made[0]).mean() < 0.01 * np.abs(made[0] - given[1]).mean()


@pytest.mark.parametrize("loss", ["tokens", "choices"])
def test_the_student_comes_closer_to_its_teacher_and_alike_every_time(
    a_twin: Twins, tmp_path: Path, loss: str
) -> None:
    lesson = Lesson(a_twin, tmp_path, loss)
    tuned = values(lesson.blocks, spread=0.02)
    given = (lesson.student, tuned, lesson.nothing, lesson.rows, lesson.large)
    before = distilling.judged(*given, 1.0)
    made = distilling.distil(*given, SETTINGS)
    left = distilling.left_to_learn(lesson.student, made, *given[1:], 1.0)
    assert left < 0.5 * before.kl
    # Without answers the labels are not looked at; and nothing hangs on what was done before.
    again = (lesson.student, tuned, lesson.nothing, lesson.unlabelled, lesson.large)
    assert np.array_equal(distilling.distil(*again, SETTINGS), made)
    assert np.isnan(distilling.judged(*again, 1.0).small_loss)
    with_answers = distilling.distil(*given, replace(SETTINGS, answers=2.0))
    after = distilling.judged(lesson.student, with_answers, *given[2:], 1.0)
    assert after.small_loss < before.small_loss


def test_only_with_a_new_anchor_do_repeated_rounds_not_sharpen(
    a_twin: Twins, tmp_path: Path
) -> None:
    """A perfect student is L + S - M: with M as the anchor, L - M is added again each time."""
    lesson = Lesson(a_twin, tmp_path, "choices")
    settings = replace(SETTINGS, steps=150)
    tuned = values(lesson.blocks, spread=0.02)
    first = lesson.entropy(tuned, lesson.nothing)
    fixed, moved, anchor = tuned, tuned, lesson.nothing
    for _ in range(3):
        given = (lesson.rows, lesson.large, settings)
        fixed = distilling.distil(lesson.student, fixed, lesson.nothing, *given)
        moved, anchor = (
            distilling.distil(lesson.student, moved, anchor, *given),
            distilling.reanchored(lesson.student, anchor, *given),
        )
    assert lesson.entropy(fixed, lesson.nothing) < 0.6 * first
    assert lesson.entropy(moved, anchor) > 0.85 * first


def test_a_row_of_choices_needs_no_label_and_a_bad_one_is_named(
    a_twin: Twins, tmp_path: Path
) -> None:
    large = Large(a_twin(seed=2).path, threads=1, max_tokens=48)
    task = TASKS["choices"]
    path = write(tmp_path / "rows.jsonl", "choices", labels=False)
    rows = public.read(path, task, large.model, 7)
    assert (len(rows.examples), rows.answered) == (7, False)
    labelled = public.read(write(path, "choices"), task, large.model, 100)
    assert labelled.answered
    assert [one.tokens.tolist() for one in labelled.examples[:7]] == [
        one.tokens.tolist() for one in rows.examples
    ]
    learned, held = labelled.split(0.2, seed=1)
    assert (len(learned.examples), len(held.examples)) == (16, 4)
    assert {id(one) for one in learned.examples}.isdisjoint(map(id, held.examples))
    path.write_text('{"text": "a"}\n{"text": "b", "label": "four"}\n', encoding="utf-8")
    with pytest.raises(EngineError, match=r"rows.jsonl:2: its label is not one of this job's"):
        public.read(path, task, large.model, 100)
    large.close()


def test_rows_that_judge_nothing_are_refused_before_anything_is_learned(
    a_twin: Twins, tmp_path: Path
) -> None:
    twin = a_twin()
    layout = Layout(Manifest(0, "llama", 7, some_blocks(twin), [Variant("0" * 64, 1, "tiny")], 1))
    manifest = encode_manifest(msgspec.structs.replace(layout.manifest, d=layout.d))
    spec = JobSpec(task=TASKS["choices"], tuning=a_job().spec.tuning)
    job = Waiting("demo", spec, Adapter(manifest), np.zeros(layout.d, np.float32), 0)
    rows = write(tmp_path / "rows.jsonl", "choices", labels=False)
    told: list[str] = []
    asked = config.Settings(
        job="demo",
        small=str(twin.path.parent),
        large=str(a_twin(seed=2).path),
        public=str(rows),
        cache="",
        threads=1,
    )
    with pytest.raises(EngineError, match=r"no held-out row has an answer .*\(--heldout\)"):
        working.work(job, asked, told.append)
    assert not told


def test_what_peft_has_no_form_for_and_another_checkpoint_are_refused_by_name(
    a_twin: Twins,
) -> None:
    twin = a_twin()
    control = [Block("control", "blk.1", [SHAPE.width], layer=1)]
    with pytest.raises(EngineError, match="blocks of kind control"):
        Student(twin.path.parent, an_adaptation(twin, control))
    with pytest.raises(EngineError, match="is a llama, the job's model a qwen2"):
        Student(twin.path.parent, replace(an_adaptation(twin, []), architecture="qwen2"))
    with pytest.raises(EngineError, match=r"--device abacus: .*`cpu` is always there"):
        Student(twin.path.parent, an_adaptation(twin, []), device="abacus")
    wide = [Block("lora_b", "blk.0.attn_q.weight", [SHAPE.width], d_in=2 * SHAPE.width)]
    with pytest.raises(EngineError, match=r"q_proj of the checkpoint has shape \[64, 64\]"):
        Student(twin.path.parent, an_adaptation(twin, wide))


def test_a_checkpoint_that_is_not_whole_is_refused_and_so_is_one_without_a_tokenizer(
    a_twin: Twins, tmp_path: Path
) -> None:
    twin = a_twin()
    blocks = an_adaptation(twin, [])
    for file in twin.path.parent.iterdir():
        if file.suffix != ".gguf":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    large = Large(a_twin(seed=2).path, threads=1, max_tokens=48)
    rows = public.read(write(tmp_path / "rows.jsonl", "tokens"), TASKS["tokens"], large.model, 9)
    with pytest.raises(EngineError, match="transformers loads no tokenizer from there"):
        check_tokens(tmp_path, rows, large.model)
    large.close()
    more = {**config, "num_hidden_layers": config["num_hidden_layers"] + 1}
    (tmp_path / "config.json").write_text(json.dumps(more))
    with pytest.raises(EngineError, match=r"the checkpoint has no model\.layers\..* name a whole"):
        Student(tmp_path, blocks)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 2 * SHAPE.width}))
    with pytest.raises(EngineError, match="transformers cannot load it"):
        Student(tmp_path, blocks)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(EngineError, match="transformers cannot load it"):
        Student(tmp_path, blocks)


def test_a_model_is_asked_once_and_again_only_if_its_answers_are_damaged(
    tmp_path: Path,
) -> None:
    asked: list[int] = []

    def ask() -> Buckets:
        asked.append(1)
        logits = np.arange(12, dtype=np.float32).reshape(2, 6)
        return cut(
            logits, np.array([1, -1]), ids=likeliest(logits, 2), choices=False, temperature=1.0
        )

    kept = Kept(tmp_path, 1 << 20)
    first = kept.get(("large", "a", 1), ask)
    second = kept.get(("large", "a", 1), ask)
    assert asked == [1]
    assert np.array_equal(first.logits, second.logits)
    assert np.array_equal(first.target, second.target, equal_nan=True)
    kept.get(("large", "a", 2), ask)
    assert asked == [1, 1]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    assert np.array_equal(kept.get(("large", "a", 1), ask).rest, first.rest)
    assert asked == [1, 1, 1]


def test_answers_that_were_not_used_for_longest_make_room_for_new_ones(tmp_path: Path) -> None:
    asked: list[str] = []

    def about(name: str, max_bytes: int) -> None:
        def ask() -> Buckets:
            asked.append(name)
            ids = np.zeros((1000, 2), np.int32)
            logits = np.zeros((1000, 2), np.float32)
            return Buckets(ids, logits, logits[:, 0], logits[:, 0])

        Kept(tmp_path, max_bytes).get((name,), ask)
        for file in tmp_path.glob("*.npz"):  # as if it had been a minute ago
            stat = file.stat()
            os.utime(file, (stat.st_atime, stat.st_mtime - 60))

    for name in ("a", "b", "c"):
        about(name, 10**9)
    size = next(tmp_path.glob("*.npz")).stat().st_size
    unfinished = [tmp_path / "old.new", tmp_path / "young.new"]
    for age_s, file in zip((48 * 3600, 60), unfinished, strict=True):
        file.write_bytes(b"half")
        os.utime(file, times=(time.time() - age_s, time.time() - age_s))
    about("a", 10**9)
    about("d", 3 * size)
    assert asked == ["a", "b", "c", "d"]
    assert [file.exists() for file in unfinished] == [False, True]
    about("a", 3 * size)
    about("b", 3 * size)
    assert asked == ["a", "b", "c", "d", "b"]
    assert sum(file.stat().st_size for file in tmp_path.glob("*.npz")) <= 3 * size
