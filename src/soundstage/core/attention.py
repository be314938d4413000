"""Parts of a backbone that carry no weights and can be exchanged after it is built, whichever backbone it is.

`Attend`: the attention kernel, and the exchange of heads for tokens between processes. `Tokens`: the split of a
sequence over processes. `Memo`: what is computed once per clip, not per step. `Precise`: the precision of norms.
A backbone holds them as submodules; whoever accelerates it finds them by their class and sets their fields.

Shape letters: B batch, L query tokens, S key tokens, N heads, K head width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from soundstage.core.errors import ConfigError, one_of

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, L, N, K), (B, S, N, K), (B, S, N, K) -> (B, L, N, K): softmax(q k / sqrt(K)) v over all keys."""
Reads = Callable[[Kernel, Tensor, Tensor, Tensor], Tensor]
"""Who reads whom, where not all read all: what a kernel is asked of whole queries, keys and values; as Kernel."""
Lengths = tuple[int, ...] | None
"""Real tokens of each sample, as numbers so that no kernel waits for the device; None = all of them."""


def sdpa(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    """PyTorch's own kernels, the fastest that it has for this device and type."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cudnn(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    """cuDNN's fused kernel through PyTorch (Hopper and newer)."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q_BLNK, k_BSNK, v_BSNK)


def _cudnn() -> Kernel:
    _need_cuda("cudnn")
    return cudnn


def _flash3() -> Kernel:
    _need_cuda("flash3")
    run = _imported("flash3", "flash_attn_interface").flash_attn_func

    def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = run(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return flash3


def _sage() -> Kernel:
    _need_cuda("sage")
    run = _imported("sage", "sageattention").sageattn
    return lambda q, k, v: run(q, k, v, tensor_layout="NHD", is_causal=False)


KERNELS: Mapping[str, Callable[[], Kernel]] = {"sdpa": lambda: sdpa, "cudnn": _cudnn, "flash3": _flash3, "sage": _sage}


def kernel(name: str) -> Kernel:
    """The attention kernel of that name; raises ConfigError for another name or one that cannot run here."""
    if name not in KERNELS:
        raise one_of("attention", name, KERNELS)
    return KERNELS[name]()


def kernels() -> dict[str, str]:
    """Each kernel's name and why it cannot run here, or "" where it can."""
    found = {}
    for name in KERNELS:
        try:
            kernel(name)
            found[name] = ""
        except ConfigError as error:
            found[name] = str(error)
    return found


def _need_cuda(name: str) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(f"attention: {name} needs a CUDA device and there is none; use sdpa")


def _imported(name: str, package: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"attention: {name} needs the package {package} ({error}); install it, or use sdpa") from None


class Attend(nn.Module):
    """Softmax attention by an exchangeable kernel, over one process or several (Ulysses, arXiv:2309.14509).

    kernel: a name in KERNELS, set by `use`. group: processes that hold a part of the tokens each; they exchange tokens
    for heads before the kernel and back after it, so the number of heads must be a multiple of theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernel = "sdpa"
        self.run: Kernel = sdpa
        self.group: Any = None

    def use(self, name: str) -> None:
        """Take another kernel; raises ConfigError when it cannot run here."""
        self.run, self.kernel = kernel(name), name

    def forward(
        self,
        q_BLNK: Tensor,
        k_BSNK: Tensor,
        v_BSNK: Tensor,
        lengths: Lengths = None,
        *,
        shared: bool = False,
        reads: Reads | None = None,
    ) -> Tensor:
        """(B, L, N, K) in the type of v. lengths: real keys of each sample, over all processes; None = all.

        shared: keys and values are whole on every process (text) and are not exchanged; this process takes its heads.
        reads: sees the real tokens of all processes, in samples of one size; None = all read all.
        """
        q, k, v = q_BLNK.to(v_BSNK.dtype), k_BSNK.to(v_BSNK.dtype), v_BSNK
        if self.group is None:
            return self._run(q, k, v, lengths, reads)
        size, rank = torch.distributed.get_world_size(self.group), torch.distributed.get_rank(self.group)
        q = exchange(q, self.group, scatter=2, gather=1)
        if shared:
            k, v = (x.chunk(size, dim=2)[rank] for x in (k, v))
        else:
            k, v = (exchange(x, self.group, scatter=2, gather=1) for x in (k, v))
        return exchange(self._run(q, k, v, lengths, reads), self.group, scatter=1, gather=2)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, reads: Reads | None) -> Tensor:
        if lengths is None or len(set(lengths)) == 1:
            real = k.shape[1] if lengths is None else lengths[0]
            k, v = k[:, :real], v[:, :real]
            return self.run(q, k, v) if reads is None else reads(self.run, q, k, v)
        parts = [self.run(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n]) for i, n in enumerate(lengths)]
        return torch.cat(parts)


def exchange(x: Tensor, group: Any, *, scatter: int, gather: int) -> Tensor:  # noqa: ANN401
    """All-to-all: dimension `scatter` is split over the processes and `gather` is joined from them; differentiable."""
    from torch.distributed import _functional_collectives as collectives

    size = torch.distributed.get_world_size(group)
    if x.shape[scatter] % size:
        raise ConfigError(f"context parallel: {x.shape[scatter]} cannot be split over {size} processes; use fewer")
    sent = torch.stack(x.chunk(size, dim=scatter)).contiguous()
    received = collectives.all_to_all_single(sent, None, None, group)
    return torch.cat(received.unbind(0), dim=gather)


class Tokens(nn.Module):
    """A sequence split over the processes of `group`, in order; without a group, the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.group: Any = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    def padded(self, length: int) -> int:
        """`length` rounded up to a multiple of the number of processes."""
        return -(-length // self.size) * self.size

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's part of x, which every process holds whole; zeros are put behind it to make parts equal."""
        if self.group is None:
            return x
        missing = self.padded(x.shape[dim]) - x.shape[dim]
        if missing:
            pad = x.new_zeros([missing if axis == dim % x.ndim else n for axis, n in enumerate(x.shape)])
            x = torch.cat([x, pad], dim=dim)
        return x.chunk(self.size, dim=dim)[torch.distributed.get_rank(self.group)]

    def gather(self, x: Tensor, length: int, dim: int = 1) -> Tensor:
        """The whole of x, cut to `length`, from every process's part; differentiable."""
        if self.group is None:
            return x
        from torch.distributed import _functional_collectives as collectives

        return collectives.all_gather_single(x.contiguous(), dim % x.ndim, self.group).narrow(dim, 0, length)


class Memo(nn.Module):
    """Values computed once for the same tensors, such as a text's keys and values, where `enabled`.

    A value is kept with the tensors it came from and given back for the very same tensors, unchanged since; the last
    `room` are kept. Off by default, and off wherever gradients are recorded: a memo never changes a result.
    """

    def __init__(self, room: int = 2) -> None:
        super().__init__()
        self.enabled = False
        self.room = room
        self._kept: list[tuple[list[Tensor], list[int], Any]] = []

    def __call__(self, tensors: list[Tensor], compute: Callable[[], Any]) -> Any:  # noqa: ANN401
        """`compute()`, or its value of an earlier call with these tensors."""
        if not self.enabled or torch.is_grad_enabled():
            return compute()
        versions = [0 if x.is_inference() else x._version for x in tensors]
        for kept, at, value in self._kept:
            same = len(kept) == len(tensors) and all(a is b for a, b in zip(kept, tensors, strict=True))
            if same and at == versions:
                return value
        value = compute()
        self._kept = [*self._kept[max(0, len(self._kept) + 1 - self.room) :], (list(tensors), versions, value)]
        return value

    def forget(self) -> None:
        """Drop every kept value."""
        self._kept = []


class Precise(nn.Module):
    """The precision in which norms, modulation and rotary positions are computed: float32, or the type they come in."""

    def __init__(self) -> None:
        super().__init__()
        self.fp32 = True

    def forward(self, x: Tensor) -> Tensor:
        return x.float() if self.fp32 else x
