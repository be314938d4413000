"""Backward simulation: the sampler itself, cut at an exit whose call alone has a gradient."""

import pytest
import torch
from torch import Tensor

from soundstage.core import AV, Conditions, ConfigError, Known, Rng, noised, renoise, to_x0
from soundstage.objectives.base import Batch
from soundstage.objectives.rollout import Given, Rollout, warped
from soundstage.objectives.tasks import TASKS
from soundstage.testing.tiny import GaussianLatents, ToyConfig

SHAPE = AV((2, 4, 2, 2), (3, 6))
BOTH = ("video", "audio")


def data(size: int = 6, modalities: tuple[str, ...] = BOTH) -> Batch:
    drawn = GaussianLatents(shape=SHAPE.only(*modalities)).batch(0, size)
    return Batch(drawn.x0, Conditions(), drawn.ids)


def given(task: str = "t2av", size: int = 6, modalities: tuple[str, ...] = BOTH) -> Given:
    return Given.of(data(size, modalities), {task: 1.0}, Rng.of(7, size))


class Asked:
    """A denoiser that notes what it was asked, and whether gradients were on."""

    def __init__(self, denoiser: object) -> None:
        self.denoiser = denoiser
        self.calls: list[tuple[AV[Tensor], AV[Tensor], bool]] = []

    def __call__(self, x_t: AV[Tensor], t: AV[Tensor], cond: Conditions, *, r: AV[Tensor] | None = None) -> AV[Tensor]:
        self.calls.append((x_t, t, torch.is_grad_enabled()))
        return self.denoiser(x_t, t, cond, r=r)  # type: ignore[operator]


def student(modalities: tuple[str, ...] = BOTH) -> torch.nn.Module:
    torch.manual_seed(0)
    return ToyConfig(channels=AV(2, 3).only(*modalities)).build()


@pytest.mark.parametrize("modalities", [BOTH, ("video",), ("audio",)], ids="+".join)
def test_run_to_the_end_it_is_the_sampler_bit_for_bit(modalities: tuple[str, ...]) -> None:
    """The draws are the generator's: "start" for the noise, "sampler" for the steps."""
    network, rollout, rng, here = student(modalities), Rollout(), Rng.of(3, 6), given(modalities=modalities)
    simulated = rollout(network, here, rng, torch.full((6,), rollout.steps - 1))
    noise = rng.fold("start").normal_like(here.x0)
    sampled = renoise(network, noise, rollout.grid.only(*modalities), here.cond, rng=rng.fold("sampler"))
    for name, x in sampled.items():
        assert torch.equal(x, simulated.x0[name])


@pytest.mark.parametrize("k", range(4))
def test_an_earlier_exit_is_the_samplers_own_state(k: int) -> None:
    network, rollout, rng, here = student(), Rollout(), Rng.of(3, 6), given()
    seen: list[AV[Tensor]] = []
    noise = rng.fold("start").normal_like(here.x0)
    renoise(
        network,
        noise,
        rollout.grid,
        here.cond,
        rng=rng.fold("sampler"),
        on_step=lambda _i, _x, x0: seen.append(x0),
    )
    simulated = rollout(network, here, rng, torch.full((6,), k))
    for name, x0 in seen[k].items():
        assert torch.equal(x0, simulated.x0[name])
        assert float(simulated.t[name][0]) == pytest.approx(rollout.times[name][k])


def test_only_the_call_at_the_exit_has_a_gradient() -> None:
    network = Asked(student())
    rollout, here = Rollout(), given()
    sample = rollout(network, here, Rng.of(3, 6), torch.full((6,), 2))
    assert [grad for _, _, grad in network.calls] == [False, False, True]
    entering = {name: x.detach() for name, x in sample.x_t.items()}
    alone = to_x0(AV(**entering), network.denoiser(AV(**entering), sample.t, here.cond), sample.t)  # type: ignore[operator]
    parameters = list(network.denoiser.parameters())  # type: ignore[attr-defined]
    mine, expected = (
        torch.autograd.grad(torch.stack([z.square().mean() for z in x0.values()]).sum(), parameters)
        for x0 in (sample.x0, alone)
    )
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        sample = Rollout()(student(), given(), Rng.of(3, 6))
    assert not any(x.requires_grad for x in sample.x0.values())


