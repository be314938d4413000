"""Prompts as bytes and words."""

from __future__ import annotations

import pytest
import torch

from soundstage.core.errors import RequestError
from soundstage.models.text.bytes import ByteText, ByteTextConfig, tokenize


def test_tokenize_pads_masks_and_folds_case() -> None:
    cond = tokenize(["A  Ball", "", "ab"])
    assert cond.text is not None
    assert cond.text_mask is not None
    assert cond.text["video"].tolist() == [list(b"a ball"), [0] * 6, [97, 98, 0, 0, 0, 0]]
    assert cond.text_mask["audio"].sum(1).tolist() == [6, 0, 2]


def test_a_prompt_too_long_names_the_limit() -> None:
    with pytest.raises(RequestError, match="161 bytes and the model reads 160"):
        tokenize(["x" * 161])


@torch.no_grad()
def test_words_are_pooled_apart_and_order_matters() -> None:
    torch.manual_seed(0)
    text = ByteText(ByteTextConfig(16, 1, 2, max_words=4)).eval()

    def read(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        cond = tokenize([prompt])
        assert cond.text is not None
        assert cond.text_mask is not None
        return text(cond.text["video"], cond.text_mask["video"])

    features, mask = read("red ball")
    assert features.shape == (1, 5, 16)
    assert mask.tolist() == [[True, True, True, False, False]]
    assert read("")[1].tolist() == [[True, False, False, False, False]]
    assert read("a b c d e f")[1].tolist() == [[True] * 5]
    for other in ("ball red", "der ball", "red bell"):
        assert float((read(other)[0][0, :3] - features[0, :3]).abs().max()) > 1e-3


@torch.no_grad()
def test_bytes_beyond_the_alphabet_share_its_last_place() -> None:
    text = ByteText(ByteTextConfig(16, 1, 2, alphabet=128)).eval()
    mask = torch.ones(1, 2, dtype=torch.bool)
    above, last, other = (text(torch.tensor([[97, value]]), mask)[0] for value in (200, 127, 98))
    assert torch.equal(above, last)
    assert not torch.equal(above, other)
