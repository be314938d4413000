from fractions import Fraction

from soundstage.core import StreamGeometry


def test_steps_lengths_and_seconds() -> None:
    video = StreamGeometry(rate=Fraction(24000, 1001), stride=4, channels=16, causal_first=True)
    assert [video.steps(n) for n in (1, 2, 5, 6, 81)] == [1, 2, 2, 3, 21]
    assert all(video.steps(video.length(n)) == n for n in range(1, 30))
    assert video.seconds(3) == [float(Fraction(k, 2) * Fraction(1001, 24000)) for k in (1, 6, 14)]
    audio = StreamGeometry(rate=Fraction(16000), stride=1024, channels=20)
    assert [audio.steps(n) for n in (1, 1024, 1025)] == [1, 1, 2]
    assert audio.length(3) == 3072 and audio.seconds(2) == [0.032, 0.096]
