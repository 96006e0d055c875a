"""Pretrain the demo's small model and write it as a Q8_0 GGUF file.

    python -m deploy.demo.pretrain --corpus CORPUS_CHILDREN --out DIR [--minutes 60]

needs torch, tokenizers and gguf, and no accelerator. DIR receives `tokenizer.json`, a checkpoint
every few minutes and the GGUF file. The learning rate follows the clock, not a step count, so the
run ends on time on a machine of any speed; two runs therefore differ in detail.
"""

from __future__ import annotations

import argparse
import math
import random
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from deploy.demo.families import PROMPT_TEMPLATE
from deploy.demo.gguf_export import export
from deploy.demo.pretrain_model import END_ID, PAD_ID, Llama, Shape
from deploy.demo.pretrain_text import END, LibraryText, read_books, read_library

PAD = "<|pad|>"
GGUF_NAME = "seedwire-demo-q8_0.gguf"
BLANK_SHARE = 0.15


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer that llama.cpp's `gpt-2` pre-tokenizer reproduces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True, slots=True)
class Corpus:
    """Encoded text: each document begins with `END`; a row is (prompt, one answer a topic)."""

    books: list[list[int]]
    library: list[list[int]]
    rows: list[tuple[list[int], list[list[int]]]]


def encoded(tokenizer: Tokenizer, books: list[str], library: LibraryText) -> Corpus:
    """Return the corpus as token ids."""

    def ids(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    prompts = ids([PROMPT_TEMPLATE.format(text=row.text) for row in library.rows])
    answers = [ids([f" {topic}" for topic in row.topics]) for row in library.rows]
    return Corpus(
        [[END_ID, *document] for document in ids(books)],
        [[END_ID, *document] for document in ids(library.documents)],
        [([END_ID, *prompt], answer) for prompt, answer in zip(prompts, answers, strict=True)],
    )


def sequences(corpus: Corpus, shape: Shape, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens, is_answer) forever, each of `context + 1` entries.

    One pass packs a quarter of the books, the whole library and every topic row twice.
    """
    while True:
        parts: list[tuple[list[int], int]] = []
        parts += ((book, 0) for book in rng.sample(corpus.books, len(corpus.books) // 4))
        parts += ((document, 0) for document in corpus.library)
        for prompt, answers in corpus.rows:
            parts += (([*prompt, *answer], len(prompt)) for answer in answers)
        rng.shuffle(parts)
        tokens = torch.tensor([token for part, _ in parts for token in part])
        is_answer = torch.zeros(len(tokens), dtype=torch.bool)
        start = 0
        for part, answer_at in parts:
            is_answer[start + answer_at] = answer_at > 0
            start += len(part)
        starts = list(range(0, len(tokens) - shape.context - 1, shape.context))
        rng.shuffle(starts)
        for start in starts:
            window = slice(start, start + shape.context + 1)
            yield tokens[window], is_answer[window]


def blanked(tokens: Tensor) -> Tensor:
    """Return the input with some tokens of every second sequence replaced by padding.

    It keeps the model from learning the few topic rows by heart.
    """
    blank = torch.rand(tokens.shape) < BLANK_SHARE
    blank[::2] = False
    return tokens.masked_fill(blank & (tokens != END_ID), PAD_ID)


def losses(model: Llama, tokens: Tensor, is_answer: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss of all tokens and that of the first tokens of the topics."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(blanked(tokens[:, :-1]))
    loss = functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    chosen = is_answer[:, 1:].flatten().float()
    return loss.mean(), (loss * chosen).sum() / chosen.sum().clamp(min=1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how hard to train."""

    minutes: float
    peak_rate: float = 2e-3
    warmup_share: float = 0.02
    batch: int = 24
    answer_weight: float = 0.5
    checkpoint_s: float = 240.0

    def rate(self, share: float) -> float:
        """Return the learning rate after this share of the time: warm-up, then a cosine."""
        if share < self.warmup_share:
            return self.peak_rate * share / self.warmup_share
        fallen = (share - self.warmup_share) / (1 - self.warmup_share)
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0))))


def train(model: Llama, corpus: Corpus, schedule: Schedule, out: Path) -> None:
    """Train until the time is up, leaving `checkpoint.pt` in `out` now and then."""
    decayed = [weight for weight in model.parameters() if weight.dim() == 2]
    plain = [weight for weight in model.parameters() if weight.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(losses)
    stream = sequences(corpus, model.shape, random.Random(0))  # noqa: S311 - no secret
    began = saved = time.monotonic()
    step = 0
    while (share := (time.monotonic() - began) / (60 * schedule.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(share)
        tokens, is_answer = zip(*(next(stream) for _ in range(schedule.batch)), strict=True)
        text_loss, answer_loss = compiled(model, torch.stack(tokens), torch.stack(is_answer))
        (text_loss + schedule.answer_weight * answer_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            seen = step * schedule.batch * model.shape.context
            spent = time.monotonic() - began
            print(
                f"step {step}  {seen / 1e6:.2f} M tokens  {seen / spent:.0f}/s  "
                f"loss {text_loss.item():.3f}  topic {answer_loss.item():.3f}",
                flush=True,
            )
        if time.monotonic() - saved > schedule.checkpoint_s:
            torch.save(model.state_dict(), out / "checkpoint.pt")
            saved = time.monotonic()
    torch.save(model.state_dict(), out / "checkpoint.pt")


def pretrain(corpus_folder: Path, schedule: Schedule, out: Path) -> None:
    """Leave a tokenizer and a trained checkpoint in `out`."""
    shape = Shape()
    library = read_library(Path(sysconfig.get_paths()["stdlib"]))
    books = read_books(corpus_folder)
    # A sixth of the books, so that the vocabulary is not only theirs.
    tokenizer = train_tokenizer(iter(books[::6] + library.documents), shape.vocabulary)
    tokenizer.save(str(out / "tokenizer.json"))
    train(Llama(shape), encoded(tokenizer, books, library), schedule, out)


def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain, or take the checkpoint that is there, and write the GGUF file."""
    parser = argparse.ArgumentParser(prog="deploy.demo.pretrain", description=__doc__)
    parser.add_argument("--corpus", type=Path, help="folder of train.txt.gz; none: only export")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.corpus is not None:
        pretrain(arguments.corpus, Schedule(arguments.minutes), out)
    model = Llama(Shape())
    model.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True))
    export(model, Tokenizer.from_file(str(out / "tokenizer.json")), out / GGUF_NAME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
