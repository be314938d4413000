"""Offload: equal results, two blocks at most on the device, host weights untouched, whatever the order of blocks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.inference.offload import Offload, offload, offloaded
from soundstage.inference.quantize import quantize, stored_bytes
from soundstage.models.twin import TwinConfig
from soundstage.models.wan import WanConfig

TOWER = WanConfig(32, 64, 4, 3, in_channels=4, out_channels=4, frequencies=16, text_width=12, text_length=6)
CONFIG = TwinConfig(TOWER, replace(TOWER, in_channels=3, out_channels=3, patch=(1,)))


class Layer(nn.Module):
    """A residual layer that can be told to fail, and that records what its weights are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width))
        self.inner = nn.Linear(width, width)
        self.register_buffer("shift", torch.randn(width))
        self.fails = False
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.inner.weight.data_ptr())
        if self.fails:
            raise RuntimeError("asked to fail")
        return x + self.gate * torch.tanh(self.inner(x) + self.shift)


class Net(nn.Module):
    """Layers run in a given order."""

    def __init__(self, depth: int = 4, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor, order: list[int] | None = None) -> Tensor:
        for i in range(len(self.blocks)) if order is None else order:
            x = self.blocks[i](x)
        return self.head(x)


X = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def state(module: nn.Module) -> Offload:
    found = offloaded(module)
    assert found is not None
    return found


def buffers(size: int) -> int:
    """Living buffers of that many bytes."""
    kept = [x for x in gc.get_objects() if type(x) is Tensor and x.dtype == torch.uint8 and x.numel() == size]
    return len(kept)


@pytest.mark.parametrize("order", [None, [0, 2, 3], [3, 1, 0], [2, 2, 2], [0, 1]])
def test_any_order_of_blocks_gives_the_same_bits(order: list[int] | None) -> None:
    plain, module = Net(), offload(Net(), "cpu")
    for _ in range(2):
        assert torch.equal(module(X, order), plain(X, order))
    assert state(module).most <= 2
    state(module).release()
    assert not state(module)._copies


def test_skip_layer_guidance_on_a_twin_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    plain = CONFIG.build().eval()
    for parameter in plain.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    module = CONFIG.build().eval()
    module.load_state_dict(plain.state_dict())
    offload(module, "cpu")
    x, text, t = AV(torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 5)), torch.randn(1, 5, 12), torch.tensor([0.7])
    for _ in range(2):
        for blocks in ((), (1,), (2,)):
            told = (x, AV(t, t), Conditions(text=AV(text, text)))
            got, wanted = module.skipping(blocks)(*told), plain.skipping(blocks)(*told)
            assert all(torch.equal(a, b) for a, b in zip(got.values(), wanted.values(), strict=True))
    assert state(module).most == 2


def test_two_buffers_live_on_the_device_at_most() -> None:
    gc.collect()  # an earlier test's own may wait for it
    module = offload(Net(depth=5), "cpu")
    size = state(module).hosts[0].buffer.numel()
    assert buffers(size) == 5, "the host's own"
    living = []
    for block in module.blocks:
        block.inner.register_forward_hook(lambda *_: living.append(buffers(size) - 5))
    module(X)
    assert living == [2, 2, 2, 2, 1]
    assert buffers(size) == 5, "all are freed at the end"
    assert state(module).report() == {
        "blocks": 5,
        "host_bytes": 5 * size,
        "device_bytes": 2 * size,
        "device": "cpu",
        "pinned": False,
    }


def test_blocks_compute_on_copies_and_the_host_weights_stay() -> None:
    module = offload(Net(), "cpu")
    before = {name: (value.data_ptr(), value.clone()) for name, value in module.state_dict().items()}
    module(X)
    module(X, [3, 0])
    after = module.state_dict()
    assert list(after) == list(Net().state_dict())
    for name, (address, value) in before.items():
        assert after[name].data_ptr() == address
        assert torch.equal(after[name], value)
    for i, block in enumerate(module.blocks):
        assert before[f"blocks.{i}.inner.weight"][0] not in block.seen
        assert isinstance(block, Layer)


