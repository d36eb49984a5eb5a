"""The scaling law: the average size of a pruned run, and constants found again from synthetic runs."""

from dataclasses import asdict

import pytest
import torch

from edgewright.compress.pruning import journey
from edgewright.compress.scaling import DENSE_CHINCHILLA, ScalingLaw, TrainingRun, average_parameters, fit
from edgewright.errors import RecipeError

LAW = ScalingLaw(irreducible=1.8, a=300.0, b=900.0, alpha=0.33, beta=0.31)


def runs(noise=0.0):
    generator = torch.Generator().manual_seed(0)
    return [
        TrainingRun(
            parameters=parameters,
            tokens=tokens,
            loss=LAW.loss(parameters, tokens) * (1 + noise * float(torch.randn((), generator=generator))),
        )
        for parameters in (1e6, 4e6, 2e7, 1e8)
        for tokens in (2e7, 1e8, 1e9)
    ]


def test_the_average_size_is_that_of_the_schedule_summed():
    schedule = journey(26_800, 0.4, start=0.25, end=0.75, every=100)
    summed = sum(schedule.density_after(step) for step in range(26_800)) / 26_800
    assert average_parameters(1.0, 0.4) == pytest.approx(0.610, abs=5e-4)
    assert average_parameters(1.0, 0.4) == pytest.approx(summed, abs=5e-4)
    assert average_parameters(70e6, 1.0) == 70e6


def test_the_constants_of_exact_runs_are_found_again():
    assert asdict(fit(runs())) == pytest.approx(asdict(LAW), rel=1e-4)


def test_noise_and_an_outlier_move_the_prediction_little():
    spoiled = runs(noise=0.002)
    spoiled[5] = TrainingRun(parameters=spoiled[5].parameters, tokens=spoiled[5].tokens, loss=spoiled[5].loss * 1.2)
    assert fit(spoiled).loss(3e7, 5e8) == pytest.approx(LAW.loss(3e7, 5e8), rel=0.01)


@pytest.mark.parametrize("few", [runs()[:4], runs()[:3] * 2, [run for run in runs() if run.tokens < 1e9]])
def test_too_few_runs_are_refused(few):
    with pytest.raises(RecipeError, match=f"EW-731[\\s\\S]*{len(few)} runs"):
        fit(few)


def test_the_published_constants_give_a_loss_of_the_right_size():
    assert DENSE_CHINCHILLA.loss(70e9, 1.4e12) == pytest.approx(1.94, abs=0.01)
