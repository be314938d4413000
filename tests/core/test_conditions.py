from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from soundstage.core import AV, Conditions, ConfigError, ShapeError


@pytest.fixture
def cond(modalities: tuple[str, ...]) -> Conditions:
    return Conditions(
        text=AV(torch.rand(2, 5, 3), torch.rand(2, 4, 3)).only(*modalities),
        text_mask=AV(torch.ones(2, 5).bool(), torch.ones(2, 4).bool()).only(*modalities),
        reference=torch.rand(2, 6, 3),
        control=AV(torch.rand(2, 2, 3, 1, 2), torch.rand(2, 2, 4)).only(*modalities),
        mask=AV(torch.zeros(2, 3), torch.zeros(2, 4)).only(*modalities),
        positions=AV(torch.rand(2, 3), torch.rand(2, 4)).only(*modalities),
    )


def same(a: object, b: object) -> bool:
    x, y = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(x) == len(y) and all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


def test_drop_a_group(cond: Conditions) -> None:
    assert cond.drop("text").text is None and cond.drop("text").text_mask is None
    assert cond.drop("control").control is None and cond.drop("control").mask is None
    assert cond.drop("reference").reference is None and cond.drop("positions").positions is None
    assert same(cond.drop("text").drop("control"), Conditions(reference=cond.reference, positions=cond.positions))
    with pytest.raises(ConfigError, match=r"'txt' is not one of .*did you mean 'text'"):
        cond.drop("txt")


def test_drop_for_some_samples_means_absent(cond: Conditions, modalities: tuple[str, ...]) -> None:
    """What drop(where) leaves is what cat() writes for a sample whose field is absent."""
    where = torch.tensor([False, True])
    first, second = (cond.map(lambda x, i=i: x[i : i + 1]) for i in (0, 1))
    for group in ("text", "reference", "control"):
        assert same(cond.drop(group, where), Conditions.cat([first, second.drop(group)])), group
    name = modalities[0]
    dropped = cond.drop("control", where)
    assert (dropped.control[name][1] == 0).all() and (dropped.mask[name][1] == 1).all(), "generate all of it"
    with pytest.raises(ConfigError, match="positions"):
        cond.drop("positions", where)


def test_dropped_text_is_masked_even_without_a_mask(modalities: tuple[str, ...]) -> None:
    ids = Conditions(text=AV(torch.full((2, 4), 65), torch.full((2, 4), 66)).only(*modalities))
    dropped = ids.drop("text", torch.tensor([True, False]))
    for name in modalities:
        assert dropped.text[name][0].tolist() == [0] * 4 and dropped.text[name].dtype == torch.int64
        assert dropped.text_mask[name].tolist() == [[False] * 4, [True] * 4]


def test_cat_pads_text(cond: Conditions, modalities: tuple[str, ...]) -> None:
    short = Conditions(text=cond.text.map(lambda x: x[:, :2]))
    out = Conditions.cat([cond.drop("positions"), short])
    for name in modalities:
        length = cond.text[name].shape[1]
        assert out.text[name].shape == (4, length, 3)
        assert torch.equal(out.text[name][2:, :2], cond.text[name][:, :2])
        assert (out.text[name][2:, 2:] == 0).all()
        assert out.text_mask[name][2:].tolist() == [[True] * 2 + [False] * (length - 2)] * 2
    assert (out.reference[2:] == 0).all()


def test_cat_with_nothing() -> None:
    assert Conditions.cat([Conditions(), Conditions()]).batch is None
    text = Conditions(text=AV(video=torch.ones(3, 2, 1)))
    out = Conditions.cat([Conditions(), text])
    assert out.batch == 6 and not out.text_mask["video"][:3].any()


def test_cat_refuses_what_does_not_fit(cond: Conditions) -> None:
    with pytest.raises(ShapeError, match="positions must be set in all parts"):
        Conditions.cat([cond, cond.drop("positions")])
    with pytest.raises(ShapeError, match=r"reference of shapes \[\(2, 6, 3\), \(2, 5, 3\)\]"):
        Conditions.cat([Conditions(reference=cond.reference), Conditions(reference=cond.reference[:, :5])])


def test_to_keeps_masks_and_ids() -> None:
    ids, mask = torch.tensor([[65, 300]]), torch.tensor([[True, False]])
    out = Conditions(text=AV(video=ids), text_mask=AV(video=mask), reference=torch.rand(1, 2, 3)).to(torch.bfloat16)
    assert out.reference.dtype == torch.bfloat16
    assert torch.equal(out.text["video"], ids) and torch.equal(out.text_mask["video"], mask)
    moved = Conditions(text=AV(video=ids)).to("meta")
    assert moved.text["video"].device.type == "meta" and moved.text["video"].dtype == torch.int64


def test_only_and_batch(cond: Conditions, modalities: tuple[str, ...]) -> None:
    assert cond.batch == 2
    for name in modalities:
        alone = cond.only(name)
        assert alone.text.modalities == alone.control.modalities == (name,)
        assert torch.equal(alone.reference, cond.reference)
    absent = "audio" if modalities == ("video",) else "video"
    if absent not in modalities:
        assert cond.only(absent).text is None


def test_every_field_is_carried(cond: Conditions, modalities: tuple[str, ...]) -> None:
    names = [f.name for f in fields(Conditions)]
    assert all(getattr(cond, name) is not None for name in names), "the case above must set every field"
    for carried in (cond.only(*modalities), Conditions.cat([cond]), cond.map(torch.clone), cond.to("cpu")):
        assert all(same(getattr(carried, name), getattr(cond, name)) for name in names)


def test_pytree_round_trip(cond: Conditions) -> None:
    for value in (cond, cond.drop("text"), Conditions()):
        leaves, spec = pytree.tree_flatten(value)
        assert all(isinstance(leaf, Tensor) for leaf in leaves)
        assert same(pytree.tree_unflatten(leaves, spec), value)
        assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
