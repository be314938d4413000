"""The switches: what they read, what they turn, what they refuse; and blocks compiled one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from soundstage.core.attention import Attend, Memo, Precise
from soundstage.core.av import AV
from soundstage.core.conditions import Conditions
from soundstage.core.errors import ConfigError
from soundstage.inference.accelerate import Switches, compile_blocks, forget
from soundstage.inference.offload import offloaded
from soundstage.inference.quantize import linear_layers
from soundstage.models.text.bytes import ByteTextConfig, tokenize
from soundstage.models.twin import Twin, TwinConfig
from soundstage.models.unified_dit import UnifiedDiT, UnifiedDiTConfig
from soundstage.models.wan import WanConfig

UNIFIED = UnifiedDiTConfig(width=32, depth=2, num_heads=2, rank=8, text=ByteTextConfig(16, 1, 2), text_inner=16)
TOWER = WanConfig(32, 64, 4, 3, in_channels=4, out_channels=4, frequencies=16, text_width=12, text_length=6)
TWIN = TwinConfig(TOWER, replace(TOWER, in_channels=3, out_channels=3, patch=(1,)))
T = torch.tensor([0.9])
FROM_TORCH = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(0.2 * torch.randn_like(parameter))
    return module.eval()


def twin() -> Twin:
    return randomised(TWIN.build())


def unified() -> UnifiedDiT:
    return randomised(UNIFIED.build())


def latents(video: int, audio: int) -> AV[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return AV(torch.randn(1, video, 3, 4, 4, generator=generator), torch.randn(1, audio, 5, generator=generator))


def told() -> Conditions:
    text = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(2))
    return Conditions(text=AV(text, text))


def same(a: AV[Tensor], b: AV[Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b.modalities)


def error(a: AV[Tensor], b: AV[Tensor]) -> float:
    return max(float((a[n].float() - b[n].float()).norm() / b[n].float().norm()) for n in b.modalities)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", Switches()),
        (" int8 , offload", Switches(weights="int8", offload=True)),
        ("fp8,compile,bf16-norms,no-text-memo", Switches("sdpa", "fp8", False, True, False, False)),
        ("attention=sage,apart,tiles=22", Switches(attention="sage", guidance="apart", tiles=22)),
        ("together,tiles=none", Switches(guidance="together", tiles=None)),
        ("tiles=auto,int8,int8", Switches(weights="int8")),
    ],
)
def test_a_list_of_words_is_read(text: str, wanted: Switches) -> None:
    assert Switches.parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ofload", "'ofload' is not one of .*; did you mean 'offload'"),
        ("no-memo", "did you mean 'no-text-memo'"),
        ("attention=sagee", "accelerate: attention: 'sagee' .*; did you mean 'sage'"),
        ("attention", "is not one of"),
        ("int8=1", "did you mean 'int8'"),
        ("tiles=0", "tiles=0 is not auto, none or a number"),
        ("tiles=a", "tiles=a is not auto, none or a number"),
        ("int8,fp8", "int8 and fp8 exclude each other"),
        ("together,offload,apart", "together and apart exclude each other"),
        ("fp32-norms,bf16-norms", "fp32-norms and bf16-norms exclude"),
        ("attention=sdpa,attention=cudnn", "attention=sdpa and attention=cudnn exclude"),
    ],
)
def test_a_wrong_word_names_the_near_one_and_contradictions_are_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Switches.parse(text)


@pytest.mark.parametrize(
    "fields", [{"attention": "flash"}, {"weights": "int4"}, {"guidance": "both"}, {"tiles": 0}, {"tiles": "all"}]
)
def test_a_wrong_field_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Switches(**fields)


def test_the_default_leaves_a_model_without_exchangeable_parts_as_it_is() -> None:
    x, cond = latents(32, 32), tokenize(["a red ball"])
    model = unified()
    wanted = model(x, AV(T, T), cond)
    applied = Switches().apply(model, torch.device("cpu"))
    assert applied is model
    assert same(model(x, AV(T, T), cond), wanted)
    assert Switches().report(model)["attention"]["parts"] == 0


def test_each_switch_turns_the_parts_of_its_class() -> None:
    model = twin()
    Switches().apply(model, "cpu")
    parts = [part for part in model.modules() if isinstance(part, Memo | Precise | Attend)]
    assert {part.enabled for part in parts if isinstance(part, Memo)} == {True}
    assert {part.fp32 for part in parts if isinstance(part, Precise)} == {True}
    assert {part.kernel for part in parts if isinstance(part, Attend)} == {"sdpa"}
    Switches.parse("no-text-memo,bf16-norms").apply(model, "cpu")
    assert {part.enabled for part in parts if isinstance(part, Memo)} == {False}
    assert {part.fp32 for part in parts if isinstance(part, Precise)} == {False}


def test_the_memo_of_the_text_changes_nothing_and_is_forgotten() -> None:
    x, cond, plain = latents(4, 3), told(), twin()
    model = Switches().apply(twin(), "cpu")
    for level in (0.9, 0.5):
        t = torch.tensor([level])
        assert same(model(x, AV(t, t), cond), plain(x, AV(t, t), cond))
    memos = [part for part in model.modules() if isinstance(part, Memo)]
    assert all(part._kept for part in memos)
    forget(model)
    assert not any(part._kept for part in memos)


def test_weights_are_quantised_before_they_are_offloaded() -> None:
    pytest.importorskip("torchao")
    x, cond = latents(4, 3), told()
    wanted = Switches.parse("int8").apply(twin(), "cpu")(x, AV(T, T), cond)
    switches = Switches.parse("int8,offload")
    model = switches.apply(twin(), "cpu")
    assert same(model(x, AV(T, T), cond), wanted)
    state = offloaded(model)
    assert state is not None
    assert state.most == 2
    assert error(wanted, twin()(x, AV(T, T), cond)) < 0.05
    report = json.loads(json.dumps(switches.report(model)))
    assert report["weights"]["quantised"] == 3 * 2 * 12
    saved = Switches().report(twin())["weights"]["bytes"] - report["weights"]["bytes"]
    assert 0.6 < saved / sum(layer.weight.nbytes for layer in linear_layers(twin())) < 0.75
    assert report["offload"]["blocks"] == 3
    assert report["text_memo"] == {"parts": 2, "on": 2}
    assert report["compile"] == {"blocks": 0, "of": 3}
    assert report["attention"]["kernels"]["sdpa"] == ""
    assert (report["guidance"], report["tiles"]) == ("auto", "auto")


def test_what_a_model_or_a_machine_has_not_is_told_before_anything_changes() -> None:
    with pytest.raises(ConfigError, match="attention: UnifiedDiT has its own attention"):
        Switches(attention="sage").apply(unified(), "cpu")
    for name in ("offload", "compile", "int8"):
        with pytest.raises(ConfigError, match="Linear has no blocks"):
            Switches.parse(name).apply(nn.Linear(2, 2), "cpu")
    with torch.device("meta"):
        empty = TWIN.build()
    with pytest.raises(ConfigError, match="load them first"):
        Switches(compile=True).apply(empty, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel may be there")
def test_a_kernel_that_cannot_run_here_says_why() -> None:
    model = twin()
    with pytest.raises(ConfigError, match="attention: flash3 needs a CUDA device and there is none; use sdpa"):
        Switches.parse("attention=flash3,int8").apply(model, "cpu")
    assert Switches().report(model)["weights"]["quantised"] == 0
    assert "needs a CUDA device" in Switches().report(model)["attention"]["kernels"]["sage"]


@pytest.mark.slow
@FROM_TORCH
def test_compiled_blocks_of_the_unified_trunk_are_equal_and_whole() -> None:
    torch.compiler.reset()
    counters.clear()
    x, cond, model = latents(32, 32), tokenize(["a red ball"]), unified()
    wanted, names = model(x, AV(T, T), cond), list(model.state_dict())
    compile_blocks(model)
    assert error(model(x, AV(T, T), cond), wanted) < 1e-5
    assert list(model.state_dict()) == names
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})


@pytest.mark.slow
@FROM_TORCH
def test_compiled_blocks_work_with_the_memo_offload_and_int8() -> None:
    pytest.importorskip("torchao")
    torch.compiler.reset()
    counters.clear()
    x, cond, plain = latents(4, 3), told(), twin()
    switches = Switches.parse("compile,offload,int8")
    Switches.parse("int8").apply(plain, "cpu")
    model = switches.apply(twin(), "cpu")
    for _ in range(2):
        assert error(model(x, AV(T, T), cond), plain(x, AV(T, T), cond)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2, "three blocks share one graph, with the text's keys one more"
    assert error(model.skipping([1])(x, AV(T, T), cond), plain.skipping([1])(x, AV(T, T), cond)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert switches.report(model)["compile"] == {"blocks": 3, "of": 3}
