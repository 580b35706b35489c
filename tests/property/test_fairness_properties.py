"""Who is served when: tenants share, priorities go first, age decides in the end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.requests import waiting

from muai_batching.fair_queue import FairQueue, Waiting

MANY = settings(max_examples=200, deadline=None)


def serve(queue: FairQueue, count: int) -> list[Waiting]:
    """Serve one at a time."""
    served = []
    for _ in range(min(count, len(queue))):
        item = queue.peek(1)[0]
        queue.remove([item], served=True)
        served.append(item)
    return served


@MANY
@given(flood=st.integers(100, 2000), few=st.integers(1, 50), tokens=st.integers(1, 100))
def test_given_one_tenant_floods_then_another_is_served_every_second_time(flood: int, few: int, tokens: int) -> None:
    queue = FairQueue(ageing_s=0.5)
    for number in range(flood):
        queue.push(waiting(f"a{number}", tokens=tokens, tenant="a", arrived_s=number / 1e6))
    for number in range(few):
        queue.push(waiting(f"b{number}", tokens=tokens, tenant="b", arrived_s=1.0))
    first = serve(queue, 2 * few + 1)
    assert sum(1 for item in first if item.request.tenant == "b") == min(few, len(first) - few)


@MANY
@given(served_before=st.integers(0, 300), burst=st.integers(1, 200), credit=st.integers(0, 160))
def test_given_a_tenant_that_asked_for_nothing_then_it_is_let_ahead_by_its_credit_and_no_more(
    served_before: int, burst: int, credit: int
) -> None:
    queue = FairQueue(ageing_s=0.5, credit_requests=credit)
    for number in range(1000):
        queue.push(waiting(f"a{number}", tenant="a"))
    serve(queue, served_before)
    for number in range(burst):
        queue.push(waiting(f"b{number}", tenant="b", arrived_s=1.0))
    served = serve(queue, 2 * burst + 1)
    last = max(place for place, item in enumerate(served) if item.request.tenant == "b")
    ahead = min(burst, credit, served_before)
    assert sum(1 for item in served if item.request.tenant == "b") == burst
    assert last <= 2 * burst - ahead + 1


@MANY
@given(sizes=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50)), min_size=20, max_size=200))
def test_given_two_backlogged_tenants_then_their_served_tokens_differ_by_no_more_than_one_request_each(
    sizes: list[tuple[str, int]],
) -> None:
    queue = FairQueue(ageing_s=0.5)
    for number, (tenant, tokens) in enumerate(sizes):
        queue.push(waiting(str(number), tokens=tokens, tenant=tenant))
    left = {tenant: sum(1 for t, _ in sizes if t == tenant) for tenant in "ab"}
    served = {"a": 0, "b": 0}
    while all(left.values()):
        (item,) = serve(queue, 1)
        served[item.request.tenant] += item.tokens
        left[item.request.tenant] -= 1
        assert abs(served["a"] - served["b"]) <= 2 * 50


@MANY
@given(priorities=st.lists(st.integers(0, 9), min_size=2, max_size=60))
def test_given_one_tenant_and_one_moment_then_higher_priorities_go_first_and_equals_in_order(
    priorities: list[int],
) -> None:
    queue = FairQueue(ageing_s=0.5)
    for number, priority in enumerate(priorities):
        queue.push(waiting(f"{number:03}", priority=priority))
    order = [(-item.request.priority, item.request.id) for item in serve(queue, len(priorities))]
    assert order == sorted(order)


@MANY
@given(low=st.integers(0, 9), high=st.integers(0, 9), later_s=st.floats(4.6, 100))
def test_given_nine_steps_of_waiting_then_age_beats_any_priority(low: int, high: int, later_s: float) -> None:
    queue = FairQueue(ageing_s=0.5)
    queue.push(waiting("old", priority=low, arrived_s=0.0))
    queue.push(waiting("young", priority=high, arrived_s=later_s))
    assert queue.peek(1)[0].request.id == "old"


operations = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abc"), st.integers(0, 9), st.integers(1, 20)),
        st.tuples(st.just("serve"), st.integers(1, 12), st.booleans(), st.none()),
    ),
    max_size=80,
)


@MANY
@given(steps=operations)
def test_given_any_pushes_and_removals_then_the_queue_holds_exactly_the_rest(steps: list[tuple[object, ...]]) -> None:
    queue, inside, now_s = FairQueue(ageing_s=0.5), {}, 0.0
    for number, step in enumerate(steps):
        now_s += 0.01
        if step[0] == "push":
            item = waiting(
                str(number), tenant=str(step[1]), priority=int(str(step[2])), tokens=int(str(step[3])), arrived_s=now_s
            )
            queue.push(item)
            inside[item.request.id] = item
        else:
            chosen = queue.peek(int(str(step[1])))
            assert len(chosen) == min(int(str(step[1])), len(inside))
            queue.remove(chosen, served=bool(step[2]))
            for item in chosen:
                del inside[item.request.id]
        assert len(queue) == len(inside)
        assert {item.request.id for item in queue.items()} == set(inside)
        oldest_s = min((item.arrived_s for item in inside.values()), default=float("inf"))
        assert queue.oldest_arrival_s() == oldest_s
