from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soundstage.core.errors import ShapeError
from soundstage.data.batches import Batches, Labels
from soundstage.data.batching import Interleaved, Order
from soundstage.data.shapes import ClipShape

RUNS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=8)
"""Stretches of a run: processes, steps, samples of each process per step."""


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 60), seed=st.integers(0, 3), runs=RUNS)
def test_any_number_of_processes_takes_every_sample_once_per_epoch(
    num: int, seed: int, runs: list[tuple[int, int, int]]
) -> None:
    seen: list[int] = []
    for world, steps, each in runs:
        size = each * world
        first = -(-len(seen) // size)
        lost = Order(num, seed).take(len(seen), first * size - len(seen)).tolist() if len(seen) % size else []
        assert len(lost) < size  # all that another size of batch passes over
        seen += lost
        for step in range(first, first + steps):
            for rank in range(world):
                seen += Batches(num, seed).take(step, size, rank, world).tolist()
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


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ShapeError, match="6 samples do not divide into 4 equal parts"):
        Batches(20).take(0, 6, 1, 4)
    shapes = (ClipShape(), ClipShape(num_frames=17))
    labels = Labels(shapes, np.array([0, 1] * 10), [""] * 20, np.ones(20))
    several = Batches(20, 0, labels, (), lambda shape, like, size: size if shape == like else size + 1, shapes[0])
    assert {len(several.take(step, 4)) for step in range(9)} == {4, 5}
    for step in range(9):  # whichever of the two shapes it has
        with pytest.raises(ShapeError, match=r"5 samples do not divide into 2 equal parts.* multiple= of buckets"):
            several.take(step, 4, 0, 2)
