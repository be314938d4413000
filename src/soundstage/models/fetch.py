"""Published files from the hub into a folder, laid out as the models' own downloaders leave them.

    plan = prepare(published("ovi"), Path("weights"))     # asks the hub for sizes; nothing is written
    download(plan, on_bytes=lambda done, total: ...)      # the same call again goes on where it stopped

A file is written to NAME.ETAG.incomplete beside its place and renamed when it is whole, so a cut connection or a
stopped process costs nothing that has arrived. What lies there whole, in any layout, is not fetched again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from soundstage.core.errors import MissingExtra, SoundstageError, WeightsError, one_of
from soundstage.models.published import HubFile, Part, Published, files_below, search
from soundstage.models.weight_files import INDEX, PICKLED, check_whole
from soundstage.models.zoo import STEMS, WORDS

ATTEMPTS = 5
"""Cut connections in a row, without a byte between them, after which a download stops."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Answers of a server that another attempt may not meet."""
PATIENCE = 30.0
WAIT = 1.0


@dataclass(frozen=True)
class Wanted:
    """A file to fetch: where it comes from, where it goes, its size, and its hash where the hub tells it."""

    file: HubFile
    to: Path
    bytes: int
    etag: str

    @property
    def aside(self) -> Path:
        """Where its bytes gather."""
        return self.to.with_name(f"{self.to.name}.{re.sub(r'[^A-Za-z0-9]', '', self.etag)[:12]}.incomplete")

    @property
    def arrived(self) -> int:
        """Bytes that an earlier call has fetched."""
        return self.aside.stat().st_size if self.aside.is_file() else 0


