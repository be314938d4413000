"""The generator: the same seed gives the same clip, given media come back unchanged, bad requests are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from soundstage.core.av import AV
from soundstage.core.errors import ConfigError, RequestError
from soundstage.core.system import System
from soundstage.inference.fitting import canvas, fit_frames, fit_wave
from soundstage.inference.generator import Generated, Generator, batch_size, read_record
from soundstage.media.clip import Clip
from soundstage.media.decode import read
from soundstage.media.errors import MediaError

Make = Callable[..., System]


def _same(a: Generated, b: Generated) -> None:
    for name, latents in a.latents.items():
        torch.testing.assert_close(latents, b.latents[name], rtol=0, atol=1e-5)
    if a.clip.frames is not None:
        assert np.abs(a.clip.frames.astype(int) - b.clip.frames.astype(int)).max() <= 1
    if a.clip.wave is not None:
        np.testing.assert_allclose(a.clip.wave, b.clip.wave, atol=1e-5)


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc", "dpmpp_2m", "renoise"])
def test_a_seed_gives_one_clip_alone_and_in_a_batch(make_system: Make, sampler: str) -> None:
    generator = Generator(make_system())
    prompts = ["a red ball", "a longer sentence about drums", "c"]
    together = generator.generate(prompts, seed=7, num=2, sampler=sampler)
    assert [(g.prompt, g.seed) for g in together] == [(p, s) for p in prompts for s in (7, 8)]
    for made in together:
        _same(made, generator.generate(made.prompt, seed=made.seed, sampler=sampler))
    in_fours = Generator(generator.system, batch=4).generate(prompts, seed=7, num=2, sampler=sampler)
    for made, other in zip(together, in_fours, strict=True):
        _same(made, other)
    assert not torch.allclose(together[0].latents["video"], together[1].latents["video"])
    assert not torch.allclose(together[0].latents["audio"], together[2].latents["audio"])


def test_one_seed_per_prompt(make_system: Make) -> None:
    generator = Generator(make_system())
    first, second = generator.generate(["a", "a"], seed=[3, 9])
    _same(first, generator.generate("a", seed=3))
    _same(second, generator.generate("a", seed=9))
    with pytest.raises(RequestError, match="1 seeds for 2 prompts"):
        generator.generate(["a", "b"], seed=[1])


@pytest.mark.parametrize("names", [("video", "audio"), ("video",), ("audio",)])
def test_the_same_code_makes_one_modality_or_both(make_system: Make, names: tuple[str, ...]) -> None:
    made = Generator(make_system(*names)).generate("x")
    assert made.latents.modalities == names
    assert (made.clip.frames is not None, made.clip.wave is not None) == ("video" in names, "audio" in names)
    assert made.clip.duration == pytest.approx(1.125)


def test_t2v_and_t2a_leave_the_other_modality_out(make_system: Make) -> None:
    generator = Generator(make_system())
    assert generator.generate("x", task="t2v").clip.wave is None
    assert generator.generate("x", task="t2a").clip.frames is None


def test_a_given_sound_is_kept(make_system: Make, clip: Clip) -> None:
    generator = Generator(make_system())
    made = generator.generate("x", audio=clip)
    to = canvas(generator.system)
    wave = torch.from_numpy(fit_wave(clip, to, to.num_samples))[None]
    assert torch.equal(made.latents["audio"], generator.system.codec.encode(AV(audio=wave))["audio"][0])
    assert made.task == "a2v"
    assert made.clip.sample_rate == 16000
    np.testing.assert_array_equal(made.clip.wave, clip.wave)
    assert made.clip.frames.shape == (9, 8, 8, 3)
    other = generator.generate("x", audio=replace(clip, wave=-clip.wave))
    assert not torch.allclose(made.latents["video"], other.latents["video"])


def test_a_given_picture_is_kept_at_its_own_size_and_rate(make_system: Make, clip: Clip) -> None:
    made = Generator(make_system()).generate("x", video=clip)
    assert made.task == "v2a"
    assert made.clip.fps == 12
    np.testing.assert_array_equal(made.clip.frames, clip.frames[:13])
    assert made.clip.wave.shape == (1, round(13 / 12 * 8000))
    assert made.clip.sample_rate == 8000


def test_the_shorter_of_given_and_generated_decides(make_system: Make, clip: Clip) -> None:
    generator = Generator(make_system())
    short = generator.generate("x", audio=replace(clip, wave=clip.wave[:, :8000]))
    assert short.clip.frames.shape[0] == 4
    assert short.clip.audio_duration == 0.5
    long = generator.generate("x", audio=replace(clip, wave=np.tile(clip.wave, 4)))
    assert long.clip.audio_duration == long.clip.video_duration == 1.125


def test_an_image_is_the_first_step(make_system: Make, clip: Clip) -> None:
    generator = Generator(make_system())
    to = canvas(generator.system)
    image = Clip(frames=clip.frames[:1], fps=clip.fps)
    made = generator.generate("x", image=image)
    pixels = torch.from_numpy(fit_frames(image, to, 1).transpose(3, 0, 1, 2)[None].copy()).float() / 127.5 - 1
    first = generator.system.codec.encode(AV(pixels))["video"][0, :, :1]
    assert torch.equal(made.latents["video"][:, :1], first)
    both = generator.generate("x", image=image, audio=clip)
    assert both.task == "a2v"
    assert torch.equal(both.latents["video"][:, :1], first)


def test_an_extension_goes_on_from_the_clip(make_system: Make, clip: Clip) -> None:
    generator = Generator(make_system())
    to = canvas(generator.system)
    made = generator.generate("x", video=clip, task="extension")
    own, sound = fit_frames(clip, to), fit_wave(clip, to)
    context = 3  # the longest clip on the grid 1 + 2 k within half of 9 frames
    assert len(made.clip.frames) == len(own) - context + 9
    np.testing.assert_array_equal(made.clip.frames[: len(own)], own)
    kept = (len(own) - context) * 1000 + 3000
    np.testing.assert_allclose(made.clip.wave[:, :kept], sound[:, :kept], atol=1e-6)
    assert made.clip.wave.shape[1] == len(made.clip.frames) * 1000
    silent = generator.generate("x", video=clip.without("audio"), task="extension")
    assert silent.clip.audio_duration == silent.clip.video_duration
    assert np.all(silent.clip.wave[:, : (len(own) - context) * 1000] == 0)


def test_inpainting_keeps_what_lies_outside(make_system: Make, clip: Clip) -> None:
    generator = Generator(make_system())
    to = canvas(generator.system)
    made = generator.generate("x", video=clip, task="inpaint", ranges=[(0.5, 0.6)])
    own = fit_frames(clip, to, 9)
    changed = [i for i in range(9) if not np.array_equal(made.clip.frames[i], own[i])]
    assert changed == [3, 4]  # the latent step of frames 3 and 4 is shown from 0.375 to 0.625 s
    difference = np.abs(made.clip.wave - fit_wave(clip, to, 9000))[0]
    assert difference[:4000].max() < 1e-6
    assert difference[5000:].max() < 1e-6
    assert difference[4100:4900].max() > 0.05
    with pytest.raises(RequestError, match="inpaint needs the seconds"):
        generator.generate("x", video=clip, task="inpaint")


def test_an_edit_moves_with_its_strength(make_system: Make, clip: Clip) -> None:
    generator = Generator(make_system(guidance=AV(1.0, 1.0)))
    kept = generator.generate("x", video=clip, task="edit", strength=(0.0, 0.5))
    to = canvas(generator.system)
    pixels = torch.from_numpy(fit_frames(clip, to, 9).transpose(3, 0, 1, 2)[None].copy()).float() / 127.5 - 1
    assert torch.equal(kept.latents["video"], generator.system.codec.encode(AV(pixels))["video"][0])
    new = generator.generate("x", task="edit", video=clip, strength=1.0)
    _same(new, generator.generate("x"))
    sound = torch.from_numpy(fit_wave(clip, to, 9000))[None]
    clean = generator.system.codec.encode(AV(audio=sound))["audio"][0]
    edits = [generator.generate("x", video=clip, task="edit", strength=s) for s in (0.0, 0.3, 1.0)]
    distances = [float((edit.latents["audio"] - clean).abs().mean()) for edit in edits]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_guidance_one_asks_the_network_once_a_step(make_system: Make) -> None:
    system = make_system()
    calls: list[int] = []
    system.denoiser.register_forward_hook(lambda *args: calls.append(args[1][0].batch))
    Generator(system).generate("x", guidance=1, steps=3)
    Generator(system).generate("x", guidance=(3, 1), steps=2)
    assert calls == [1, 1, 1, 2, 2]


def test_progress_counts_all_batches(make_system: Make) -> None:
    seen: list[tuple[int, int]] = []
    Generator(make_system(), batch=1).generate(["a", "b"], steps=2, on_step=lambda i, n: seen.append((i, n)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_files_can_be_given(make_system: Make, saved: Path, clip: Clip, tmp_path: Path) -> None:
    generator = Generator(make_system())
    assert generator.generate("x", video=saved).clip.frames.shape == (13, 12, 20, 3)
    assert generator.generate("x", audio=saved).clip.wave.shape[0] == 2
    image = Clip(frames=clip.frames[:1], fps=clip.fps).save(tmp_path / "image") / "000000.png"
    assert generator.generate("x", image=image).task == "i2av"
    assert len(generator.generate("x", video=saved, task="extension").clip.frames) == 15


def test_files_that_lack_what_the_task_needs(make_system: Make, saved: Path, clip: Clip, tmp_path: Path) -> None:
    generator = Generator(make_system())
    silent = clip.without("audio").save(tmp_path / "silent.mp4")
    sound = clip.without("video").save(tmp_path / "sound.wav")
    with pytest.raises(RequestError, match=r"silent\.mp4 has no sound track"):
        generator.generate("x", audio=silent)
    with pytest.raises(RequestError, match=r"sound\.wav has no picture"):
        generator.generate("x", video=sound)
    with pytest.raises(RequestError, match=r"sound\.wav has no picture"):
        generator.generate("x", image=sound)
    with pytest.raises(RequestError, match="the given audio has no sound track"):
        generator.generate("x", audio=clip.without("audio"))
    with pytest.raises(MediaError, match=r"nothing\.mp4"):
        generator.generate("x", video=tmp_path / "nothing.mp4")
    with pytest.raises(RequestError, match="audio: 1 files for 2 prompts"):
        generator.generate(["a", "b"], audio=[saved])
    with pytest.raises(RequestError, match="some of the given clips have sound"):
        generator.generate(["a", "b"], video=[clip, silent], task="edit")


def test_media_per_prompt(make_system: Make, clip: Clip) -> None:
    generator = Generator(make_system())
    other = replace(clip, wave=-clip.wave)
    first, second = generator.generate(["a", "b"], audio=[clip, other])
    _same(first, generator.generate("a", audio=clip))
    _same(second, generator.generate("b", audio=other))


def test_the_record_is_in_the_file(make_system: Make, tmp_path: Path) -> None:
    made = Generator(make_system()).generate('a "red" ball: naïve 球', seed=5, steps=2, guidance=3)
    for name in ("clip.mp4", "clip.webm"):
        record = read_record(read(made.save(tmp_path / name)).metadata)
        assert record == made.record
    assert record["prompt"] == 'a "red" ball: naïve 球'
    assert (record["seed"], record["steps"], record["model"]) == (5, 2, "tiny")
    assert record["guidance"] == {"video": 3, "audio": 3}
    assert read_record({"comment": "someone else's"}) == {}


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"steps": 0}, "steps: 0 is not from 1 to 1000"),
        ({"steps": -3}, "steps: -3 is not from 1"),
        ({"num": 0}, "num: 0 is not at least 1"),
        ({"sampler": "eular"}, "sampler: 'eular' is not one of .*; did you mean 'euler'"),
        ({"duration": 60}, "duration: 60 s is not above 0 and at most 4.5 s"),
        ({"duration": -1}, "duration: -1 s"),
        ({"guidance": -1}, "guidance: -1 for video is not from 0"),
        ({"guidance": (1, 2, 3)}, "guidance: .* is not one number or a pair"),
        ({"strength": 2}, "strength: 2 for video is not from 0 to 1"),
    ],
)
def test_bad_settings(make_system: Make, request_: dict[str, object], sentence: str) -> None:
    with pytest.raises((RequestError, ConfigError), match=sentence):
        Generator(make_system()).generate("x", **request_)


def test_a_duration_is_rounded_to_both_grids(make_system: Make) -> None:
    made = Generator(make_system()).generate("x", duration=2.0)
    assert made.clip.frames.shape[0] == 17
    assert made.clip.wave.shape[1] == 17000
    assert made.latents.map(lambda x: x.shape[1]).as_dict() == {"video": 9, "audio": 17}


def test_batches_are_bounded_by_memory(make_system: Make) -> None:
    to = canvas(make_system())
    assert batch_size(to, torch.device("cpu")) == 64
    assert batch_size(replace(to, num_frames=1000, size=(1080, 1920)), torch.device("cpu")) == 1
