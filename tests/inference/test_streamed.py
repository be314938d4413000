"""A causal model makes its clips chunk after chunk, says so beside its weights, and others refuse to."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from soundstage.cli.app import main
from soundstage.core.av import AV
from soundstage.core.causal import Chunking, is_causal, stream
from soundstage.core.errors import ConfigError, RequestError, WeightsError
from soundstage.core.guidance import Guided
from soundstage.core.rng import Rng
from soundstage.core.schedule import explicit
from soundstage.core.system import DeferredCausal, Sampling, System, load_system
from soundstage.inference.generator import Generator
from soundstage.models.causal import CausalDiT
from soundstage.models.codecs.audio import AudioCodecConfig
from soundstage.models.codecs.pair import PairCodec
from soundstage.models.codecs.video import VideoCodecConfig
from soundstage.models.student import Student, beside, read_student, write_student
from soundstage.models.system import save_system
from soundstage.models.text.bytes import ByteTextConfig
from soundstage.models.unified_dit import UnifiedDiTConfig

TIMES = AV((1.0, 0.9, 0.0), (1.0, 0.9, 0.0))
CHUNKS = Chunking(Fraction(1, 2), 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of two steps, untrained."""
    torch.manual_seed(0)
    codec = PairCodec(
        AV(
            video=VideoCodecConfig(channels=4, detail=8, encoder_width=16, decoder_width=16).build(),
            audio=AudioCodecConfig(channels=6, encoder_width=16, decoder_width=16, vocoder_width=16).build(),
        )
    )
    plain = UnifiedDiTConfig(codec.geometry, 32, 1, 2, rank=8, text=ByteTextConfig(16, 1, 2), text_inner=16)
    config = plain.as_causal(CHUNKS)
    denoiser = config.build()
    for parameter in denoiser.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    sampling = Sampling("streamed", 2, times=TIMES, baked=AV(4.0, 3.0))
    return save_system(tmp_path_factory.mktemp("m") / "m", "small-streamed", config, denoiser, codec, sampling)


def test_a_model_folder_says_how_it_goes_through_a_clip(folder: Path) -> None:
    told = json.loads((folder / "model.json").read_text())
    assert told["causal"] == {"seconds": "1/2", "window": 2}
    system = load_system(folder)
    assert isinstance(system.denoiser, CausalDiT) and system.denoiser.config.chunking == CHUNKS
    assert system.sampling.sampler == "streamed"


def test_the_generator_makes_the_chunks_of_the_stream(folder: Path) -> None:
    system = load_system(folder)
    counted: list[tuple[int, int]] = []
    made = Generator(system).generate("x", on_step=lambda done, total: counted.append((done, total)))
    chunks = len(system.denoiser.chunks(system.shape.map(lambda shape: shape[1])))  # type: ignore[attr-defined]
    assert chunks == 4
    assert counted == [(i, 2 * chunks) for i in range(1, 2 * chunks + 1)]
    rng = Rng.of(0, 1)
    start = rng.fold("start").normal_like(system.shape.map(lambda shape: torch.empty(1, *shape)))
    with torch.no_grad():
        each = stream(system.denoiser, start, explicit(TIMES), system.encode_text(["x"]), rng=rng.fold("sampler"))
        whole = torch.cat([chunk["video"] for chunk in each], 2)
    assert torch.equal(made.latents["video"], whole[0])
    assert (made.record["sampler"], made.record["steps"]) == ("streamed", 2)


@pytest.mark.parametrize("task", ["t2a", "extension", "v2a"])
def test_other_tasks_are_streamed_too(folder: Path, task: str, saved: Path) -> None:
    inputs = {} if task == "t2a" else {"video": saved}
    assert Generator(load_system(folder)).generate("x", task=task, **inputs).clip.wave is not None


def test_a_model_of_whole_clips_cannot_be_streamed(
    folder: Path, make_system: Callable[..., System], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    generator = Generator(make_system(guidance=AV(1.0, 1.0)))
    with pytest.raises(RequestError, match="sampler: tiny reads whole clips and cannot be streamed; leave the sampler"):
        generator.generate("x", sampler="streamed")
    told = json.loads((folder / "model.json").read_text())
    other = tmp_path / "plain"
    other.mkdir()
    del told["causal"]
    (other / "model.json").write_text(json.dumps(told | {"name": "plain"}))
    (other / "model.safetensors").symlink_to(folder / "model.safetensors")
    out = tmp_path / "clip.mp4"
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a drum", "--model", str(other), "--device", "cpu", "-o", str(out)])
    assert stopped.value.code == 2
    assert "error: sampler: plain reads whole clips and cannot be streamed" in capsys.readouterr().err
    assert not out.exists()


def test_guidance_around_a_streamed_model_is_refused(folder: Path) -> None:
    system = load_system(folder)
    told = json.loads((folder / "model.json").read_text())
    assert told["sampling"]["guidance"] == {"video": 1.0, "audio": 1.0}
    open_system = System(**{**vars(system), "sampling": Sampling("streamed", 2)})
    with pytest.raises(RequestError, match="guidance: 3 is asked of a streamed clip, which remembers one prediction"):
        Generator(open_system).generate("x", guidance=3)
    guided = Guided(system.denoiser, system.encode_text([""]), AV(3.0, 3.0))
    assert not is_causal(guided)
    x = system.shape.map(lambda shape: torch.zeros(1, *shape))
    with pytest.raises(ConfigError, match="Guided reads whole clips and cannot go on from a cache"):
        next(stream(guided, x, explicit(TIMES), system.encode_text(["x"])))


def test_what_lies_beside_published_weights(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    sampling = Sampling("streamed", 2, times=TIMES)
    write_student(weights, Student("s", sampling, causal=CHUNKS))
    found = read_student(weights)
    assert found is not None and found.causal == CHUNKS and found.sampling.sampler == "streamed"
    write_student(weights, Student("s", sampling))
    found = read_student(weights)
    assert found is not None and found.causal is None and "causal" not in json.loads(beside(weights).read_text())
    beside(weights).write_text(json.dumps(json.loads(beside(weights).read_text()) | {"causal": {"seconds": "x"}}))
    with pytest.raises(WeightsError, match="does not describe a student"):
        read_student(weights)


@torch.no_grad()
def test_one_built_late_knows_its_chunks_before(folder: Path) -> None:
    network = load_system(folder).denoiser
    late = DeferredCausal(lambda: network, network.chunks)  # type: ignore[arg-type, attr-defined]
    assert is_causal(late) and len(late.chunks(AV(9, 33))) == 4 and not late.built
    x = AV(torch.zeros(1, 4, 3, 4, 4), torch.zeros(1, 6, 8))
    cond = load_system(folder).encode_text(["x"])
    first = next(stream(late, x, explicit(TIMES), cond, rng=Rng.of(0, 1)))
    assert late.built and torch.equal(
        first["video"], next(stream(network, x, explicit(TIMES), cond, rng=Rng.of(0, 1)))["video"]
    )
