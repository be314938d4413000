"""The page of a dataset: every item is counted, every measure that is judged is drawn, and clips are shown."""

from __future__ import annotations

import re
from pathlib import Path

from soundstage.data.flow import Flow
from soundstage.data.ledger import Ledger
from soundstage.data.report import write_report
from soundstage.data.runner import run
from soundstage.data.sources import parse
from soundstage.recipes import curate
from soundstage.world import render, stream_item


def test_a_page_shows_what_was_kept_and_what_was_not(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for index, kind in enumerate(("bounce", "bounce", "silent")):
        scene, caption = stream_item(11, index, kinds=(kind,))
        film = render(scene).clip.save(raw / f"{kind}{index}.mp4")
        film.with_suffix(".txt").write_text(f"{caption} <&>", encoding="utf-8")
    stages = dict(curate.small().stages)
    flow = Flow({name: stages[name] for name in ("licence", "scan", "shots", "gate")})
    seen = []
    with Ledger.open(tmp_path / "set") as ledger:
        ledger.add(parse(str(raw)))
        run(flow, ledger, workers=1)
        page = write_report(ledger, flow, tmp_path / "page.html", on_clip=lambda *now: seen.append(now))
    text = page.read_text(encoding="utf-8")
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert "<td>gate</td><td>3</td><td>2</td><td>1</td>" in text
    assert "kept: 2" in text and "rejected: 1" in text and "silent (" in text
    assert text.count("data:image/jpeg;base64,") == 3
    assert "&lt;&amp;&gt;" in text and "<&>" not in text
    assert re.search(r"<svg.*?class=limit.*?loudness", text, re.DOTALL)
    assert "http" not in text  # it needs no network


def test_an_empty_dataset_has_a_page_too(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "set") as ledger:
        page = write_report(ledger, curate.small(), tmp_path / "page.html")
    assert "Nothing was measured yet." in page.read_text(encoding="utf-8")
