from __future__ import annotations

import pytest
import torch

from soundstage.core.av import AV
from soundstage.core.batch import Batch
from soundstage.core.conditions import Conditions
from soundstage.core.rng import Rng
from soundstage.objectives.reconstruction import MultiResolutionSTFT, Reconstruction, Salient, absolute, change


def test_terms_are_named_by_measure_and_modality() -> None:
    media = AV(torch.zeros(2, 3, 4, 2, 2), torch.zeros(2, 1, 64))
    objective = Reconstruction((("media", "recon", absolute), ("media", "change", change)))

    def codec(x: AV[torch.Tensor]) -> dict[str, tuple[AV[torch.Tensor], AV[torch.Tensor]]]:
        return {"media": (x.map(lambda value: value + 0.5), x)}

    batch = Batch(media, Conditions(), ("a", "b"))
    terms = objective.loss("student", {"student": codec}, batch, Rng.of(0, 2))
    values = {name: float(term) for name, term in terms.items()}
    assert values == {"recon/video": 0.5, "recon/audio": 0.5, "change/video": 0.0, "change/audio": 0.0}
    assert objective.turn(0) == ("student",)


def test_change_sees_flicker_and_not_an_offset() -> None:
    true = torch.zeros(1, 1, 4, 1, 1)
    flicker = torch.tensor([0.0, 1.0, 0.0, 1.0]).reshape(1, 1, 4, 1, 1)
    assert float(change(flicker, true)) == 1.0
    assert float(change(true + 3, true)) == 0.0


def test_salient_weighs_what_moves() -> None:
    true = torch.zeros(1, 3, 2, 1, 2)
    true[:, :, 1, :, 0] = 2.0
    still, moving = true.clone(), true.clone()
    still[..., 1] += 1.0
    moving[..., 0] += 1.0
    measure = Salient(floor=0.1)
    # the weights are 1.1 on the moving cell and 0.1 on the still one
    assert float(measure(moving, true)) == pytest.approx(1.1 / 1.2)
    assert float(measure(still, true)) == pytest.approx(0.1 / 1.2)


def test_spectra_place_an_onset_and_ignore_the_sign() -> None:
    measure = MultiResolutionSTFT()
    click, late = torch.zeros(1, 1, 4096), torch.zeros(1, 1, 4096)
    click[..., 1000], late[..., 1400] = 1.0, 1.0
    assert float(measure(click, click)) == 0.0
    assert float(measure(-click, click)) == 0.0
    nearer = torch.zeros(1, 1, 4096)
    nearer[..., 1010] = 1.0
    assert 0.0 < float(measure(nearer, click)) < float(measure(late, click))
