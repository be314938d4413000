"""The exchangeable parts of a backbone: the kernel, ragged keys, the memo, the split of one process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from soundstage.core.attention import KERNELS, Attend, Memo, Precise, Tokens, kernel, kernels
from soundstage.core.errors import ConfigError


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By the formula, (B, L, N, K)."""
    scores = torch.einsum("blnk,bsnk->bnls", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bnls,bsnk->blnk", scores.softmax(-1), v)


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 3, 8, generator=make)
    k, v = torch.randn(2, 2, 7, 3, 8, generator=make)
    return q, k, v


def test_attend_is_softmax_attention(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.testing.assert_close(Attend()(*qkv), softmax_attention(*qkv))


@pytest.mark.parametrize("lengths", [(7, 4), (1, 7), (4, 4)])
def test_keys_beyond_the_length_are_not_read(qkv: tuple[Tensor, Tensor, Tensor], lengths: tuple[int, int]) -> None:
    q, k, v = qkv
    out = Attend()(q, k, v, lengths)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(out[i : i + 1], softmax_attention(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n]))


def test_the_type_is_that_of_the_values(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    out = Attend()(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), softmax_attention(q, k, v), rtol=0.02, atol=0.02)


def test_kernels_that_cannot_run_say_why() -> None:
    told = kernels()
    assert set(told) == set(KERNELS)
    assert told["sdpa"] == ""
    if not torch.cuda.is_available():
        assert all("use sdpa" in told[name] for name in ("cudnn", "flash3", "sage"))
    with pytest.raises(ConfigError, match="did you mean 'sage'"):
        kernel("saage")
    attend = Attend()
    with pytest.raises(ConfigError):
        attend.use("none")
    assert attend.kernel == "sdpa"


def test_parts_hold_no_weights() -> None:
    for part in (Attend(), Tokens(), Memo(), Precise()):
        assert not part.state_dict()


def test_one_process_splits_nothing() -> None:
    tokens, x = Tokens(), torch.randn(2, 5, 4)
    assert tokens.size == 1
    assert tokens.padded(5) == 5
    assert tokens.split(x) is x
    assert tokens.gather(x, 5) is x


def test_a_memo_answers_for_the_same_unchanged_tensors_only() -> None:
    memo, calls = Memo(room=1), []
    a, b = torch.ones(2), torch.ones(2)

    def ask(x: Tensor) -> Tensor:
        return memo([x], lambda: calls.append(x) or x * 2)

    with torch.no_grad():
        ask(a), ask(a)
        assert len(calls) == 2  # off by default
        memo.enabled = True
        first = ask(a)
        assert ask(a) is first
        assert len(calls) == 3
        ask(b)
        assert len(calls) == 4  # equal, and not the same
        ask(a)
        assert len(calls) == 5  # there was room for one
        a.add_(1)
        assert torch.equal(ask(a), torch.full((2,), 4.0))
        memo.forget()
        ask(a)
        assert len(calls) == 7
    ask(a), ask(a)
    assert len(calls) == 9  # never while gradients are recorded


def test_precision_is_float32_or_as_it_comes() -> None:
    part, x = Precise(), torch.ones(2, dtype=torch.bfloat16)
    assert part(x).dtype == torch.float32
    part.fp32 = False
    assert part(x) is x
