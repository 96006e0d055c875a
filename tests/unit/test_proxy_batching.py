"""Continuous batching, against a model of the cache that forgets nothing it should not."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.proxy_inference.batching import Copy, Forget, Plan, Schedule, Sequence, common

BATCH = 16


class Cache:
    """What llama.cpp would hold: tokens by lane, filled strictly in order of their positions."""

    def __init__(self, lanes: int, cells: int) -> None:
        self.held: dict[int, list[int]] = {lane: [] for lane in range(lanes)}
        self.cells = cells

    def make(self, plan: Plan) -> None:
        for edit in plan.edits:
            if isinstance(edit, Forget):
                del self.held[edit.lane][edit.start :]
            else:
                assert isinstance(edit, Copy)
                assert not self.held[edit.lane]
                assert edit.count <= len(self.held[edit.source])
                self.held[edit.lane] = self.held[edit.source][: edit.count]
        for share in plan.shares:
            sequence = share.sequence
            assert sequence.lane is not None
            held = self.held[sequence.lane.number]
            assert len(held) == sequence.fed
            held += sequence.tokens[sequence.fed : sequence.fed + share.count]
            assert held == sequence.tokens[: len(held)]
        assert sum(map(len, self.held.values())) <= self.cells


def run(
    prompts: list[list[int]],
    *,
    lanes: int,
    cells: int,
    length: Callable[[int], int],
    reads: int = 1000,
    idle: int | None = None,
) -> tuple[Schedule, list[Sequence], int]:
    """Every prompt gets an answer; how many passes that took."""
    schedule = Schedule(
        lanes=lanes, cells=cells, batch_tokens=BATCH, most_reads=reads, idle_cells=idle
    )
    cache = Cache(lanes, cells)
    sequences = [Sequence(prompt) for prompt in prompts]
    left = {sequence: length(index) for index, sequence in enumerate(sequences)}
    for sequence in sequences:
        schedule.add(sequence)
    for count in range(20_000):
        plan = schedule.next()
        if not plan.shares:
            assert not schedule.waiting
            assert not schedule.running
            return schedule, sequences, count
        assert plan.size <= BATCH
        assert len({id(share.sequence) for share in plan.shares}) == len(plan.shares)
        unused = [lane.held for lane in schedule.lanes if lane.sequence is None]
        assert idle is None or sum(map(len, unused)) <= idle
        cache.make(plan)
        schedule.done(plan)
        for share in plan.shares:
            if share.reads:
                sequence = share.sequence
                assert sequence.pending == 0
                sequence.tokens.append(len(sequence.tokens) % 7)
                left[sequence] -= 1
                if not left[sequence]:
                    schedule.end(sequence)
    raise AssertionError("the sequences never end")


texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    prompts=texts,
    lanes=st.integers(1, 5),
    cells=st.integers(60, 150),
    idle=st.none() | st.integers(0, 80),
)
def test_every_answer_is_written_whatever_the_room(
    prompts: list[list[int]], lanes: int, cells: int, idle: int | None
) -> None:
    def length(index: int) -> int:
        return 1 + index % 20

    _, sequences, _ = run(prompts, lanes=lanes, cells=cells, length=length, idle=idle)
    for index, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        assert sequence.tokens[: len(prompt)] == prompt
        assert len(sequence.tokens) == len(prompt) + 1 + index % 20


@settings(max_examples=100, deadline=None)
@given(prompt=st.lists(st.integers(0, 3), min_size=1, max_size=60), reads=st.integers(1, 9))
def test_each_wanted_position_is_read_once_and_in_order(prompt: list[int], reads: int) -> None:
    schedule = Schedule(lanes=2, cells=200, batch_tokens=BATCH, most_reads=reads)
    schedule.add(Sequence(prompt))  # leaves a prefix in the cache, which must not be used
    while (plan := schedule.next()).shares:
        schedule.done(plan)
        if plan.shares[0].reads:
            schedule.end(plan.shares[0].sequence)
    wanted = Sequence(prompt, read_from=0)
    schedule.add(wanted)
    read: list[int] = []
    while wanted.pending:
        plan = schedule.next()
        share = plan.shares[0]
        end = wanted.fed + share.count
        read += range(end - share.reads, end)
        assert share.reads <= max(reads, 2)
        schedule.done(plan)
    assert read == list(range(len(prompt)))


def test_a_prompt_that_begins_as_an_earlier_one_did_is_not_computed_again() -> None:
    schedule, first, _ = run([[1] * 30], lanes=2, cells=200, length=lambda _: 5)
    following = Sequence([*first[0].tokens, 3, 3])
    schedule.add(following)
    assert schedule.next().size == 3  # the answer's last token was never fed
    assert following.reused == 34


def test_two_conversations_with_one_system_prompt_keep_their_own_histories() -> None:
    system = list(range(20))
    schedule, _, _ = run(
        [[*system, *[101] * 30], [*system, *[102] * 30]], lanes=4, cells=400, length=lambda _: 1
    )
    for letter in (101, 102, 101, 102):
        again = Sequence([*system, *[letter] * 30, 7])
        schedule.add(again)
        plan = schedule.next()
        schedule.done(plan)
        schedule.end(again)
        assert again.reused >= 49, letter


def test_running_answers_get_their_token_in_every_pass_while_a_long_prompt_is_read() -> None:
    schedule = Schedule(lanes=3, cells=500, batch_tokens=BATCH, most_reads=100)
    short = [Sequence([1, 2]), Sequence([3, 4])]
    for sequence in short:
        schedule.add(sequence)
    schedule.done(schedule.next())
    long = Sequence([9] * 100)
    schedule.add(long)
    while long.pending:
        for sequence in short:
            sequence.tokens.append(5)
        plan = schedule.next()
        assert {id(one) for one in short} <= {id(share.sequence) for share in plan.shares}
        schedule.done(plan)


def test_what_was_cancelled_gives_up_its_place_at_once() -> None:
    schedule = Schedule(lanes=1, cells=100, batch_tokens=BATCH, most_reads=10)
    first, second, third = Sequence([1]), Sequence([2]), Sequence([3])
    for sequence in (first, second, third):
        schedule.add(sequence)
    schedule.done(schedule.next())
    schedule.end(second)
    schedule.end(first)
    assert [share.sequence for share in schedule.next().shares] == [third]


def test_after_a_reset_all_that_ran_is_computed_anew_in_its_order() -> None:
    schedule = Schedule(lanes=2, cells=100, batch_tokens=BATCH, most_reads=10)
    sequences = [Sequence([1, 2]), Sequence([3, 4]), Sequence([5, 6])]
    for sequence in sequences:
        schedule.add(sequence)
    schedule.done(schedule.next())
    for sequence in sequences[:2]:
        sequence.tokens.append(7)
    schedule.reset()
    plan = schedule.next()
    assert [share.sequence for share in plan.shares] == sequences[:2]
    assert [share.count for share in plan.shares] == [3, 3]
    assert [share.reads for share in plan.shares] == [1, 1]


def test_a_sequence_that_could_never_fit_is_refused() -> None:
    schedule = Schedule(lanes=1, cells=10, batch_tokens=BATCH, most_reads=1)
    with pytest.raises(ValueError, match="11 tokens in a cache of 10"):
        schedule.add(Sequence([1] * 11))
    with pytest.raises(ValueError, match="at least one token"):
        Sequence([])


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=30))
def test_the_common_prefix_is_the_longest(one: list[int], other: list[int]) -> None:
    count = common(one, other)
    assert one[:count] == other[:count]
    assert count == min(len(one), len(other)) or one[count] != other[count]


@pytest.mark.parametrize(("idle", "kept"), [(100, False), (None, True)])
def test_what_nobody_uses_is_not_kept_for_long_where_it_costs_every_pass(
    idle: int | None, kept: bool
) -> None:
    schedule = Schedule(lanes=3, cells=400, batch_tokens=BATCH, most_reads=9, idle_cells=idle)

    def write(prompt: list[int], tokens: int) -> Sequence:
        sequence = Sequence(prompt)
        schedule.add(sequence)
        while sequence.read_from < len(prompt) + tokens - 1:
            schedule.done(schedule.next())
            sequence.tokens.append(1)
        schedule.end(sequence)
        return sequence

    prompt, other = [2, 3, 4] * 5, [5] * 9
    write(prompt, 1)
    write(other, 2)
    assert write(prompt, 1).reused == len(prompt) - 1, "it comes back soon"
    write(other, 60)
    assert (write(prompt, 1).reused > 0) == kept
    assert write(other, 1).reused == len(other) - 1, "what was just used stays"
