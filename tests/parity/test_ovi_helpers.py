"""Prompt forms, text cleaning, file names, sizes and first frames against those recorded from the published code."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from soundstage.models import ovi_forms
from soundstage.models.text.umt5 import clean

STEM = "ovi_helpers"


def test_prompt_forms(vector: Any) -> None:  # noqa: ANN401
    for case in vector.info["prompt_format"]:
        for name, variant in ovi_forms.VARIANTS.items():
            assert ovi_forms.to_form(case["in"], variant.form) == case[name]
            assert ovi_forms.check_prompt(case["in"], variant.form)[0] == case[name]


@pytest.mark.parametrize(
    ("key", "function"),
    [
        ("clean_text_for_image_model", ovi_forms.text_for_image_model),
        ("filename", ovi_forms.file_name),
        ("text_cleaning_before_tokenizer", clean),
    ],
)
def test_texts(vector: Any, key: str, function: Any) -> None:  # noqa: ANN401
    cases = vector.info[key]
    assert [function(case["in"]) for case in cases] == [case["out"] for case in cases]


def sizes(vector: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:  # noqa: ANN401
    """(made, recorded) of every size in the file."""
    info = vector.info
    for case in info["snap_hw_to_multiple_of_32"]:
        yield ovi_forms.snap(case["h"], case["w"], case["area"]), tuple(case["out"])
    for case in info["calc_dims_from_area"]:
        yield ovi_forms.dims_from_area(case["aspect_h_w"], case["area"]), tuple(case["out_h_w"])
    for case in info["scale_hw_to_area_divisible_16"]:
        yield ovi_forms.scale_to_area16(case["h"], case["w"], case["area"]), tuple(case["out"])
    for case in info["first_frame_size"]:
        made = ovi_forms.of_image(case["image_h"], case["image_w"], case["area"])
        yield made, (case["out_h"], case["out_w"])


def test_sizes(vector: Any) -> None:  # noqa: ANN401
    made, recorded = zip(*sizes(vector), strict=True)
    assert made == recorded


def test_variants(vector: Any) -> None:  # noqa: ANN401
    told = vector.info["model_specs"]
    assert set(told) == set(ovi_forms.VARIANTS)
    for name, spec in told.items():
        variant = ovi_forms.VARIANTS[name]
        assert (variant.file, variant.area) == (spec["file"], spec["video_area"])
        assert (variant.video_latents, variant.audio_latents) == (
            spec["video_latent_length"],
            spec["audio_latent_length"],
        )


def test_first_frames(vector: Any) -> None:  # noqa: ANN401
    for case in vector.info["image_cases"]:
        image, recorded = (vector.tensors[f"{kind}.image{case['index']}"] for kind in ("in", "out"))
        for given in (image, image.numpy()):
            made = ovi_forms.first_frame(given, case["area"])
            assert list(made.shape[2:]) == case["out_hw"]
            torch.testing.assert_close(made, recorded, rtol=1e-4, atol=1e-4)
        again = ovi_forms.Sizes(case["area"]).image(image.numpy(), tuple(case["out_hw"]))
        torch.testing.assert_close(again[:, :, 0], recorded, rtol=1e-4, atol=1e-4)
