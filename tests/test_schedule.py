import math

import pytest
import torch

from blindlib import NoiseSchedule


def close(a, b, rtol=1e-6):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), b, rtol=rtol, atol=0)


def test_agrees_with_the_reference(golden):
    ref, s = golden("schedule.npz"), NoiseSchedule.linear()
    close(s.betas, ref["betas"])
    close(s.alpha_bars, ref["alphas_cumprod"])
    close([s.posterior_variance(t, t - 1) for t in range(1000)], ref["posterior_variance"])
    lows = [s.log_variance_range(t, t - 1)[0] for t in range(1, 1000)]
    close(lows, ref["posterior_log_variance_clipped"][1:])
    weights = torch.tensor([s.posterior_coefficients(t, t - 1) for t in range(1000)], dtype=torch.float64)
    close(weights[:, 0], ref["posterior_mean_coef1"])
    close(weights[:, 1], ref["posterior_mean_coef2"])
    close(NoiseSchedule.cosine().betas, ref["cosine_betas"])


def test_respacing_agrees_with_the_reference(golden):
    ref, s = golden("schedule.npz"), NoiseSchedule.linear()
    times = s.timesteps(100, "linspace")[::-1]
    assert times == ref["respaced100_timesteps"].tolist()
    pairs = list(zip(times, [-1, *times], strict=False))
    close([s.alpha_bar(t) for t in times], ref["respaced100_alphas_cumprod"])
    close([s.posterior_variance(t, p) for t, p in pairs], ref["respaced100_posterior_variance"])
    assert s.timesteps(50, "leading")[::-1] == ref["ddim50_timesteps"].tolist()


@pytest.mark.parametrize("t, t_prev", [(999, 998), (500, 300), (20, 0), (5, -1)])
def test_the_reverse_step_is_the_posterior_of_the_forward_one(t, t_prev, g):
    """Bayes' rule on a scalar: q(x_prev | x_t, x_0) from the product of two Gaussians."""
    s = NoiseSchedule.linear()
    a, a_prev = s.alpha_bar(t), s.alpha_bar(t_prev)
    x0, x_t = 0.3, -0.7
    c0, ct = s.posterior_coefficients(t, t_prev)
    if t_prev < 0:
        assert (c0, ct) == pytest.approx((1, 0)) and s.posterior_variance(t, t_prev) == 0
        return
    alpha = a / a_prev
    precision = 1 / (1 - a_prev) + alpha / (1 - alpha)
    mean = (math.sqrt(a_prev) * x0 / (1 - a_prev) + math.sqrt(alpha) * x_t / (1 - alpha)) / precision
    assert c0 * x0 + ct * x_t == pytest.approx(mean)
    assert s.posterior_variance(t, t_prev) == pytest.approx(1 / precision)


def test_ddim_with_eta_one_is_the_ancestral_step(g):
    s = NoiseSchedule.linear()
    x_t, x0, noise = (torch.randn(2, 3, 4, 4, generator=g) for _ in range(3))
    torch.testing.assert_close(
        s.ddim_step(x_t, x0, 500, 400, noise, eta=1.0), s.ancestral_step(x_t, x0, 500, 400, noise), rtol=1e-4, atol=1e-5
    )


def test_diffuse_has_the_stated_moments(g):
    s = NoiseSchedule.linear()
    x0 = torch.full((4, 1, 200, 200), 0.5)
    x_t = s.diffuse(x0, torch.tensor([0, 100, 500, 999]), torch.randn(x0.shape, generator=g))
    a = s.alpha_bars[[0, 100, 500, 999]].float()
    torch.testing.assert_close(x_t.mean((1, 2, 3)), 0.5 * a.sqrt(), atol=0.02, rtol=0)
    torch.testing.assert_close(x_t.std((1, 2, 3)), (1 - a).sqrt(), atol=0.02, rtol=0)


@pytest.mark.parametrize("steps", [0, 1001, 2.5, True])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="steps: expected an integer from 1 to 1000"):
        NoiseSchedule.linear().timesteps(steps)


def test_bad_betas_and_spacing():
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule(torch.tensor([0.1, 1.5]))
    with pytest.raises(ValueError, match="spacing"):
        NoiseSchedule.linear().timesteps(10, "quadratic")


def test_time_undoes_sigma():
    schedule = NoiseSchedule.linear()
    assert [schedule.time(schedule.sigma(t)) for t in (0, 17, 500, 999)] == [0, 17, 500, 999]
    assert schedule.time(0.0) == 0 and schedule.time(1e9) == 999


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 300, 999, 1000])
def test_half_log_times_are_distinct_and_reach_both_ends(steps):
    times = NoiseSchedule.linear().timesteps(steps)
    assert len(times) == steps and times[0] == 999 and (steps == 1 or times[-1] == 0)
    assert times == sorted(set(times), reverse=True)


@pytest.mark.parametrize("spacing", ["half-log", "linspace"])
def test_times_of_a_run_that_starts_late(spacing):
    times = NoiseSchedule.linear().timesteps(40, spacing, first=120)
    assert len(times) == 40 and times[0] == 120 and times[-1] == 0
    assert times == sorted(set(times), reverse=True)


def test_half_log_is_halfway_between_even_in_time_and_in_log_sigma():
    s = NoiseSchedule.linear()
    times = s.timesteps(9)
    octaves = [math.log(s.sigma(t) / s.sigma(0)) / math.log(s.sigma(999) / s.sigma(0)) for t in times]
    halfway = [(t / 999 + octave) / 2 for t, octave in zip(times, octaves, strict=True)]
    assert halfway == pytest.approx([1 - i / 8 for i in range(9)], abs=0.01)
