"""Progress: a bar on a terminal, few plain lines otherwise, never on stdout."""

import io

import pytest

from soundstage.cli import progress as module
from soundstage.cli.progress import progress


def test_off_a_terminal_the_last_line_counts_and_stdout_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sampling", 3) as advance:
        advance()
        advance.reach(3, note="loss 0.3")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "sampling: 3/3 in 0.0 s, loss 0.3\n"


def test_lines_are_spaced_in_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 6.0, 7.0, 9.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("rendering") as advance:
        for _ in range(3):
            advance()
    assert capsys.readouterr().err.splitlines() == ["rendering: 2 in 6.0 s", "rendering: 3 in 9.0 s"]


def test_an_error_inside_is_not_swallowed_and_writes_no_closing_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress("sampling", 3):
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with progress("sampling", 4) as advance:
        advance(4)
    assert "sampling" in stream.getvalue()
    assert "4/4" in stream.getvalue()
