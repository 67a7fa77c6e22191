"""Which connections get a seat and which give way: decided without a socket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.seats import AT_ONCE, Limits, Seats, Stage

LIMITS = Limits(seats=4, seats_per_address=4, waiting=8, rate_per_address=1000.0, burst_per_address=1000.0)


def limits(**changes: float) -> Limits:
    return Limits(**{**vars(LIMITS), **changes})  # type: ignore[arg-type]


def seated(seats: Seats, numbers: range, now: float, address: str = "a") -> None:
    for number in numbers:
        assert seats.arrive(number, address, now) is None
        seats.speaks(number, now)
    assert seats.settle(now) == (list(numbers), [], None)


def test_who_speaks_gets_the_seat_of_who_has_been_silent_longest() -> None:
    seats = Seats(LIMITS)
    for number in range(4):
        seated(seats, range(number, number + 1), float(number))
    assert seats.arrive(9, "a", 4.0) is None
    assert seats.settle(4.0) == ([], [], None), "it has said nothing"
    seats.speaks(9, 4.0)
    assert seats.settle(4.0) == ([9], [0], None)


def test_nobody_gives_way_before_the_grace_is_over() -> None:
    """A burst of callers who all speak at once is served one after the other, none at another's cost."""
    seats = Seats(LIMITS)
    seated(seats, range(4), 0.0)
    seats.arrive(9, "a", 0.1)
    seats.speaks(9, 0.1)
    assert seats.settle(0.1) == ([], [], 0.25)
    seats.leave(2)
    assert seats.settle(0.2) == ([9], [], None)


def test_a_proven_caller_gives_way_to_nobody() -> None:
    seats = Seats(LIMITS)
    seated(seats, range(4), 0.0)
    for number in range(4):
        seats.advance(number, Stage.PROVEN, 0.0)
    seats.arrive(9, "a", 10.0)
    seats.speaks(9, 10.0)
    assert seats.settle(10.0).closed == []
    seats.advance(3, Stage.ANSWERED, 10.0)
    assert seats.settle(11.0) == ([9], [3], None)


@pytest.mark.parametrize("later", [Stage.ASKING, Stage.ANSWERED])
def test_who_has_said_less_gives_way_first(later: Stage) -> None:
    seats = Seats(LIMITS)
    seated(seats, range(4), 0.0)
    for number in range(3):
        seats.advance(number, later, 0.0)
    seats.arrive(9, "a", 5.0)
    seats.speaks(9, 5.0)
    assert seats.settle(5.0) == ([9], [3], None)


def test_the_address_that_holds_most_gives_way_and_waits() -> None:
    seats = Seats(LIMITS)
    seated(seats, range(1), 0.0, "b")
    seated(seats, range(1, 4), 1.0, "a")
    for number, address in ((10, "a"), (11, "a"), (12, "c")):
        seats.arrive(number, address, 2.0)
        seats.speaks(number, 2.0)
    # c first, though it came last; and it costs a one seat, not b.
    assert seats.settle(2.0).seated == [12, 10, 11]
    assert seats.settle(2.0).closed == []


def test_an_address_has_a_share() -> None:
    seats = Seats(limits(seats_per_address=3))
    seated(seats, range(3), 0.0)
    seats.arrive(9, "a", 1.0)
    seats.speaks(9, 1.0)
    assert seats.settle(1.0) == ([9], [0], None), "a seat is free, and it is for others"
    seated(seats, range(20, 21), 1.0, "b")


def test_an_address_has_a_rate_and_others_theirs() -> None:
    seats = Seats(limits(seats=100, seats_per_address=100, waiting=100, rate_per_address=10.0, burst_per_address=5.0))
    for number in range(20):
        seats.arrive(number, "a", 0.0)
        seats.speaks(number, 0.0)
    seats.arrive(99, "b", 0.0)
    seats.speaks(99, 0.0)
    found = seats.settle(0.0)
    assert sorted(found.seated) == [0, 1, 2, 3, 4, 99]
    assert found.again == pytest.approx(0.1)
    assert seats.settle(0.55).seated == [5, 6, 7, 8, 9]


def test_a_crowd_is_seated_in_turns_with_everything_else() -> None:
    seats = Seats(limits(seats=100, seats_per_address=100, waiting=100))
    for number in range(AT_ONCE + 3):
        seats.arrive(number, "a", 0.0)
        seats.speaks(number, 0.0)
    assert seats.settle(0.0) == (list(range(AT_ONCE)), [], 0.0)
    assert seats.settle(0.0) == ([AT_ONCE, AT_ONCE + 1, AT_ONCE + 2], [], None)


def test_the_queue_is_bounded_and_the_silent_leave_it_first() -> None:
    seats = Seats(limits(waiting=2))
    assert seats.arrive(0, "a", 0.0) is None
    assert seats.arrive(1, "a", 1.0) is None
    assert seats.arrive(2, "a", 2.0) == 0
    # A queue of those who speak is as long as it may be: the newcomer goes.
    full = Seats(limits(waiting=2, rate_per_address=1.0, burst_per_address=1.0))
    for number in range(3):
        full.arrive(number, "a", 0.0)
        full.speaks(number, 0.0)
        full.settle(0.0)
    assert full.arrive(9, "a", 0.0) == 9
    assert len(full) == 3


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "speak", "advance", "leave", "wait"]), st.integers(0, 30), st.sampled_from("abc")
    ),
    max_size=120,
)


@given(STEPS)
def test_whatever_comes_the_bounds_hold_and_nobody_is_lost(steps: list[tuple[str, int, str]]) -> None:
    seats, now, known, silent = Seats(LIMITS), 0.0, dict[int, str](), set[int]()
    for number, (step, which, address) in enumerate(steps, 100):
        chosen = sorted(known)[which % len(known)] if known else None
        if step == "arrive":
            victim = seats.arrive(number, address, now)
            known[number] = address
            silent.add(number)
            if victim is not None:
                del known[victim]
                silent.discard(victim)
        elif step == "wait":
            now += which / 20
        elif chosen is not None and step == "speak" and chosen in silent:
            silent.discard(chosen)
            seats.speaks(chosen, now)
        elif chosen is not None and step == "advance":
            seats.advance(chosen, list(Stage)[2 + which % 4], now)
        elif chosen is not None and step == "leave":
            seats.leave(chosen)
            del known[chosen]
            silent.discard(chosen)
        found = seats.settle(now)
        for closed in found.closed:
            del known[closed]
        assert len(seats) == len(known)
        assert len(known) <= LIMITS.seats + LIMITS.waiting
        assert found.again is None or found.again > now or len(found.seated) == AT_ONCE
