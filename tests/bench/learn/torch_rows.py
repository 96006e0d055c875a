"""What is compared with: backpropagation through LoRA by FedAvg, and the last layer alone.

Both run in torch on the checkpoint in float32, on the tokens that the engine would send, and start
where the other rows start but for the quantisation. Forward tokens are those of training; the
held-out rows are measured by whoever holds them, and no device.

Source: McMahan et al., AISTATS 2017, algorithm 1 (`ceiling`; `head` is its FedSGD); Hu et al., ICLR
2022 (LoRA); Hsu et al., arXiv:1909.06335, section 4.3 (server momentum).
Differs in: all devices take part in every round, for a fixed number of steps; Adam on the devices,
begun anew each round. Plain FedAvg with local epochs was worse on these splits: 0.68 on trec after
four rounds, where so many tokens in shorter rounds with momentum gave 0.76.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from shared.engine.model import Example
from tests.bench.learn.curve import Curve, Point
from tests.bench.learn.stacked_lora import StackedLora
from tests.bench.learn.tasks import LearnTask
from tests.bench.learn.torch_tokens import Batch, Tokens, in_order, side_by_side, tokens_of

ATTENTION = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
THREADS = 1
_EVALUATED_ROWS = 64
_SIDE_BY_SIDE = 8
"""Devices that are computed at the same time."""
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class CeilingSettings:
    """LoRA by FedAvg. Adam's rate falls linearly over the rounds to `final_rate` of itself."""

    learning_rate: float = 1e-3
    targets: tuple[str, ...] = ALL_LINEAR
    rounds: int = 60
    local_steps: int = 4
    """Of each device a round."""
    batch_rows: int = 8
    rank: int = 8
    alpha: int = 16
    final_rate: float = 0.1
    server_momentum: float = 0.9
    evaluate_every: int = 5


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """The output rows by the mean of the devices' exact gradients.

    `batch_rows` of each device a round; 0: all of them.
    """

    learning_rate: float = 0.01
    rounds: int = 1000
    batch_rows: int = 0
    evaluate_every: int = 10


class _Run:
    """The points of one run."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.forward_tokens = 0
        self._began = time.perf_counter()
        _forget_peak()

    def at(self, commits: int, measured: tuple[float, float], bytes_each_way: float) -> None:
        loss, accuracy = measured
        wall_s = time.perf_counter() - self._began
        point = Point(
            commits, self.forward_tokens, loss, accuracy, wall_s, bytes_each_way, bytes_each_way
        )
        self.points.append(point)

    def curve(
        self, row: str, task: LearnTask, seed: int, peak_mb: float, facts: dict[str, float]
    ) -> Curve:
        dataset = task.name.split("-")[0]
        return Curve(row, dataset, seed, tuple(self.points), peak_mb, facts)


class _Model:
    """The checkpoint in float32 and what it says of batches."""

    def __init__(self, task: LearnTask, choices: Sequence[int]) -> None:
        torch.set_num_threads(THREADS)
        whole: Any = AutoModelForCausalLM.from_pretrained(task.checkpoint, dtype=torch.float32)
        self.whole = whole
        self.body = whole.model
        rows: Tensor = whole.lm_head.weight.detach()
        self.rows = rows[list(choices)].clone() if choices else rows.clone()
        """(r, n_embd): the output rows that are compared."""

    def states(self, batch: Batch) -> Tensor:
        """The state after the output norm at each position that is read: (m, n_embd)."""
        found: Tensor = self.body(input_ids=batch.tokens, use_cache=False).last_hidden_state
        return found[batch.rows, batch.positions]

    def logits(self, batch: Batch) -> Tensor:
        """(m, r)"""
        return self.states(batch) @ self.rows.T

    @torch.no_grad()
    def measured(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Mean loss over positions, and the share of rows that are right throughout."""
        first = np.cumsum([0, *(len(one.tokens) for one in batches)]).tolist()
        return _summed(
            (self.logits(one), one.targets, one.rows + before)
            for one, before in zip(batches, first, strict=False)
        )


def ceiling(task: LearnTask, settings: CeilingSettings, seed: int) -> Curve:
    """LoRA (A and B) trained by backpropagation on every device each round, averaged by rows."""
    random = np.random.default_rng([seed, 1])
    tokens = tokens_of(task)
    model = _Model(task, tokens.choices)
    lora = StackedLora(
        model.body, settings.targets, settings.rank, settings.alpha / settings.rank, seed
    )
    heldout = in_order(tokens.heldout, _EVALUATED_ROWS)
    run = _Run()
    longest = max(tokens.devices.values(), key=lambda rows: max(len(one.tokens) for one in rows))
    _train(model, lora, side_by_side([longest], settings.batch_rows, 2, random), 1, 0.0)
    peak_mb = _peak_mb()
    theta = lora.start()
    velocity = torch.zeros_like(theta)
    run.at(0, model.measured(heldout), 0.0)
    shares = _shares(tokens)
    names = list(tokens.devices)
    for number in range(1, settings.rounds + 1):
        part = (number - 1) / max(settings.rounds - 1, 1)
        rate = settings.learning_rate * (1.0 - part * (1.0 - settings.final_rate))
        moved = torch.zeros_like(theta)
        for low in range(0, len(names), _SIDE_BY_SIDE):
            group = names[low : low + _SIDE_BY_SIDE]
            rows = [tokens.devices[name] for name in group]
            batches = side_by_side(rows, settings.batch_rows, settings.local_steps, random)
            run.forward_tokens += sum(one.forward_tokens for one in batches)
            lora.stand(theta, len(group))
            _train(model, lora, batches, len(group), rate)
            share = torch.tensor([[shares[name]] for name in group])
            moved += (share * (lora.vectors() - theta)).sum(dim=0)
        velocity = settings.server_momentum * velocity + moved
        theta = theta + velocity
        lora.stand(theta, 1)
        if number % settings.evaluate_every == 0 or number == settings.rounds:
            sent = float(number * _FLOAT_BYTES * theta.numel())
            run.at(number, model.measured(heldout), sent)
    facts = {"backward_tokens": float(run.forward_tokens), "parameters": float(theta.numel())}
    return run.curve("ceiling", task, seed, peak_mb, facts)


