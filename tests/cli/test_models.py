"""`soundstage models`: list, describe, fetch from a hub of our own on this machine, and check."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from soundstage.core.errors import ConfigError, WeightsError
from soundstage.models.fetch import Plan, download, prepare
from soundstage.models.published import Form, HubFile, Part, Published

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

Run = Callable[..., tuple[int, str, str]]
DATA = Path(__file__).parents[1] / "data"


class Hub:
    """A hub on this machine. files: "owner/name/path" -> bytes.

    cuts: path -> how many answers stop after `cut` bytes. hangs: paths whose answers then wait, until `go` is set.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, int] = {}
        self.cut = 1000
        self.hangs: set[str] = set()
        self.go = threading.Event()
        self.false: set[str] = set()
        self.huge: set[str] = set()
        self.log: list[tuple[str, str, int]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, body: bool) -> None:
                hub.answer(self, body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        name = request.path.lstrip("/").replace("/resolve/main", "", 1)
        if name not in self.files:
            known = any(file.split("/")[:2] == name.split("/")[:2] for file in self.files)
            request.send_response(404)
            request.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        whole = self.files[name]
        asked = request.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and body else 0
        self.log.append(("GET" if body else "HEAD", name.split("/", 2)[2], start))
        etag = hashlib.sha256(whole).hexdigest() if name.endswith((".safetensors", ".pt")) else str(len(whole))
        request.send_response(206 if start else 200)
        request.send_header("ETag", f'"{"0" * 64 if name in self.false else etag}"')
        request.send_header("X-Repo-Commit", "0" * 40)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(10**18 if name in self.huge else len(whole) - start))
        request.end_headers()
        if not body:
            return
        path = name.split("/", 2)[2]
        if path in self.hangs or self.cuts.get(path, 0) > 0:
            self.cuts[path] = self.cuts.get(path, 0) - 1
            request.wfile.write(whole[start : start + self.cut])
            request.wfile.flush()
            if path in self.hangs:
                self.go.wait(60)
            request.close_connection = True
            request.connection.shutdown(2)
            return
        request.wfile.write(whole[start:])

    def gets(self, path: str) -> list[int]:
        """Where each answer for a file began."""
        return [start for kind, name, start in self.log if (kind, name) == ("GET", path)]


