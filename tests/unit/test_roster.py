"""What rounds remember of who has delivered: exact, and bounded by those who are remembered."""

from hypothesis import given
from hypothesis import strategies as st

from services.aggregator.roster import SPARE, Counted, Roster

PARTS = st.one_of(st.integers(0, 40), st.just(2**32 - 1))


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abcdef"), PARTS), max_size=60))
def test_a_round_has_exactly_what_was_added_to_it(added: list[tuple[int, str, int]]) -> None:
    roster = Roster()
    rounds = [Counted(roster) for _ in range(3)]
    for number, device, part in added:
        rounds[number].add(device, part)
    for number, counted in enumerate(rounds):
        for device in "abcdef":
            for part in (*range(41), 2**32 - 1):
                assert counted.has(device, part) == ((number, device, part) in added)


def test_a_device_delivers_for_the_first_time_once_a_round() -> None:
    roster = Roster()
    one, two = Counted(roster), Counted(roster)
    one.add("a", 0)
    assert [one.delivers("a"), one.delivers("a"), two.delivers("a")] == [True, False, True]
    assert one.has("a", 0)
    assert not two.has("a", 0)


def test_names_that_no_round_knows_are_forgotten_and_the_others_keep_their_parts() -> None:
    roster = Roster()
    old, new = Counted(roster), Counted(roster)
    for number in range(2 * SPARE):
        old.add(f"old-{number}", 0)
        if number % 100 == 0:
            new.add(f"new-{number}", number % 31)
            new.add(f"old-{number}", 1)
    new.add("far", 77)
    roster.forget([old, new])
    assert len(roster.numbers) > 2 * SPARE
    old.clear()
    roster.forget([old, new])
    assert len(roster.numbers) < SPARE
    for number in range(0, 2 * SPARE, 100):
        assert new.has(f"new-{number}", number % 31)
        assert new.has(f"old-{number}", 1)
        assert not new.has(f"old-{number}", 0)
    assert new.has("far", 77)
    assert not new.has("old-1", 1)
    new.add("old-1", 2)
    assert new.has("old-1", 2)