@dataclass(frozen=True)
class Plan:
    """What `download` will do. wanted: files to fetch; there: files that lie in the folder already, whole."""

    model: Published
    folder: Path
    roles: tuple[str, ...]
    wanted: tuple[Wanted, ...]
    there: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the wanted files."""
        return sum(file.bytes for file in self.wanted)

    @property
    def arrived(self) -> int:
        """Bytes of them that an earlier call has fetched."""
        return sum(file.arrived for file in self.wanted)


def parts_of(model: Published, roles: Collection[str] = ()) -> tuple[Part, ...]:
    """The parts of these roles, all when none is given; "text-encoder" is "text encoder". Raises ConfigError."""
    known = {part.role: part for part in model.parts}
    asked = [role.replace("-", " ").replace("_", " ") for role in roles]
    for role in asked:
        if role not in known:
            raise one_of("part", role, known)
    return tuple(part for part in model.parts if not asked or part.role in asked)


def prepare(model: Published, folder: Path, roles: Collection[str] = ()) -> Plan:
    """Which files of these parts are to be fetched, with their sizes; those that lie there whole are not asked for.

    Raises WeightsError when the hub cannot be reached, a file is not there or not open to the user, or the disk is too
    small; ConfigError for an unknown part; MissingExtra without huggingface_hub.
    """
    present = files_below(folder) if folder.is_dir() else []
    wanted: list[Wanted] = []
    there: list[Path] = []
    files: list[HubFile] = []
    for part in parts_of(model, roles):
        found = search(part, present, STEMS)
        if found is not None and _complete(found.path):
            there.append(found.path)
        else:
            files += part.files
    while files:
        file = files.pop(0)
        to = folder / file.to
        if _whole(to):
            there.append(to)
            text = to.read_text(encoding="utf-8") if to.name.endswith(INDEX) else None
        else:
            with _told(model, folder, roles, file):
                wanted.append(_asked(file, to))
                text = _text(file) if to.name.endswith(INDEX) else None
        if text is not None:
            files[:0] = _shards(file, text)
    plan = Plan(model, folder, tuple(roles), tuple(wanted), tuple(there))
    _demand_space(plan)
    return plan


def download(plan: Plan, on_bytes: Callable[[int, int, str], None] | None = None) -> tuple[Path, ...]:
    """Fetch what a plan wants; on_bytes(done, total, file name) tells how far it is. Returns the files.

    Raises WeightsError when the connection stays cut, and OSError when the disk is full; the same call goes on later.
    """
    done = 0
    for wanted in plan.wanted:

        def tell(arrived: int, before: int = done, name: str = wanted.to.name) -> None:
            if on_bytes is not None:
                on_bytes(before + arrived, plan.bytes, name)

        with _told(plan.model, plan.folder, plan.roles, wanted.file):
            _fetch(wanted, tell)
        done += wanted.bytes
    return tuple(wanted.to for wanted in plan.wanted)


def by_hand(model: Published, folder: Path, roles: Collection[str] = ()) -> str:
    """Which files to copy from which repositories, for a machine without the hub."""
    told: dict[str, list[str]] = {}
    for part in parts_of(model, roles):
        for file in part.files:
            shards = " with its shards" if file.path.endswith(INDEX) else ""
            told.setdefault(f"{file.repo} into {folder / file.below}", []).append(file.path + shards)
    return "; ".join(f"{', '.join(names)} of {where}" for where, names in told.items())


def _fetch(wanted: Wanted, tell: Callable[[int], None]) -> None:
    """One file, going on where it stopped; an attempt that brings bytes starts the count of attempts anew."""
    wanted.to.parent.mkdir(parents=True, exist_ok=True)
    left = ATTEMPTS
    errors = _errors()
    while wanted.arrived < wanted.bytes or not wanted.aside.is_file():
        before = wanted.arrived
        try:
            _stream(wanted, tell)
        except errors.HTTPError as error:
            if isinstance(error, errors.HfHubHTTPError) and error.response.status_code not in PASSING:
                raise
            left = left - 1 if wanted.arrived == before else ATTEMPTS
            if left == 0:
                raise
            time.sleep(WAIT)
    if wanted.arrived != wanted.bytes or not _hash_fits(wanted):
        wanted.aside.unlink()
        raise WeightsError(f"{wanted.to}: what arrived is not the published file; run the same command again")
    wanted.aside.replace(wanted.to)


def _stream(wanted: Wanted, tell: Callable[[int], None]) -> None:
    hub = _hub()
    start = wanted.arrived
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    headers = hub.utils.build_hf_headers(headers=headers)
    url = hub.hf_hub_url(wanted.file.repo, wanted.file.path)
    session = hub.get_session()
    with session.stream("GET", url, headers=headers, timeout=PATIENCE, follow_redirects=True) as response:
        hub.utils.hf_raise_for_status(response)
        if start and response.status_code != 206:
            start = 0  # the server sends the whole file
        with wanted.aside.open("ab" if start else "wb") as file:
            tell(start)
            for piece in response.iter_bytes():
                file.write(piece)
                file.flush()  # so that a killed process leaves all that has arrived
                start += len(piece)
                tell(start)


def _asked(file: HubFile, to: Path) -> Wanted:
    """The size and hash of a file, from its headers."""
    hub = _hub()
    told = hub.get_hf_file_metadata(hub.hf_hub_url(file.repo, file.path), timeout=PATIENCE)
    if told.size is None or told.etag is None:
        raise WeightsError(f"{file.repo}: the hub does not tell the size of {file.path}; copy the file by hand to {to}")
    return Wanted(file, to, told.size, told.etag)


def _text(file: HubFile) -> str:
    hub = _hub()
    headers = hub.utils.build_hf_headers()
    response = hub.get_session().get(
        hub.hf_hub_url(file.repo, file.path), headers=headers, timeout=PATIENCE, follow_redirects=True
    )
    hub.utils.hf_raise_for_status(response)
    return response.text


def _shards(index: HubFile, text: str) -> list[HubFile]:
    """The shards that an index names, beside it."""
    try:
        names = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index.repo}: {index.path} is no index of shards; fetch it again later") from error
    if any(PurePosixPath(name).name != name for name in names):
        raise WeightsError(f"{index.repo}: {index.path} names files outside its folder; copy the shards by hand")
    return [replace(index, path=str(PurePosixPath(index.path).with_name(name)), bytes=None) for name in names]


def _complete(path: Path) -> bool:
    """A part that lies there whole: its weight files by their headers, the published files of a tokenizer by name."""
    return all((path / name).is_file() for name in WORDS) if path.is_dir() else _whole(path, True)


def _whole(path: Path, shards: bool = False) -> bool:
    """A weight file by its headers (shards: an index by them); any other file arrives by renaming, so it is whole."""
    if not path.is_file() or not path.stat().st_size:
        return False
    if path.suffix not in (".safetensors", *PICKLED) and not shards:
        return True
    try:
        check_whole(path)
    except WeightsError:
        return False
    return True


def _hash_fits(wanted: Wanted) -> bool:
    """Large files carry their SHA-256 as the tag; for the others the size must do."""
    if not re.fullmatch(r"[0-9a-f]{64}", wanted.etag):
        return True
    with wanted.aside.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wanted.etag


def _demand_space(plan: Plan) -> None:
    place = next(each for each in (plan.folder, *plan.folder.absolute().parents) if each.is_dir())
    need, free = plan.bytes - plan.arrived, shutil.disk_usage(place).free
    if need > free:
        raise WeightsError(
            f"{plan.folder}: {plan.model.name} needs {need / 1e9:.1f} GB more, and the disk has {free / 1e9:.1f} GB "
            "free; make room, or choose another disk"
        )


# The hub


def _hub() -> Any:  # noqa: ANN401
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "models") from error
    return huggingface_hub


def _errors() -> Any:  # noqa: ANN401
    _hub()
    from huggingface_hub import errors

    return errors


@contextmanager
def _told(model: Published, folder: Path, roles: Collection[str], file: HubFile) -> Iterator[None]:
    """Errors of the hub and the net as one sentence with its remedy."""
    errors = _errors()
    hand = f"copy the files by hand: {by_hand(model, folder, roles)}"
    try:
        yield
    except SoundstageError:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise WeightsError(f"offline (HF_HUB_OFFLINE is set): unset it, or {hand}") from error
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{file.repo}: asks for a login; accept its terms there, run `hf auth login`, try again"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise WeightsError(f"{file.repo}: there is no such repository, or it asks for a login; {hand}") from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{file.repo}: holds no {file.path} any more; {hand}") from error
    except errors.HTTPError as error:
        again = "run the same command to go on" if any(folder.rglob("*.incomplete")) else "try again"
        raise WeightsError(
            f"the hub cannot be reached for {file.path} of {file.repo} ({_reason(error)}); {again}, or {hand}"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