@pytest.fixture
def hub() -> Iterator[Hub]:
    one = Hub()
    torch.manual_seed(0)
    tensors = {f"w{i}": torch.randn(600) for i in range(2)}
    shards = {f"w{i}": f"m-{i + 1:05d}-of-00002.safetensors" for i in range(2)}
    for name, shard in shards.items():
        one.files[f"who/tiny/{shard}"] = save({name: tensors[name]})
    one.files["who/tiny/m.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    one.files["who/words/ext/tokens.json"] = b"{}"
    yield one
    one.server.shutdown()
    one.server.server_close()


DENOISER = Part("denoiser", (Form(("m.safetensors.index.json",)),), (HubFile("who/tiny", "m.safetensors.index.json"),))
WORDS = Part("words", (Form(("tokens.json",)),), (HubFile("who/words", "ext/tokens.json", "Words"),), "CC-BY-NC-4.0")
TINY = Published("tiny", "Tiny", "soundstage.models.ovi:load_wan", (DENOISER, WORDS))


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, reached from this process, in which huggingface_hub has long read its environment."""
    point_to(hub.address, monkeypatch)
    yield hub
    huggingface_hub.close_session()


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("soundstage.models.fetch.WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()


def fetch(folder: Path, *roles: str) -> tuple[Plan, list[tuple[int, int, str]]]:
    """The plan, and what was told of the bytes."""
    seen: list[tuple[int, int, str]] = []
    plan = prepare(TINY, folder, roles)
    download(plan, lambda *at: seen.append(at))
    return plan, seen


def test_a_fetch_follows_the_index_lays_files_out_and_is_not_done_twice(online: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    plan, seen = fetch(folder)
    total = sum(map(len, online.files.values()))
    assert (plan.bytes, len(plan.wanted), plan.there) == (total, 4, ())
    assert seen[-1] == (total, total, "tokens.json")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        **{name.removeprefix("who/tiny/"): data for name, data in online.files.items() if name.startswith("who/tiny/")},
        "Words/ext/tokens.json": b"{}",
    }
    online.log.clear()
    plan, seen = fetch(folder)
    assert (plan.bytes, plan.wanted, len(plan.there), seen, online.log) == (0, (), 2, [], [])
    (folder / "m-00002-of-00002.safetensors").unlink()
    plan, _ = fetch(folder)
    assert [wanted.to.name for wanted in plan.wanted] == ["m-00002-of-00002.safetensors"]
    assert online.gets("m-00001-of-00002.safetensors") == []


def test_one_part_alone_is_fetched(online: Hub, tmp_path: Path) -> None:
    fetch(tmp_path / "weights", "words")
    assert [path.name for path in (tmp_path / "weights").rglob("*.*")] == ["tokens.json"]
    assert len(online.gets("ext/tokens.json")) == 1
    with pytest.raises(ConfigError, match=r"part: 'word' is not one of denoiser, words; did you mean 'words'\?"):
        prepare(TINY, tmp_path, ["word"])


def test_a_cut_connection_goes_on_where_it_stopped(online: Hub, tmp_path: Path) -> None:
    shard = "m-00001-of-00002.safetensors"
    online.cuts[shard] = 2
    fetch(tmp_path / "weights")
    assert online.gets(shard) == [0, 1000, 2000]
    assert (tmp_path / "weights" / shard).read_bytes() == online.files[f"who/tiny/{shard}"]


def test_a_connection_that_stays_cut_is_told_and_the_next_call_goes_on(online: Hub, tmp_path: Path) -> None:
    shard, folder = "m-00002-of-00002.safetensors", tmp_path / "weights"
    online.cuts[shard], online.cut = 1, 700
    online.hangs.clear()
    original, cut = online.answer, []

    def answer(request: BaseHTTPRequestHandler, body: bool) -> None:
        original(request, body)
        if body and request.path.endswith(shard) and not cut:
            cut.append(True)
            online.cuts[shard], online.cut = 1000, 0  # from now on not a byte more

    online.answer = answer  # type: ignore[method-assign]
    with pytest.raises(WeightsError, match=rf"be reached for {shard} of who/tiny .*run the same command to go on"):
        fetch(folder)
    assert online.gets(shard) == [0] + [700] * 5
    online.cuts.clear()
    online.log.clear()
    plan, seen = fetch(folder)
    assert online.gets(shard) == [700]
    assert seen[0] == (700, plan.bytes, shard)
    assert (folder / shard).read_bytes() == online.files[f"who/tiny/{shard}"]
    assert not list(folder.rglob("*.incomplete"))


def test_what_is_not_the_published_file_is_thrown_away(online: Hub, tmp_path: Path) -> None:
    online.false.add("who/tiny/m-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"m-00001-of-00002.safetensors: what arrived is not the published file"):
        fetch(tmp_path / "weights")
    assert not list((tmp_path / "weights").rglob("m-00001*"))


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(online: Hub, tmp_path: Path) -> None:
    online.huge.add("who/tiny/m-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"tiny needs 1000000000.0 GB more, and the disk has"):
        fetch(tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("who/tiny/m-00002-of-00002.safetensors", "who/tiny: holds no m-00002-of-00002.safetensors any more"),
        ("who/words/ext/tokens.json", "who/words: there is no such repository, or it asks for a login"),
    ],
)
def test_what_the_hub_does_not_have_is_told(gone: str, said: str, online: Hub, tmp_path: Path) -> None:
    del online.files[gone]
    with pytest.raises(WeightsError, match=said):
        fetch(tmp_path / "weights")


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_the_files_to_copy_are_named(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not offline:
        point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(WeightsError) as caught:
        fetch(tmp_path / "weights")
    huggingface_hub.close_session()
    said = str(caught.value)
    begin = "offline (HF_HUB_OFFLINE is set): unset it, or copy" if offline else "the hub cannot be reached for m.safe"
    assert said.startswith(begin)
    assert said.endswith(
        f"copy the files by hand: m.safetensors.index.json with its shards of who/tiny into {tmp_path / 'weights'}; "
        f"ext/tokens.json of who/words into {tmp_path / 'weights' / 'Words'}"
    )


def command(address: str | None, *args: object) -> tuple[list[str], dict[str, str]]:
    """A process of its own, which reads the environment anew; None: it is offline."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().startswith(("hf_", "http"))}
    hub = {"HF_ENDPOINT": address or "http://127.0.0.1:9", "HF_HUB_OFFLINE": str(int(address is None))}
    return [sys.executable, "-m", "soundstage", "models", *map(str, args)], kept | hub | {"NO_PROXY": "127.0.0.1"}


def vocoder() -> bytes:
    """best_netG.pt with every name and shape of the real one; each tensor repeats one number."""
    keys = json.loads((DATA / "ovi_full_size_keys.json").read_text(encoding="utf-8"))["bigvgan_16k"]
    buffer = BytesIO()
    torch.save({"generator": {name: torch.zeros(()).expand(shape) for name, shape in keys.items()}}, buffer)
    return buffer.getvalue()


VOCODER = "ext_weights/best_netG.pt"


@pytest.mark.slow
def test_a_killed_fetch_goes_on_in_the_next_run_and_is_checked(hub: Hub, tmp_path: Path) -> None:
    whole = hub.files[f"hkchengrex/MMAudio/{VOCODER}"] = vocoder()
    hub.hangs.add(VOCODER)
    folder = tmp_path / "ovi"
    args, environ = command(hub.address, "fetch", "ovi", folder, "--part", "vocoder", "--accept-licences")
    first = subprocess.Popen(args, env=environ, stderr=subprocess.DEVNULL)
    place = folder / "MMAudio" / "ext_weights"
    until = time.monotonic() + 60
    while not [part for part in place.glob("*.incomplete") if part.stat().st_size >= 1000]:
        assert first.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    first.kill()
    first.wait()
    hub.hangs.clear()
    hub.go.set()
    done = subprocess.run(args, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.gets(VOCODER) == [0, 1000]
    assert [path.name for path in place.iterdir()] == ["best_netG.pt"]
    assert (place / "best_netG.pt").read_bytes() == whole
    assert "vocoder: MMAudio/ext_weights/best_netG.pt, 668 tensors fit" in done.stdout
    assert "fetching, MB: " in done.stderr


def test_fetch_offline_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    args, environ = command(None, "fetch", "wan2.1-t2v-1.3b", tmp_path / "w")
    done = subprocess.run(args, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: offline (HF_HUB_OFFLINE is set): unset it, or copy the files by hand: ")
    assert "diffusion_pytorch_model.safetensors, models_t5_umt5-xxl-enc-bf16.pth" in done.stderr
    assert f"Wan2.1_VAE.pth of Wan-AI/Wan2.1-T2V-1.3B into {tmp_path / 'w'}\n" in done.stderr
    assert done.stderr.count("\n") == 1


def test_fetch_asks_for_the_licences_that_forbid_commercial_use(
    online: Hub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online.files[f"hkchengrex/MMAudio/{VOCODER}"] = vocoder()
    folder = tmp_path / "ovi"
    args = ("models", "fetch", "ovi", folder, "--part", "vocoder")
    for say in ("n\n", ""):
        monkeypatch.setattr("sys.stdin", StringIO(say))
        code, out, err = run(*args)
        assert (code, out.strip()) == (2, "")
        assert "vocoder: CC-BY-NC-4.0 (NON-COMMERCIAL use only), from hkchengrex/MMAudio" in err
        assert err.endswith(
            "error: licences: not accepted, nothing was fetched; read them and give --accept-licences\n"
        )
        assert not folder.exists()
    monkeypatch.setattr("sys.stdin", StringIO("y\n"))
    assert run(*args)[0] == 0
    assert (folder / "MMAudio" / VOCODER).is_file()
    online.log.clear()
    code, _, err = run(*args)  # all is there: neither a hub nor a question
    assert (code, err) == (0, f"there already: {folder / 'MMAudio' / VOCODER}\n")
    assert online.log == []


def test_list_tells_installed_and_published_with_their_licences(run: Run) -> None:
    code, out, _ = run("models", "list", "--json")
    told = {model["name"]: model for model in json.loads(out)}
    assert code == 0
    assert told["world-tiny"]["installed"]
    assert told["world-tiny"]["parameters"] == 5_977_170
    assert not told["ovi"]["installed"]
    assert told["ovi"]["licences"] == ["Apache-2.0", "CC-BY-NC-4.0"]
    assert {part["role"]: part["non_commercial"] for part in told["ovi"]["parts"]} == {
        "video+audio denoiser": False,
        "text encoder": False,
        "tokenizer": False,
        "video autoencoder": False,
        "sound autoencoder": True,
        "vocoder": True,
    }
    code, out, _ = run("models", "list")
    assert code == 0
    assert "world-tiny  6.0 M parameters" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "38.6 GB" in lines["ovi"]
    assert "NON-COMMERCIAL" in lines["ovi"]
    assert "NON-COMMERCIAL" not in lines["wan2.2-5b"]


def test_describe_shows_published_models_by_name_and_by_folder(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("models", "describe", "ovi-720x720-5s")
    assert code == 0
    assert "    Ovi/model.safetensors  from chetwinlow1/Ovi" in out.splitlines()
    assert "  vocoder: 0.4 GB, CC-BY-NC-4.0 (NON-COMMERCIAL use only)" in out.splitlines()
    assert out.splitlines()[-1] == "get it with: soundstage models fetch ovi-720x720-5s DIR"
    shapes = {"patch_embedding.weight": torch.zeros(1536, 16, 1, 2, 2), "head.modulation": torch.zeros(1)}
    save_file(shapes, tmp_path / "diffusion_pytorch_model.safetensors")
    code, out, _ = run("models", "describe", tmp_path, "--json")
    told = json.loads(out)
    assert (code, told["name"], told["folder"]) == (0, "wan2.1-t2v-1.3b", str(tmp_path))
    assert [part["found"] is not None for part in told["parts"]] == [True, False, False, False]
    assert "found: no" in run("models", "describe", tmp_path)[1]
    assert json.loads(run("models", "describe", "--json")[1])["name"] == "world-tiny"
    code, _, err = run("models", "describe", tmp_path / "absent")
    assert (code, err.count("\n")) == (2, 1)


def test_check_tells_each_part_and_exits_with_2_when_one_is_wrong(run: Run, tmp_path: Path) -> None:
    shapes = {"patch_embedding.weight": torch.zeros(1536, 16, 1, 2, 2), "head.modulation": torch.zeros(1)}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(shapes, path)
    code, out, err = run("models", "check", tmp_path, "--json")
    told = json.loads(out)
    assert (code, told["model"], told["whole"]) == (2, "wan2.1-t2v-1.3b", False)
    assert [part["state"] for part in told["parts"]] == ["other", "missing", "missing", "missing"]
    first = told["parts"][0]
    assert (first["loaded"], len(first["missing"])) == (1, 823)
    assert first["wrong_shape"] == [["head.modulation", [1], [1, 2, 1536]]]
    assert err.startswith(f"error: {path}: fits wan2.1-t2v-1.3b's video denoiser in part only, 1 of 825 tensors")
    code, out, err = run("models", "check", tmp_path)
    assert code == 2
    assert "video denoiser: diffusion_pytorch_model.safetensors, 1 tensors fit, 823 missing, 1 of wrong shape" in out
    assert err.count("`soundstage models fetch wan2.1-t2v-1.3b") == 3
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert json.loads(run("models", "check", tmp_path, "--json")[1])["parts"][0]["state"] == "damaged"
    code, _, err = run("models", "check", tmp_path, "--model", "wan2.2-5b")
    assert code == 2
    assert "this folder holds wan2.1-t2v-1.3b's files; of wan2.2-5b it lacks diffusion_pytorch_model" in err


def test_check_of_a_model_folder_of_ours_and_of_an_unknown_one(run: Run, tmp_path: Path) -> None:
    from soundstage.core.system import model_folder

    folder = model_folder("world-tiny")
    code, out, _ = run("models", "check", folder)
    assert (code, out) == (0, f"world-tiny: whole, 12.0 MB in {folder}\n")
    assert json.loads(run("models", "check", folder, "--json")[1])["whole"]
    code, _, err = run("models", "check", tmp_path)
    assert code == 2
    assert err.startswith(
        f"error: {tmp_path}: holds no model that is known by its files; say which with --model (ovi, "
    )
    code, _, err = run("models", "check", tmp_path / "absent")
    assert (code, err) == (
        2,
        f"error: {tmp_path / 'absent'}: there is no such folder; give the folder of a model's weights\n",
    )
    (tmp_path / "model.json").write_text('{"loader": "soundstage.models.system:load_system"}')
    (tmp_path / "a.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    code, _, err = run("models", "check", tmp_path)
    assert code == 2
    assert "a.safetensors: 1000 bytes" in err
