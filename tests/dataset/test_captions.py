"""Captions by a service that speaks the OpenAI protocol over real HTTP, and by a tiny random model of transformers."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.captions import Caption, pictures
from soundstage.data.flow import Item, Transient
from soundstage.media.encode import write
from soundstage.world.render import render, stream_item


class Service(ThreadingHTTPServer):
    """Answers as told and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict, str | None]] = []
        self.answer: tuple[int, dict[str, str], object] = (200, {}, {})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body, self.headers.get("authorization")))
        status, headers, told = self.server.answer
        content = json.dumps(told).encode()
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def item(tmp_path: Path) -> Item:
    scene, _ = stream_item(1, 0, kinds=["bounce"])
    return Item({"media": write(render(scene, size=64).clip, tmp_path / "b.mp4")}, {"span": [0.5, 1.5]})


def said(text: object) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_the_service_is_shown_frames_and_its_words_become_the_caption(
    service: Service, item: Item, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setenv("SOME_KEY", "secret")
    service.answer = (200, {}, said(" A red ball\n bounces. "))
    stage = Caption("vlm", url=f"http://127.0.0.1:{service.server_port}/v1", key="SOME_KEY", images=3, side=32)
    (out,) = stage(item, tmp_path)
    assert (out.facts["caption"], out.facts["captioned_by"]) == ("A red ball bounces.", "vlm")
    ((path, body, key),) = service.asked
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer secret", "vlm", 0)
    text, *shown = body["messages"][0]["content"]
    assert text["text"] == stage.prompt
    sizes = [Image.open(io.BytesIO(base64.b64decode(s["image_url"]["url"].partition(",")[2]))).size for s in shown]
    assert sizes == [(32, 32)] * 3


@pytest.mark.parametrize(
    ("answer", "facts"),
    [
        (
            "A piano\nis played.\nCategory: Music\nTags: piano, Hands, piano, room, chair",
            {"caption": "A piano is played.", "category": "music", "tags": ["piano", "hands", "room"]},
        ),
        ("A dog.\n**Category:** animals.", {"caption": "A dog.", "category": "other", "tags": []}),
        ("Note: a dog.", {"caption": "Note: a dog.", "category": "other", "tags": []}),
    ],
)
def test_tags_and_a_category_are_asked_for_in_the_same_call(
    service: Service, item: Item, tmp_path: Path, answer: str, facts: dict
) -> None:
    service.answer = (200, {}, said(answer))
    url = f"http://127.0.0.1:{service.server_port}/v1"
    stage = Caption("vlm", url=url, tags=3, categories=("music", "speech"), images=1, side=32)
    (out,) = stage(item, tmp_path)
    assert {name: out.facts[name] for name in facts} == facts
    assert "one of: music, speech." in service.asked[0][1]["messages"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    ("answer", "error", "after"),
    [
        ((429, {"retry-after": "7"}, {}), Transient, 7.0),
        ((503, {}, {}), Transient, None),
        ((200, {}, said("")), Transient, None),
        ((200, {}, {"choices": []}), Transient, None),
        ((401, {}, {"error": "no such key"}), ConfigError, None),
    ],
)
def test_a_busy_service_is_asked_again_and_a_refusal_is_told(
    service: Service, item: Item, tmp_path: Path, answer: tuple, error: type, after: float | None
) -> None:
    service.answer = answer
    with pytest.raises(error) as caught:
        list(Caption("vlm", url=f"http://127.0.0.1:{service.server_port}/v1", images=1, side=32)(item, tmp_path))
    assert getattr(caught.value, "after", None) == after


def test_an_absent_service_is_transient(item: Item, tmp_path: Path) -> None:
    with pytest.raises(Transient):
        list(Caption("vlm", url="http://127.0.0.1:9/v1", images=1, side=32)(item, tmp_path))


def test_pictures_are_spread_over_the_span(item: Item) -> None:
    shown = pictures(item, 5, 32)
    assert [image.shape for image in shown] == [(32, 32, 3)] * 5
    with pytest.raises(ConfigError, match="http"):
        Caption("vlm", url="ftp://there")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_captions(item: Item, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[DEC]",
        "[ENC]",
        "a",
        "ball",
        "drum",
        "bounces",
        "red",
        "of",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokens = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(words), "encoder_hidden_size": 16, "bos_token_id": 5, "sep_token_id": 3}
    config = transformers.BlipConfig(
        text_config=text | {"pad_token_id": 0, "eos_token_id": 3},
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    folder = tmp_path / "blip"
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.BlipProcessor(transformers.BlipImageProcessor(size=size), tokens).save_pretrained(folder)
    (out,) = Caption(str(folder), images=2, side=32, max_tokens=5)(item, tmp_path)
    assert out.facts["caption"]
    assert set(out.facts["caption"].split()) <= set(words)
