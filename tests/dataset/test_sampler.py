from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soundstage.data.batching import Cursor, Interleaved, Order, Sampler

RUNS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=8)
"""Stretches of a run: processes, samples of all of them per step, steps."""


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 60), seed=st.integers(0, 3), runs=RUNS)
def test_any_number_of_processes_takes_every_sample_once_per_epoch(
    num: int, seed: int, runs: list[tuple[int, int, int]]
) -> None:
    seen: list[int] = []
    cursor = Cursor()
    for world, size, steps in runs:
        samplers = [Sampler(Order(num, seed), rank, world, cursor) for rank in range(world)]
        for _ in range(steps):
            shares = [sampler.take(size).tolist() for sampler in samplers]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            dealt = [shares[i % world][i // world] for i in range(size)]
            seen += dealt
        assert len({sampler.cursor for sampler in samplers}) == 1
        cursor = samplers[0].cursor
        assert cursor == Cursor(*divmod(len(seen), num), world)
    assert seen == Order(num, seed).take(0, len(seen)).tolist()
    for epoch in range(len(seen) // num):
        assert sorted(seen[epoch * num : (epoch + 1) * num]) == list(range(num))


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 50), at=st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_an_order_is_known_at_any_position(num: int, at: list[int]) -> None:
    order = Order(num, 2)
    assert order.at(torch.tensor(at)).tolist() == [int(order.take(position, 1)) for position in at]


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.fractions(0, 9, max_denominator=40), min_size=1, max_size=6),
    position=st.integers(0, 400),
    size=st.integers(1, 50),
)
def test_streams_come_by_their_share_and_in_their_order(rates: list[Fraction], position: int, size: int) -> None:
    if sum(rates) < 1:
        with pytest.raises(ValueError, match="do not make a block"):
            Interleaved(rates)
        return
    mixed = Interleaved(rates, 5)
    which, unit = mixed.take(0, position + size)
    again = Interleaved(rates, 5).take(position, size)
    assert torch.equal(which[position:], again[0])
    assert torch.equal(unit[position:], again[1])
    for stream, rate in enumerate(rates):
        mine = unit[which == stream]
        assert mine.tolist() == list(range(len(mine)))
        assert abs(len(mine) - float((position + size) * rate / sum(rates))) <= float(rate) + len(rates) + 1
        assert mixed.counts(position)[stream] == int((which[:position] == stream).sum())


def test_a_rank_that_is_none() -> None:
    with pytest.raises(ValueError, match="rank 2 is not one of 2 processes"):
        Sampler(Order(4), 2, 2)
