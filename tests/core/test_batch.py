import pytest
import torch
from torch import Tensor

from soundstage.core import AV, Batch, Conditions, ShapeError


def test_parts_of_a_batch(x: AV[Tensor], text: Conditions) -> None:
    batch = Batch(x, text, ("a", "b", "c", "d"))
    assert len(batch) == 4
    second = batch.part(1, of=2)
    assert second.ids == ("c", "d") and len(second) == 2
    for name in x.modalities:
        assert torch.equal(second.x0[name], x[name][2:])
        assert torch.equal(second.cond.text[name], text.text[name][2:])
    moved = batch.to("meta")
    assert all(z.device.type == "meta" for z in (*moved.x0.values(), *moved.cond.text.values()))
    assert batch.part(0, of=1).ids == batch.ids
    with pytest.raises(ShapeError, match="4 samples do not divide into 3 equal parts"):
        batch.part(0, of=3)
