import pytest

from soundstage.core import ConfigError, MissingExtra, SoundstageError
from soundstage.core.errors import one_of


def test_a_wrong_name_gets_the_allowed_set_and_the_near_one() -> None:
    error = one_of("sampler", "eulr", ["heun", "euler"])
    assert isinstance(error, ConfigError)
    assert str(error) == "sampler: 'eulr' is not one of euler, heun; did you mean 'euler'?"
    assert "did you mean" not in str(one_of("sampler", "xyz", ["heun"]))


def test_every_error_has_one_root_and_a_builtin_kind() -> None:
    with pytest.raises(SoundstageError, match=r'pip install "soundstage\[media\]"'):
        raise MissingExtra("av", "media")
    own = [kind for kind in SoundstageError.__subclasses__() if kind.__module__ == SoundstageError.__module__]
    assert len(own) >= 6
    assert all(issubclass(kind, (ValueError, ImportError)) and kind.__doc__ for kind in own)