def test_the_exit_is_one_for_every_sample_micro_batch_and_process() -> None:
    rollout = Rollout()
    drawn = []
    for step in range(400):
        processes = [rollout.exits(Rng.of(5, 3, start=3 * p).fold("step", step, "student")) for p in range(4)]
        assert len({int(k) for exits in processes for k in exits}) == 1
        drawn.append(int(processes[0][0]))
    shares = torch.tensor(drawn).bincount(minlength=4) / 400
    assert float((shares - 0.25).abs().max()) < 0.07
    other = [int(rollout.exits(Rng.of(5, 1).fold("step", s, "fake_score"))[0]) for s in range(400)]
    assert float((torch.tensor(drawn) == torch.tensor(other)).float().mean()) < 0.35
    again = [int(rollout.exits(Rng.of(6, 1).fold("step", s, "student"))[0]) for s in range(400)]
    assert again != drawn


def test_an_exit_per_sample_gives_every_sample_what_it_would_get_alone() -> None:
    network, rollout, here = student(), Rollout(each=True), given()
    rng = Rng.of(3, 6)
    exits = torch.tensor([0, 3, 1, 2, 0, 3])
    mixed = rollout(network, here, rng, exits)
    for k in range(4):
        alone = rollout(network, here, rng, torch.full((6,), k))
        for name in BOTH:
            torch.testing.assert_close(mixed.x0[name][exits == k], alone.x0[name][exits == k], rtol=1e-6, atol=1e-6)
    many = Rollout(each=True).exits(Rng.of(0, 400))
    assert float((many.bincount(minlength=4) / 400 - 0.25).abs().max()) < 0.07


def test_clean_frames_enter_clean_and_stay() -> None:
    network, here = Asked(student()), given("i2av")
    sample = Rollout()(network, here, Rng.of(3, 6), torch.full((6,), 3))
    assert torch.equal(sample.x0["video"][:, :, 0], here.x0["video"][:, :, 0])
    for x_t, t, _ in network.calls:
        assert torch.equal(x_t["video"][:, :, 0], here.x0["video"][:, :, 0])
        assert t["video"].shape == (6, 4) and not t["video"][:, 0].any()
        assert t["audio"].shape == (6,)
    sampled = renoise(
        Known(network, here.x0, here.mask),
        Rng.of(3, 6).fold("start").normal_like(here.x0),
        Rollout().grid,
        here.cond,
        rng=Rng.of(3, 6).fold("sampler"),
    )
    assert torch.equal(sampled["video"][:, :, 1:], sample.x0["video"][:, :, 1:])


@pytest.mark.parametrize(("task", "frozen"), [("a2v", "audio"), ("v2a", "video")])
def test_a_given_modality_is_what_it_was(task: str, frozen: str) -> None:
    here = given(task)
    sample = Rollout()(student(), here, Rng.of(3, 6))
    assert torch.equal(sample.x0[frozen], here.x0[frozen])


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_simulates(task: str) -> None:
    here = given(task)
    sample = Rollout()(student(), here, Rng.of(3, 6), torch.full((6,), 3))
    for name, keep in here.cells().items():
        assert torch.equal(sample.x0[name][keep < 0.5], here.x0[name][keep < 0.5])
        assert sample.x0[name].isfinite().all()


def test_on_data_the_student_is_asked_at_noised_data() -> None:
    network, here, rng = Asked(student()), given(), Rng.of(3, 6)
    sample = Rollout(source="data")(network, here, rng, torch.full((6,), 2))
    assert len(network.calls) == 1
    expected = noised(here.x0, rng.fold("start").normal_like(here.x0), sample.t)
    for name, x in expected.items():
        torch.testing.assert_close(sample.x_t[name], x)


def test_the_warped_list() -> None:
    assert warped(4)["audio"] == pytest.approx((1.0, 0.9375, 5 / 6, 0.625))
    assert warped(2, 1.0)["video"] == (1.0, 0.5)
    apart = Rollout(AV((1.0, 0.5), (1.0, 0.25)))(student(), given(), Rng.of(3, 6), torch.ones(6, dtype=torch.int64))
    assert (float(apart.t["video"][0]), float(apart.t["audio"][0])) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": AV((1.0, 0.5, 0.0))}, "must descend from at most 1 and stay above 0"),
        ({"times": AV((0.5, 1.0))}, "must descend"),
        ({"times": AV((1.0, 0.5), (1.0,))}, "differ in length"),
        ({"source": "real"}, "not one of simulated, data"),
    ],
)
def test_impossible_lists_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rollout(**settings)  # type: ignore[arg-type]
