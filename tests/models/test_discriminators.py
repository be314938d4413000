"""Heads on tapped features: which cell a token is, what weights do, and what does not fit."""

import pytest
import torch
from torch import nn

from soundstage.core import AV, Conditions, ConfigError, ShapeError
from soundstage.core.features import tap
from soundstage.models.discriminators import Discriminator, DiscriminatorConfig, Head, on_grid
from soundstage.models.text.bytes import ByteTextConfig
from soundstage.models.twin import TwinConfig
from soundstage.models.unified_dit import UnifiedDiT, UnifiedDiTConfig
from soundstage.models.wan import WanConfig

LATENTS = AV(torch.zeros(2, 3, 3, 4, 8), torch.zeros(2, 5, 7))
"""Two clips: 3 frames of 4 x 8 cells, 7 steps of sound."""


def marked(frames: int, rows: int, columns: int, steps: int) -> torch.Tensor:
    """Tokens (2, L, 4) that say where they stand: frame, row, column, or -1, step, 0."""
    video = torch.stack(
        torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij"), dim=-1
    ).reshape(-1, 3)
    audio = torch.stack([torch.full((steps,), -1), torch.arange(steps), torch.zeros(steps, dtype=torch.int64)], 1)
    return nn.functional.pad(torch.cat([video, audio]).float(), (0, 1)).expand(2, -1, -1)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_tokens_stand_where_their_cells_are(patch: int) -> None:
    rows, columns = 4 // patch, 8 // patch
    grids = on_grid(marked(3, rows, columns, 7), LATENTS)
    assert grids["video"].shape == (2, 4, 3, rows, columns) and grids["audio"].shape == (2, 4, 7)
    assert grids["video"][1, :3, 2, rows - 1, 1].tolist() == [2, rows - 1, 1]
    assert grids["audio"][0, :2, 5].tolist() == [-1, 5]


def test_tokens_come_joint_by_name_or_first_of_several() -> None:
    joint = marked(3, 2, 4, 7)
    apart = {"video": joint[:, :24], "audio": joint[:, 24:]}
    for output in (joint, apart, (apart, {"keys": None}), (joint, None)):
        grids = on_grid(output, LATENTS)
        assert torch.equal(grids["video"].flatten(2).transpose(1, 2), joint[:, :24])
        assert torch.equal(grids["audio"].transpose(1, 2), joint[:, 24:])
    alone = on_grid(joint[:, 24:], LATENTS.only("audio"))
    assert torch.equal(alone["audio"].transpose(1, 2), joint[:, 24:])
    assert on_grid(joint[:, :24], LATENTS.only("video")).modalities == ("video",)


def test_tokens_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="23 video tokens do not form 3 frames of square patches of 4 x 8 cells"):
        on_grid({"video": torch.zeros(2, 23, 4)}, LATENTS.only("video"))
    with pytest.raises(ShapeError, match="6 audio tokens do not fit 7 latent steps"):
        on_grid({"audio": torch.zeros(2, 6, 4)}, LATENTS.only("audio"))


def small() -> tuple[UnifiedDiT, AV[torch.Tensor]]:
    text = ByteTextConfig(width=16, depth=1, num_heads=2)
    config = UnifiedDiTConfig(width=32, depth=2, num_heads=2, rank=8, text=text, text_inner=16)
    torch.manual_seed(0)
    video, audio = (config.geometry[name].channels for name in ("video", "audio"))
    return config.build(), AV(torch.randn(2, video, 3, 4, 8), torch.randn(2, audio, 7))


def test_a_changed_cell_changes_its_own_token() -> None:
    """What the transformer is asked at frame 2, rows 2-3, columns 4-5 is its token (2, 1, 2)."""
    module, x_t = small()
    t = x_t.map(lambda _: torch.full((2,), 0.5))
    other = x_t["video"].clone()
    other[:, :, 2, 3, 4] += 1.0
    seen = []
    for video in (x_t["video"], other):
        with torch.no_grad(), tap(module, ["embed.video", "embed.audio"]) as features:
            module(x_t.replace(video=video), t, Conditions())
        seen.append(on_grid({name: features[f"embed.{name}"] for name in x_t.modalities}, x_t))
    changed = (seen[0]["video"] != seen[1]["video"]).any(1)[0]
    assert changed.nonzero().tolist() == [[2, 1, 2]]
    assert torch.equal(seen[0]["audio"], seen[1]["audio"])


@pytest.mark.parametrize("model", ["unified_dit", "wan", "twin"])
def test_heads_fit_every_backbone(model: str) -> None:
    """Joint tokens, the tokens of one modality, and tokens by name."""
    torch.manual_seed(0)
    wan = WanConfig(width=24, hidden=32, depth=2, num_heads=2, in_channels=4, out_channels=4, text_width=8)
    audio = WanConfig(
        patch=(1,), width=24, hidden=32, depth=2, num_heads=2, in_channels=5, out_channels=5, text_width=8
    )
    module: nn.Module
    if model == "unified_dit":
        module, x_t = small()
        width = 32
    else:
        module = wan.build() if model == "wan" else TwinConfig(wan, audio).build()
        x_t = AV(torch.randn(2, 4, 3, 4, 8), None if model == "wan" else torch.randn(2, 5, 7))
        width = 24
    taps = ("blocks.0", "blocks.1")
    text = x_t.map(lambda _: torch.randn(2, 3, 8))
    t = x_t.map(lambda _: torch.full((2,), 0.5))
    cond = Conditions() if model == "unified_dit" else Conditions(text=text)
    with torch.no_grad(), tap(module, taps) as features:
        module(x_t, t, cond)
    heads = DiscriminatorConfig(taps, x_t.map(lambda _: width), hidden=8).build()
    logits = heads(features, x_t.map(lambda x: torch.ones(2, 1, *x.shape[2:])))
    assert {name: tuple(z.shape) for name, z in logits.items()} == {name: (2, 2) for name in x_t.modalities}
    torch.stack([z.sum() for z in logits.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


def test_a_logit_is_a_mean_over_its_region() -> None:
    torch.manual_seed(0)
    head = Head(4, 8, nn.Conv3d)
    x, whole = torch.randn(2, 4, 3, 4, 4), torch.ones(2, 1, 3, 4, 4)
    left = whole.clone()
    left[..., 2:] = 0
    both = head(x, torch.cat([left, whole - left], dim=1))
    torch.testing.assert_close(both.mean(1, keepdim=True), head(x, whole))
    torch.testing.assert_close(head(x, 7 * left), both[:, :1])
    nowhere = head(x, torch.zeros_like(whole))
    assert not nowhere.any()
    assert not any(g.any() for g in torch.autograd.grad(nowhere.sum(), list(head.parameters())))


def test_impossible_heads_are_refused() -> None:
    heads = DiscriminatorConfig(("blocks.0",), AV(video=4), hidden=4).build()
    assert isinstance(heads, Discriminator)
    weights = AV(torch.ones(2, 1, 3, 4, 8), torch.ones(2, 1, 7))
    with pytest.raises(ConfigError, match=r"DiscriminatorConfig.taps: 'blocks.0' is not one of"):
        heads({"block.0": marked(3, 2, 4, 7)}, weights)
    with pytest.raises(ConfigError, match="has video, the batch video, audio"):
        heads({"blocks.0": marked(3, 2, 4, 7)}, weights)