def head(task: LearnTask, settings: HeadSettings, seed: int) -> Curve:
    """The compared output rows moved by plain steps along the fleet's gradient.

    A device computes its states once, when a round first needs them; later rounds cost no pass.
    """
    random = np.random.default_rng([seed, 2])
    tokens = tokens_of(task)
    model = _Model(task, tokens.choices)
    run = _Run()
    heldout = _Kept(model, tokens.heldout)
    heldout.all()
    devices = {name: _Kept(model, examples) for name, examples in tokens.devices.items()}
    shares = _shares(tokens)
    rows = model.rows.clone()
    sent = 0.0
    run.at(0, _head_measured(heldout, rows), sent)
    for number in range(1, settings.rounds + 1):
        gradient = torch.zeros_like(rows)
        weight = 0.0
        for name, kept in devices.items():
            states, targets = kept.some(settings.batch_rows, random)
            at = torch.softmax(states @ rows.T, dim=1)
            at[torch.arange(len(targets)), targets] -= 1.0
            gradient += shares[name] / len(targets) * (at.T @ states)
            weight += shares[name]
        rows -= settings.learning_rate / weight * gradient
        sent += _FLOAT_BYTES * rows.numel()
        run.forward_tokens = sum(kept.forward_tokens for kept in devices.values())
        if number % settings.evaluate_every == 0 or number == settings.rounds:
            run.at(number, _head_measured(heldout, rows), sent)
    return run.curve("head", task, seed, _peak_mb(), {"parameters": float(rows.numel())})


class _Kept:
    """The states of one holder's examples, computed when they are first asked for."""

    def __init__(self, model: _Model, examples: Sequence[Example]) -> None:
        self._model = model
        self._examples = examples
        self._states: dict[int, Tensor] = {}
        self._together: tuple[Tensor, Tensor] | None = None
        self.forward_tokens = 0

    def all(self) -> tuple[Tensor, Tensor]:
        """States (m, n_embd) and targets (m,) of all examples."""
        if self._together is None:
            self._together = self._of(list(range(len(self._examples))))
        return self._together

    def some(self, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Those of `count` random examples; of all where that is 0 or too many."""
        if not 0 < count < len(self._examples):
            return self.all()
        return self._of(random.permutation(len(self._examples))[:count].tolist())

    def owners(self) -> Tensor:
        """The example that each position of `all` belongs to: (m,)."""
        counts = torch.tensor([len(one.targets) for one in self._examples])
        return torch.repeat_interleave(torch.arange(len(self._examples)), counts)

    @torch.no_grad()
    def _of(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        missing = [number for number in chosen if number not in self._states]
        missing.sort(key=lambda number: len(self._examples[number].tokens))
        for low in range(0, len(missing), _EVALUATED_ROWS):
            numbers = missing[low : low + _EVALUATED_ROWS]
            (sent,) = in_order([self._examples[n] for n in numbers], _EVALUATED_ROWS)
            self.forward_tokens += sent.forward_tokens
            counts = [len(self._examples[n].targets) for n in numbers]
            parts = self._model.states(sent).split(counts)
            self._states |= dict(zip(numbers, parts, strict=True))
        targets = np.concatenate([self._examples[n].targets for n in chosen])
        states = torch.cat([self._states[n] for n in chosen])
        return states, torch.from_numpy(targets.astype(np.int64))


def _train(
    model: _Model, lora: StackedLora, batches: Sequence[Batch], devices: int, rate: float
) -> None:
    """One step of each device a batch; a device's loss is the mean over its own positions."""
    optimizer = torch.optim.Adam(lora.parameters(), lr=rate)
    for one in batches:
        owners = one.rows // (len(one.tokens) // devices)
        weights = 1.0 / torch.bincount(owners, minlength=devices)[owners]
        loss = (weights * cross_entropy(model.logits(one), one.targets, reduction="none")).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _shares(tokens: Tokens) -> dict[str, float]:
    """Each device's share of the training rows."""
    rows = {name: len(examples) for name, examples in tokens.devices.items()}
    return {name: count / sum(rows.values()) for name, count in rows.items()}


@torch.no_grad()
def _head_measured(heldout: _Kept, rows: Tensor) -> tuple[float, float]:
    states, targets = heldout.all()
    owners = heldout.owners()
    step = 2048

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for low in range(0, len(states), step):
            part = slice(low, low + step)
            yield states[part] @ rows.T, targets[part], owners[part]

    return _summed(parts())


def _summed(parts: Iterator[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """Mean loss, and the share of owners whose every position is right, over (logits, targets,
    owners) whose owners are numbered over all parts."""
    loss, positions = 0.0, 0
    seen: set[int] = set()
    wrong: set[int] = set()
    for logits, targets, owners in parts:
        loss += float(cross_entropy(logits, targets, reduction="sum"))
        positions += len(targets)
        seen.update(owners.tolist())
        wrong.update(owners[logits.argmax(dim=1) != targets].tolist())
    return loss / positions, 1.0 - len(wrong) / len(seen)


def _forget_peak() -> None:
    """The highest resident memory is counted from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_mb() -> float:
    """Highest resident memory of this process, MB."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
