"""`soundstage generate`: a sentence, and media to go by, to clips with sound."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from soundstage.inference.generator import Generated
    from soundstage.media.clip import Clip

MOST_CLIPS = 10_000
SURE = 0.5  # confidence from which an offset between onsets and motion is told


def command(
    prompt: Annotated[str | None, typer.Argument(help="What is to be seen and heard.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write: mp4, webm, gif, wav ...; several clips are numbered.")
    ] = Path("clip.mp4"),
    image: Annotated[Path | None, typer.Option(help="First frame of the picture.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Sound to make a picture for (or a clip with a sound track).")] = (
        None
    ),
    video: Annotated[Path | None, typer.Option(help="Clip to make a sound for, or to extend, inpaint or edit.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="t2av, t2v, t2a, i2av, a2v, v2a, extension, inpaint, edit; default by what is given."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt per line.")] = None,
    num: Annotated[int, typer.Option(help="Clips per prompt, with seeds one apart.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same clip.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; default the model's.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="euler, heun, unipc, dpmpp_2m, renoise or streamed; default the model's.")
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(help="How closely to follow the prompt: one scale, or VIDEO,AUDIO; 1 is none.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance leads away from; default the model's.")] = None,
    negative_audio: Annotated[str | None, typer.Option(help="The same for the sound alone.")] = None,
    skip_layer: Annotated[
        int | None, typer.Option(help="Block left out of the negative prediction, -1 for none; default the model's.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds; default the model's own length.")] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH such as 704x1280, or an aspect such as 16:9; default the image's.")
    ] = None,
    strength: Annotated[
        str | None, typer.Option(help="How much an edit makes anew, 0 to 1: one number, or VIDEO,AUDIO.")
    ] = None,
    range_: Annotated[
        list[str] | None, typer.Option("--range", help="Seconds to inpaint, START:END; may be repeated.")
    ] = None,
    sheet: Annotated[
        bool, typer.Option("--sheet", help="Also write a .png of frames over the waveform beside each clip.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Name or folder of a model (soundstage models list); default world-tiny.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder with a published model's own files (soundstage models fetch).")
    ] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(
            help="Switches, comma-separated: int8 or fp8, offload, compile, attention=NAME, together, apart, "
            "tiles=N, bf16-norms, no-text-memo."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default cuda where present.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per clip and line, for programs.")] = False,
) -> None:
    """Make a clip with its own sound from a sentence, and print how far sound and picture are apart.

    \b
    Examples:
      soundstage generate "a small red metal ball bounces three times" -o ball.mp4
      soundstage generate "drums" --num 4 --seed 7 --steps 20 --sheet -o drums.mp4
      soundstage generate "a blue ball bounces" --image first.png -o ball.mp4
      soundstage generate "a glass ball bounces" --video silent.mp4 -o with-sound.mp4
      soundstage generate "a face says ah oo" --audio voice.wav -o face.mp4
      soundstage generate "a red ball bounces" --video ball.mp4 --task inpaint --range 0.5:1.0
      soundstage generate --prompts prompts.txt --json -o clips/clip.mp4
      soundstage generate "A man says <S>hello<E>. Audio: calm voice" --model ovi --weights ovi --size 16:9
      soundstage generate "waves on a shore" --model wan2.2-5b --weights wan --accelerate offload,int8
    """
    sentences = _sentences(prompt, prompts, given=any((image, audio, video)))
    wanted = _wanted(sentences, num, seed)
    _check_format(out)
    request: dict[str, Any] = {
        "task": task,
        "image": image,
        "audio": audio,
        "video": video,
        "steps": steps,
        "sampler": sampler,
        "guidance": _pair("guidance", guidance),
        "negative": (negative, negative if negative_audio is None else negative_audio),
        "skip_layer": skip_layer,
        "duration": duration,
        "size": size,
        "strength": _pair("strength", strength),
        "ranges": [_range(text) for text in range_ or []],
    }
    loaded = {"model": model, "weights": weights, "accelerate": accelerate}
    told = {"negative": negative, "negative_audio": negative_audio, "skip_layer": skip_layer, "size": size}
    given = {"image": image, "audio": audio, "video": video, **loaded, **told}
    made = _made(wanted, request, device, **loaded)
    for path, generated in zip(_paths(out, len(wanted)), made, strict=False):  # nothing on a second process
        generated.record["command"] = _command(generated, given)
        path.parent.mkdir(parents=True, exist_ok=True)
        generated.save(path)
        if sheet:
            _write_sheet(generated.clip, path.with_suffix(".png"), generated.prompt)
        _show(path, generated, as_json)


def _sentences(prompt: str | None, path: Path | None, *, given: bool) -> list[str]:
    from soundstage.core.errors import RequestError

    if path is None:
        if prompt is None and not given:
            raise RequestError('nothing to make: give a sentence ("a red ball bounces twice") or --prompts FILE')
        return [prompt or ""]
    if prompt is not None:
        raise RequestError(f"a sentence and --prompts {path} are both given: leave one out")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise RequestError(f"{path}: is not a text file; write one prompt per line") from None
    found = [line for line in lines if line]
    if not 0 < len(found) <= MOST_CLIPS:
        raise RequestError(f"{path}: holds {len(found)} prompts; write one per line, at most {MOST_CLIPS}")
    return found


def _wanted(sentences: list[str], num: int, seed: int) -> list[tuple[str, int]]:
    """(prompt, seed) of every clip."""
    from soundstage.core.errors import RequestError

    if not 1 <= num <= MOST_CLIPS // len(sentences):
        raise RequestError(f"num: {num} is not from 1 to {MOST_CLIPS // len(sentences)}")
    return [(sentence, seed + k) for sentence in sentences for k in range(num)]


def _check_format(out: Path) -> None:
    from soundstage.core.errors import RequestError
    from soundstage.media.encode import FORMATS

    if out.suffix.lower() not in FORMATS:
        known = ", ".join(suffix for suffix in FORMATS if suffix)
        raise RequestError(f"out: {out.name!r} is not one of {known}; choose one of these endings")


def _pair(name: str, text: str | None) -> float | tuple[float, ...] | None:
    from soundstage.core.errors import RequestError

    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"{name}: {text!r} is not a number or VIDEO,AUDIO, such as 4 or 4,3") from None
    return values[0] if len(values) == 1 else values


def _range(text: str) -> tuple[float, float]:
    from soundstage.core.errors import RequestError

    start, _, end = text.partition(":")
    try:
        window = float(start), float(end)
    except ValueError:
        window = (0.0, 0.0)
    if not 0 <= window[0] < window[1]:
        raise RequestError(f"range: {text!r} is not START:END in seconds, such as 0.5:1.0")
    return window


def _made(
    wanted: list[tuple[str, int]],
    request: dict[str, Any],
    device: str | None,
    model: str | None,
    weights: Path | None,
    accelerate: str | None,
) -> Iterator[Generated]:
    """Each clip as soon as it is done; under torchrun the processes share the work and the first has the clips."""
    from soundstage.cli.progress import progress
    from soundstage.core.parallel import init_from_env, leave
    from soundstage.inference.accelerate import Switches
    from soundstage.inference.generator import Generator

    switches = Switches.parse(accelerate or "")
    group, rank, here = init_from_env(device)
    try:
        generator = Generator.load(model, here, weights=weights, switches=switches, group=group)
        with progress("generating", 100) if rank == 0 else nullcontext() as advance:
            for made in generator.stream(
                [prompt for prompt, _ in wanted],
                seed=[seed for _, seed in wanted],
                on_step=lambda done, total: advance and advance.reach(100 * done // total),
                **request,
            ):
                if rank == 0:
                    yield made
    finally:
        leave()


def _paths(out: Path, count: int) -> list[Path]:
    """The file itself for one clip; NAME-01.mp4, NAME-02.mp4 ... for several."""
    if count == 1:
        return [out]
    width = max(2, len(str(count)))
    return [out.with_name(f"{out.stem}-{i:0{width}d}{out.suffix}") for i in range(1, count + 1)]


def _command(generated: Generated, given: dict[str, Any]) -> str:
    """The command line that makes this very clip again."""
    record = generated.record
    words = ["soundstage", "generate", generated.prompt, "--task", generated.task, "--seed", str(generated.seed)]
    words += ["--steps", str(record["steps"]), "--sampler", str(record["sampler"])]
    words += ["--guidance", _joined(record["guidance"]), "--duration", str(record["duration"])]
    if "strength" in record:
        words += ["--strength", _joined(record["strength"])]
    for start, end in record.get("ranges", ()):
        words += ["--range", f"{start:g}:{end:g}"]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    return shlex.join(words)


def _joined(pair: dict[str, float]) -> str:
    return ",".join(f"{value:g}" for value in pair.values())


def _write_sheet(clip: Clip, path: Path, title: str) -> None:
    from soundstage.core.errors import MissingExtra
    from soundstage.world.show import contact_sheet

    try:
        contact_sheet(clip, path, title=title)
    except ImportError:
        raise MissingExtra("pillow", "media") from None


def _show(path: Path, generated: Generated, as_json: bool) -> None:
    found = measure(generated.clip, generated.prompt)
    clip = generated.clip
    if as_json:
        typer.echo(json.dumps({"path": str(path), "seconds": round(clip.duration, 4), **found, **generated.record}))
        return
    if "offset_ms" in found:
        sync = f"sync {found['offset_ms']:+.1f} ms (median of {found['events']})"
    elif "lag_ms" in found:
        sync = f"sync {found['lag_ms']:+.1f} ms (lag of the sound behind the motion)"
    else:
        sync = "sync: no events found"
    typer.echo(f"{path}  {clip.duration:.2f} s  {sync}")


def measure(clip: Clip, prompt: str) -> dict[str, float]:
    """{"offset_ms", "events"} of sound against picture, {"lag_ms"} where both go on and on, or nothing.

    What the prompt says is a thing of the world is read by its oracle, anything else by onsets and motion.
    """
    from soundstage.media.sync import clip_offset
    from soundstage.world import parse
    from soundstage.world.oracle import observe
    from soundstage.world.oracle.score import align

    if clip.frames is None or clip.wave is None:
        return {}
    kind = parse(prompt).get("kind")
    if kind is None:
        found = clip_offset(clip)
        sure = found.confidence > SURE and found.matched > 0
        return {"offset_ms": round(found.ms, 3), "events": found.matched} if sure else {}
    seen = observe(clip, str(kind))
    found = align(seen)
    if len(found.offsets):
        return {"offset_ms": round(1000 * found.median, 3), "events": len(found.offsets)}
    return {} if seen.lag is None else {"lag_ms": round(1000 * seen.lag, 3)}
