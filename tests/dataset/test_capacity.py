"""The planner's formulas against published figures, and a proposal's claims worked through."""

import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.capacity import DAY, Data, Fleet, Tower, cores_days, example, training, video_tokens

SEED = Tower(2048, 24, 8192, text=512, text_width=4096)


def test_the_forward_pass_of_ovi_is_its_published_one() -> None:
    """270 TFLOP for 720x720, 121 frames, both towers (their 75 to 83 s for 100 calls are 33 to 36 % of an H100)."""
    video = Tower(3072, 30, 14336, 512, 4096, other=157, other_width=3072).forward(15693)
    audio = Tower(3072, 30, 14336, 512, 4096, other=15693, other_width=3072).forward(157)
    assert (video + audio) / 1e12 == pytest.approx(270, rel=0.01)
    assert 100 * (video + audio) / 79 / 989e12 == pytest.approx(0.345, abs=0.02)


def test_tokens_of_a_clip() -> None:
    assert video_tokens(121, 704, 1280, 8, 32, 1) == 14080  # LTX-2
    assert video_tokens(121, 704, 704) == 31 * 22 * 22  # Ovi
    with pytest.raises(ConfigError, match="use 121"):
        video_tokens(120, 704, 704)


@pytest.mark.parametrize(("tokens", "tflop"), [(16 * 1024, 101.6), (80 * 1024, 1560)])
def test_the_seeds_samples_cost_what_was_checked(tokens: int, tflop: float) -> None:
    assert SEED.forward(tokens) / 1e12 == pytest.approx(tflop, rel=0.01)


def test_days_and_money() -> None:
    fleet = Fleet(128, peak=312.0, share=0.4, price=1.0)
    assert fleet.days(training(1560e12) * 78e6) == pytest.approx(353, rel=0.01)
    assert fleet.cost(84) == pytest.approx(258_048)
    assert Data(30e6, 10, mbps=12, kept=1.0).bytes == pytest.approx(450e12)
    assert Data(1, 8e9, mbps=1e3, kept=1.0).download(10) * DAY == pytest.approx(8e8)
    tried = cores_days(Data(3e6, 4, kept=0.5), 10, {"scan": 3.0, "pack": 30.0})
    assert tried["scan"] * DAY == pytest.approx(2e5)
    assert tried["pack"] * DAY == pytest.approx(1e4)


def test_every_claim_of_the_example_is_answered_with_its_figure() -> None:
    found = {claim.said: claim.found for claim in example()}
    assert "2.68 TFLOP for one frame" in found["400 TFLOP a sample"]
    assert "18 days" in found["78 M samples in 18 days on 128 A100"]
    assert "172 to 774 thousand" in found["option A for 200 to 400 thousand dollars"]
    assert "450 TB at 12 Mbps" in found["450 TB for 30 M clips of 10 s"]
    assert "9.3 days" in found["1 PB over 10 Gbps in 10 days"]


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"kept": 1.5}, {"mbps": -1}])
def test_what_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Data(**{"clips": 10, "seconds": 5, **wrong})