def test_new_values_in_the_host_weights_are_used() -> None:
    plain, module = Net(), offload(Net(), "cpu")
    for net in (plain, module):
        net.load_state_dict({name: value + 0.25 for name, value in net.state_dict().items()})
    assert torch.equal(module(X), plain(X))


def test_an_exception_in_a_block_leaves_everything_in_order() -> None:
    plain, module = Net(), offload(Net(), "cpu")
    module.blocks[1].fails = True
    with pytest.raises(RuntimeError, match="asked to fail"):
        module(X)
    module.blocks[1].fails = False
    assert torch.equal(module(X), plain(X))
    assert state(module).most == 2


def test_two_calls_in_turns_do_not_disturb_each_other() -> None:
    plain, module = Net(), offload(Net(), "cpu")
    x, y = X, -X
    for block in module.blocks:
        x, y = block(x), block(y)
    assert torch.equal(module.head(x), plain(X))
    assert torch.equal(module.head(y), plain(-X))
    assert state(module).most == 2


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_quantised_weights_are_moved_as_they_are(form: str) -> None:
    pytest.importorskip("torchao")
    plain, module = Net(), Net()
    quantize(plain, form)
    quantize(module, form)
    inside = sum(stored_bytes(block.inner.weight) for block in module.blocks)
    offload(module, "cpu")
    assert torch.equal(module(X), plain(X))
    assert type(module.blocks[0].inner.weight.data) is type(plain.blocks[0].inner.weight.data)
    bias = 4 * 32 * 4
    assert inside + bias <= state(module).host_bytes <= inside + bias + 4 * 4 * 256


def test_shared_weights_are_shared_with_care() -> None:
    def build() -> Net:
        net = Net()
        net.blocks[1].inner.weight = net.blocks[0].inner.weight
        net.blocks[3].inner = net.blocks[2].inner
        net.blocks.append(net.blocks[0])
        return net

    plain, module = build(), offload(build(), "cpu")
    assert torch.equal(module(X), plain(X))
    assert torch.equal(module(X, [4, 3, 2, 1, 0]), plain(X, [4, 3, 2, 1, 0]))


def test_blocks_without_submodules_are_offloaded_whole() -> None:
    module = nn.Module()
    module.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    wanted = [block(X[:, :8]) for block in module.blocks]
    offload(module, "cpu")
    assert all(torch.equal(block(X[:, :8]), y) for block, y in zip(module.blocks, wanted, strict=True))
    assert state(module).host_bytes == 3 * 512


def test_gradients_are_refused() -> None:
    module = offload(Net(), "cpu")
    with torch.enable_grad(), pytest.raises(ConfigError, match="run under torch"):
        module(X)
    module.requires_grad_(False)
    with torch.enable_grad():
        assert not module(X).requires_grad


def test_what_cannot_be_offloaded_is_told() -> None:
    with pytest.raises(ConfigError, match="offload: Linear has no blocks"):
        offload(nn.Linear(2, 2), "cpu")
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ConfigError, match="load them first"):
        offload(empty, "cpu")
    module = offload(Net(), "cpu")
    with pytest.raises(ConfigError, match="offloaded already"):
        offload(module, "cpu")
    with pytest.raises(ConfigError, match="cannot be moved or cast"):
        module.to(torch.bfloat16)
    module.load_state_dict({name: value.clone() for name, value in Net().state_dict().items()}, assign=True)
    with pytest.raises(ConfigError, match="replaced since"):
        module(X)


@pytest.mark.gpu
def test_a_cuda_device_gives_what_it_gives_without_offload() -> None:
    plain, module = Net(depth=6, width=1024).cuda(), Net(depth=6, width=1024)
    before = torch.cuda.memory_allocated()
    offload(module, "cuda")
    size = state(module).hosts[0].buffer.numel()
    torch.cuda.reset_peak_memory_stats()
    x = torch.randn(64, 1024, device="cuda")
    for _ in range(3):
        for order in (None, [0, 2, 3, 5], [4, 1]):
            assert torch.equal(module(x, order), plain(x, order))
    assert state(module).pinned
    assert torch.cuda.max_memory_allocated() - before < 2 * size + 2**24, "two blocks, the head and activations"
