"""Ovi's prompts checked and converted; the picture sizes that Ovi and Wan make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soundstage.core.errors import Caution, ConfigError, RequestError
from soundstage.models.ovi_forms import (
    FORMS,
    RECOMMENDED,
    VARIANTS,
    Sizes,
    SizeWarning,
    check_prompt,
    dims_from_area,
    file_name,
    first_frame,
    of_image,
    scale_to_area16,
    snap,
    text_for_image_model,
    to_form,
)

SCENE = "A man at a desk says, <S>We start now.<E> Rain on the window. "
GOOD = {"audcap": f"{SCENE}<AUDCAP>Soft rain.<ENDAUDCAP>", "audio": f"{SCENE}Audio: Soft rain."}


@pytest.mark.parametrize("form", FORMS)
def test_a_good_prompt_has_nothing_to_say(form: str) -> None:
    assert check_prompt(GOOD[form], form) == (GOOD[form], ())
    assert check_prompt("", form) == ("", ())


@pytest.mark.parametrize(("form", "other"), [("audcap", "audio"), ("audio", "audcap")])
def test_the_other_form_is_converted_with_one_warning(form: str, other: str) -> None:
    converted, told = check_prompt(GOOD[other], form)
    assert converted == GOOD[form]
    assert told == (
        f"the sound was described as `{FORMS[other]}`; this model reads `{FORMS[form]}`, so it was rewritten",
    )


SOUND = "Audio: rain"


@pytest.mark.parametrize(
    ("prompt", "warning"),
    [
        (f"<S>hello {SOUND}", "<S> is not closed: put <E> where its text ends"),
        (f"hello<E> {SOUND}", "<E> closes nothing: put <S> where its text begins"),
        (f"<E>hello<S> {SOUND}", "<E> closes nothing: put <S> where its text begins"),
        (f"<S>one <S>two<E> {SOUND}", "<S> opens inside <S>: close that one with <E> before"),
        (f"<S> <E> {SOUND}", "<S><E> holds no words: write what is said between them, or leave both out"),
        (f"<S>hello</S> {SOUND}", "</S> is no tag of this model: write <E>"),
        (f"<s>hello<E> {SOUND}", "<s> is no tag of this model: write <S>"),
        ("<S>hi<E> <AUDCAP>rain", "<AUDCAP> is not closed: put <ENDAUDCAP> where its text ends"),
        ("<AUDCAP>rain</AUDCAP>", "</AUDCAP> is no tag of this model: write <ENDAUDCAP>"),
        ("<S>hi<E> a street", "the sound is not described: add `Audio: ...` at the end, with voices, noises and music"),
        ("A street. Audio: ", "the description of the sound is empty: say in `Audio: ...` what is heard"),
        (f'She says "come here" softly. {SOUND}', "if it is to be spoken, write <S>come here<E>"),
        (f"He says \u201cwe start\u201d. {SOUND}", "if it is to be spoken, write <S>we start<E>"),
        ("<AUDCAP>rain<ENDAUDCAP> A street.", "put the description last"),
        ("A street. Audio: rain, then <S>hi<E>", "speech after `Audio:` counts as its description"),
    ],
)
def test_what_may_disappoint_names_its_fix(prompt: str, warning: str) -> None:
    told = check_prompt(prompt, "audio")[1]
    assert any(warning in sentence for sentence in told), told
    assert len(told) == len(set(told))


def test_only_what_is_wrong_is_told() -> None:
    assert check_prompt(f"It's his 'own' 5\" pipe. {SOUND}", "audio")[1] == ()
    assert check_prompt(f'A sign reads "open". <S>Hi.<E> {SOUND}', "audio")[1] == ()
    assert len(check_prompt("<S>hi</S> a street", "audio")[1]) == 2
    with pytest.raises(ConfigError, match="'audiocap' is not one of audcap, audio; did you mean 'audcap'"):
        to_form("a", "audiocap")


@given(st.lists(st.sampled_from(["<S>", "<E>", "<AUDCAP>", "<ENDAUDCAP>", "Audio:", "a b", "\n", " "]), max_size=12))
def test_any_prompt_is_checked(parts: list[str]) -> None:
    prompt = "".join(parts)
    for form in FORMS:
        converted, told = check_prompt(prompt, form)
        assert converted == to_form(prompt, form)
        assert all(sentence and "\n\n" not in sentence for sentence in told)
    assert not set("<>") & set(file_name(prompt))
    assert text_for_image_model(prompt) == text_for_image_model(prompt).strip()


def test_variants_have_the_lengths_of_their_clips() -> None:
    assert [(v.frames, v.samples) for v in VARIANTS.values()] == [(121, 80_384), (121, 80_384), (241, 160_768)]
    for name, sizes in RECOMMENDED.items():
        rule = Sizes(VARIANTS[name].area, 32, sizes)
        for size in sizes:
            rule.check(*size)
            assert rule.near(*size) == size


@pytest.mark.parametrize(
    ("size", "multiple", "nearest"),
    [((700, 1280), 32, "704x1280"), ((720, 720), 32, "704x704"), ((480, 836), 16, "480x832"), ((0, 5), 32, "32x32")],
)
def test_an_impossible_size_names_the_nearest(size: tuple[int, int], multiple: int, nearest: str) -> None:
    with pytest.raises(RequestError) as caught:
        Sizes(921_600, multiple).check(*size)
    assert str(caught.value) == (
        f"size: {size[0]}x{size[1]} is not a multiple of {multiple}; the nearest possible is {nearest}"
    )


def test_a_size_far_from_the_models_warns() -> None:
    assert issubclass(SizeWarning, Caution)
    small = VARIANTS["720x720_5s"]
    sizes = Sizes(small.area, recommended=RECOMMENDED[small.name])
    with pytest.warns(
        SizeWarning, match=r"704x1280 has 1\.74 times the 518400 pixels .* nearest recommended is 512x960"
    ):
        sizes.check(704, 1280)
    with pytest.warns(SizeWarning, match="nearest recommended is 992x512"):
        sizes.check(320, 160)
    with pytest.warns(SizeWarning, match="nearest recommended is 544x960"):
        Sizes(small.area).check(704, 1248)
    sizes.check(704, 736)


def test_an_aspect_is_width_to_height() -> None:
    sizes = Sizes(518_400)
    assert sizes.of_aspect("16:9") == (512, 960)
    assert sizes.of_aspect(" 9 : 16 ") == (960, 512)
    assert Sizes(399_360, 16).of_aspect("16:9") == (464, 832)
    assert dims_from_area("16:9", 518_400) == (960, 512)
    for wrong in ("16-9", "0:9", "wide", "16:9:4", ""):
        with pytest.raises(RequestError, match='is not two whole numbers such as "16:9"'):
            sizes.of_aspect(wrong)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([16, 32]), st.sampled_from([518_400, 921_600]))
def test_sizes_are_multiples_near_the_area(height: int, width: int, multiple: int, area: int) -> None:
    sizes = Sizes(area, multiple)
    for made in (snap(height, width, area, multiple), of_image(height, width, area, multiple)):
        assert not made[0] % multiple
        assert not made[1] % multiple
        assert min(made) >= multiple
    if max(height, width) <= 3 * min(height, width):
        made = sizes.of_image(height, width)
        assert abs(made[0] * made[1] / area - 1) < 0.1
        assert abs(made[1] / made[0] * height / width - 1) < 0.2
        sizes.check(*made)


def test_a_size_needs_pixels() -> None:
    for function in (lambda: snap(0, 5, 1000), lambda: of_image(5, 0, 1000), lambda: scale_to_area16(-1, 2)):
        with pytest.raises(RequestError, match="has no pixels"):
            function()


def test_a_first_frame_keeps_its_values() -> None:
    frame = np.arange(96 * 64 * 3, dtype=np.uint8).reshape(96, 64, 3)
    frame.flags.writeable = False
    made = Sizes(6144).image(frame, (96, 64))
    assert made.shape == (1, 3, 1, 96, 64)
    torch.testing.assert_close(made[0, :, 0], torch.tensor(frame / 127.5 - 1).permute(2, 0, 1).float())
    flat = Sizes(6144).image(np.full((10, 7, 3), 255, np.uint8), (64, 32))
    torch.testing.assert_close(flat, torch.ones(1, 3, 1, 64, 32))
    assert first_frame(frame, 6144).shape == (1, 3, 96, 64)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))):
        with pytest.raises(RequestError, match=r"is not \(H, W, 3\) of uint8; give one picture in RGB"):
            Sizes(6144).image(wrong, (32, 32))
