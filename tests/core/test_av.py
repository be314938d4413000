import operator

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from soundstage.core import AV, ModalityError, ShapeError, cat, collate, split, spread

VIDEO, AUDIO = torch.arange(48.0).reshape(2, 2, 3, 2, 2), torch.arange(16.0).reshape(2, 2, 4)


@pytest.fixture
def z(modalities: tuple[str, ...]) -> AV[Tensor]:
    return AV(VIDEO, AUDIO).only(*modalities)


def test_absent_modalities_are_absent(z: AV[Tensor], modalities: tuple[str, ...]) -> None:
    assert z.modalities == modalities == tuple(name for name, _ in z.items())
    assert len(list(z.values())) == len(modalities)
    for name in ("video", "audio"):
        assert (name in z) == (name in modalities)
        if name not in z:
            with pytest.raises(ModalityError, match=rf"no '{name}' here: the value has {modalities[0]}"):
                z[name]
    assert AV(video=0.0).modalities == ("video",), "zero is a value"


def test_map(z: AV[Tensor], modalities: tuple[str, ...]) -> None:
    doubled = z.map(lambda a, b, c: a + b * c, z, 1.0)
    assert doubled.modalities == modalities
    assert all(torch.equal(doubled[name], 2 * z[name]) for name in modalities)
    assert AV(video=1).map(lambda _: None).modalities == ()


def test_values_of_other_modalities_do_not_mix() -> None:
    joint, video = AV(VIDEO, AUDIO), AV(video=VIDEO)
    for mix in (lambda: joint + video, lambda: video * joint, lambda: joint.map(operator.add, video)):
        with pytest.raises(ModalityError, match=r"modalities differ: .*use only\(\)"):
            mix()
    assert torch.equal((joint.only("video") + video)["video"], 2 * VIDEO)


def test_arithmetic(z: AV[Tensor]) -> None:
    for name, a in z.items():
        for out, expected in (
            (z + z, a + a), (z - 1.0, a - 1), (z * z, a * a), (z / 4.0, a / 4), (-z, -a),
            (1.0 + z, 1 + a), (1.0 - z, 1 - a), (3 * z, 3 * a),
        ):  # fmt: skip
            assert torch.equal(out[name], expected)


def test_times_spread_onto_latents(z: AV[Tensor]) -> None:
    per_sample = z.map(lambda _: torch.tensor([2.0, 3.0]))
    per_step = z.map(lambda a: torch.arange(1.0, 1 + a.shape[2]).expand(2, -1))
    for name, a in z.items():
        for out in (per_sample * z, z * per_sample):
            assert torch.equal(out[name][1], 3 * a[1])
        for out in (per_step * z, z * per_step):
            assert torch.equal(out[name][:, :, 2], 3 * a[:, :, 2])
        assert torch.equal((per_sample * per_step)[name][1], 3 * per_step[name][1]), "(B,) onto (B, F)"
    assert spread(2.0, VIDEO) == 2.0
    with pytest.raises(ShapeError, match="5 per-step values do not fit latents of 3 steps"):
        spread(torch.ones(2, 5), VIDEO)


def test_only_replace_and_dict(z: AV[Tensor], modalities: tuple[str, ...]) -> None:
    assert AV.from_dict(z.as_dict()).modalities == modalities
    assert list(z.as_dict()) == list(modalities)
    assert z.replace(video=None, audio=VIDEO).modalities == ("audio",)
    for wrong in (lambda: z.replace(vidoe=VIDEO), lambda: AV.from_dict({"vidoe": VIDEO})):
        with pytest.raises(ModalityError, match="vidoe: not a modality, use video, audio"):
            wrong()
    with pytest.raises(ModalityError):
        AV(video=VIDEO).only("video", "audio")


def test_frozen(z: AV[Tensor]) -> None:
    with pytest.raises(AttributeError):
        z.video = None  # type: ignore[misc]


def test_batches(z: AV[Tensor]) -> None:
    assert z.batch == 2
    stacked = collate([z.map(lambda a: a[0]), z.map(lambda a: a[1])])
    joined = cat([z, z])
    for name, a in z.items():
        assert torch.equal(stacked[name], a)
        assert torch.equal(split(joined, 2)[1][name], a)
        assert torch.equal(cat([z, z], dim=2)[name].chunk(2, dim=2)[0], a)
        assert z.to(torch.bfloat16)[name].dtype == torch.bfloat16
    with pytest.raises(ShapeError, match="cannot be cut into 3"):
        split(joined, 3)
    with pytest.raises(ShapeError, match="batch sizes differ"):
        _ = AV(VIDEO, AUDIO[:1]).batch


def test_pytree_has_only_what_is_present(z: AV[Tensor], modalities: tuple[str, ...]) -> None:
    leaves, spec = pytree.tree_flatten(z)
    assert len(leaves) == len(modalities) and all(isinstance(leaf, Tensor) for leaf in leaves)
    back = pytree.tree_unflatten(leaves, spec)
    assert back.modalities == modalities
    paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(z)]
    assert paths == [f".{name}" for name in modalities]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
