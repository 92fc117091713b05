"""Laws of data: densities against formulas, draws against moments, posteriors against a grid."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

from arrays import UAS, observe, visibility
from scoreprior import mcmc
from scoreprior.denoise import Gaussian
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.infer import infer
from scoreprior.interferometry import closure_phases, log_closure_amplitudes
from scoreprior.likelihood import ClosurePhases, ComplexNormal, LogClosureAmplitudes, PhotonCounts
from scoreprior.prior import ScorePrior
from stats import assert_cov, assert_mean, assert_mean_of_chains, assert_proportion

pytestmark = pytest.mark.promotes_ranks
KEY = jax.random.key(0)
FOUR, FIVE = ["A", "B", "C", "D"], ["A", "B", "C", "D", "E"]


def at_snr(snr, names=FOUR, times=(0.0,)):
    truth = observe(names, times, noise=False)
    return truth.replace(sigma=truth.amplitude / snr)


def phases_at(snr, names=FOUR, times=(0.0,)):
    truth = at_snr(snr, names, times)
    return truth, ClosurePhases(jnp.asarray(truth.vis), closure_phases(truth))


def wrapped(angle):
    return np.angle(np.exp(1j * np.asarray(angle)))


# Laws that hold for all of them


def laws():
    truth = at_snr(5.0, FIVE, (0.0, 1.0))
    vis = jnp.asarray(truth.vis)
    rate = jnp.array([0.5, 3.0, 20.0])
    return {
        "complex": (lambda v: ComplexNormal(v, truth.sigma), vis),
        "phases": (lambda v: ClosurePhases(v, closure_phases(truth)), vis),
        "amplitudes": (lambda v: LogClosureAmplitudes(v, log_closure_amplitudes(truth)), vis),
        "counts": (lambda r: PhotonCounts(r, 2.0, 0.3), rate),
    }


@pytest.fixture(params=["complex", "phases", "amplitudes", "counts"])
def law(request):
    return laws()[request.param]


def test_jit_vmap_grad_and_trees(law):
    build, parameter = law
    fn = build(parameter)
    value = fn.sample(KEY)
    log_prob = lambda p: build(p).log_prob(value).sum()
    np.testing.assert_allclose(jax.jit(log_prob)(parameter), log_prob(parameter), rtol=1e-12)
    many = parameter * jnp.array([1.0, 1.1, 1.2])[:, None]
    one_by_one = [log_prob(p) for p in many]
    np.testing.assert_allclose(jax.vmap(log_prob)(many), one_by_one, rtol=1e-12)
    batched = build(many)
    assert batched.shape() == (3, *fn.shape())
    np.testing.assert_allclose(
        batched.log_prob(value).reshape(3, -1).sum(-1), one_by_one, rtol=1e-12
    )
    assert batched.sample(KEY, (2,)).shape == (2, 3, *fn.shape())
    # Along a line, against differences; the line is complex where the parameter is.
    line = jnp.exp(1j * jnp.arange(parameter.size)) if jnp.iscomplexobj(parameter) else 1.0
    along = lambda t: log_prob(parameter * (1 + t * line))
    slope = jax.grad(along)(0.01)
    np.testing.assert_allclose(slope, (along(0.01 + 1e-6) - along(0.01 - 1e-6)) / 2e-6, rtol=1e-5)
    assert abs(slope) > 0.1
    leaves, tree = jax.tree.flatten(fn)
    again = jax.tree.unflatten(tree, leaves)
    np.testing.assert_array_equal(again.log_prob(value), fn.log_prob(value))
    np.testing.assert_array_equal(jax.jit(lambda f: f.log_prob(value))(fn), fn.log_prob(value))


def test_values_outside_the_support_are_refused():
    _, fn = phases_at(5.0)
    with pytest.warns(UserWarning, match="Out-of-support"):
        fn.log_prob(jnp.full(fn.event_shape, 4.0))


# Complex normal


def test_complex_normal_is_two_normals():
    z, loc, scale = jnp.array([1 + 2j, -0.5j]), jnp.array([0.5 - 1j, 1.0]), jnp.array([0.7, 2.0])
    expected = dist.Normal(loc.real, scale).log_prob(z.real)
    expected += dist.Normal(loc.imag, scale).log_prob(z.imag)
    np.testing.assert_allclose(ComplexNormal(loc, scale).log_prob(z), expected, rtol=1e-13)
    with pytest.raises(TypeError, match="scale must be real, got complex128"):
        ComplexNormal(loc, scale + 0j)


def test_draws_of_a_complex_normal_are_circular():
    fn = ComplexNormal(jnp.array(1 - 2j), jnp.array(0.3))
    z = np.asarray(fn.sample(KEY, (50_000,)))
    assert_mean(np.stack([z.real, z.imag], 1), [1.0, -2.0])
    assert_cov(np.stack([z.real, z.imag], 1), 0.09 * np.eye(2))
    np.testing.assert_allclose(fn.variance, 0.18)


# Closure phases


def direct_log_prob(closures, residual):
    """The formula of `ClosurePhases`, one closure after another."""
    total = 0.0
    for time in np.unique(closures.time):
        rows = closures.time == time
        lower = np.linalg.cholesky(closures.covariance[np.ix_(rows, rows)])
        deltas = []
        for i, r in enumerate(residual[rows]):
            pulls = [lower[i, j] / lower[j, j] * math.sin(d) for j, d in enumerate(deltas)]
            deltas.append(r - sum(pulls))
            kappa = lower[i, i] ** -2
            total += kappa * math.cos(deltas[-1]) - math.log(2 * math.pi * np.i0(kappa))
    return total


def test_closure_phases_follow_their_formula():
    truth = at_snr(3.0, FIVE, (0.0, 1.0))
    truth = truth[np.arange(len(truth)) != 3]  # times with unequal numbers of closures
    closures = closure_phases(truth)
    fn = ClosurePhases(jnp.asarray(truth.vis), closures)
    np.testing.assert_allclose(wrapped(fn.loc - closures.value), 0.0, atol=1e-12)
    value = jnp.asarray(np.random.default_rng(0).uniform(-np.pi, np.pi, len(closures)))
    expected = direct_log_prob(closures, np.asarray(value - fn.loc))
    np.testing.assert_allclose(fn.log_prob(value), expected, rtol=1e-12)
    edge = value.at[4].set(np.pi)
    np.testing.assert_allclose(fn.log_prob(edge), fn.log_prob(edge.at[4].set(-np.pi)), rtol=1e-12)


def test_closure_phases_are_normal_at_high_snr():
    truth, fn = phases_at(3000.0, FIVE, (0.0, 1.0))
    closures = closure_phases(truth)
    normal = dist.MultivariateNormal(jnp.zeros(len(closures)), closures.covariance)
    residual = normal.sample(KEY, (5,))
    value = wrapped(fn.loc + residual)
    np.testing.assert_allclose(fn.log_prob(value), normal.log_prob(residual), rtol=1e-5)
    diagonal = dist.Normal(0.0, closures.sd).to_event(1).log_prob(residual)
    assert np.abs(normal.log_prob(residual) - diagonal).max() > 1


@pytest.mark.parametrize("snr", [0.7, 2.0])
def test_closure_phases_are_normalised_at_any_noise_and_drawn_as_they_say(snr):
    truth, fn = phases_at(snr)
    assert fn.event_shape == (3,)
    axis = -np.pi + 2 * np.pi * (np.arange(60) + 0.5) / 60
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    mass = np.exp(fn.log_prob(jnp.asarray(grid))) * (2 * np.pi / 60) ** 3
    np.testing.assert_allclose(mass.sum(), 1.0, rtol=1e-9)

    def features(value):
        r = np.asarray(value) - np.asarray(fn.loc)
        pairs = [(0, 1), (0, 2), (1, 2)]
        mixed = [f(r[:, i]) * f(r[:, j]) for i, j in pairs for f in (np.sin, np.cos)]
        return np.stack([*np.cos(r.T), *np.sin(r.T), *mixed], 1)

    truth = mass @ features(grid)
    assert np.abs(truth[[6, 8, 10]]).max() > 0.02  # sines that depend on one another
    assert_mean(features(fn.sample(KEY, (40_000,))), truth)


def test_draws_of_concentrated_closure_phases_have_their_covariance():
    truth, fn = phases_at(np.array([20.0, 300.0, 50.0, 1000.0, 30.0, 200.0]))
    residual = wrapped(fn.sample(KEY, (40_000,)) - fn.loc)
    closures = closure_phases(truth)
    assert fn.concentration.min() < 1e3 < fn.concentration.max()  # both ways of drawing
    scale = np.outer(closures.sd, closures.sd)
    assert_cov(residual / closures.sd, closures.covariance / scale)


def tails(fn, value):
    """Whether each `delta` is in the central half, and in the central nine tenths, of its law."""
    delta = np.abs(wrapped(fn.innovations(jnp.asarray(value))))
    axis = np.linspace(0, np.pi, 4001)
    hits = []
    for k, kappa in enumerate(np.asarray(fn.concentration)):
        mass = np.exp(kappa * (np.cos(axis) - 1))
        cdf = np.concatenate([[0], np.cumsum((mass[1:] + mass[:-1]) / 2)])
        cdf = np.interp(delta[:, k], axis, cdf / cdf[-1])
        hits.append((cdf < 0.5, cdf < 0.9))
    return np.moveaxis(np.array(hits), 0, -1)  # [2, n, closures]


@pytest.mark.parametrize(("snr", "slack"), [(20.0, 0.0), (3.0, 0.02), (1.5, 0.04)])
def test_noisy_visibilities_have_the_law_of_closure_phases(snr, slack):
    """Brute force: exact at high SNR, within `slack` of the nominal coverage below."""
    truth, fn = phases_at(snr, FIVE)
    noise = np.random.default_rng(0).normal(size=(20_000, len(truth), 2)) @ [1, 1j]
    value = closure_phases(truth)(truth.vis + truth.sigma * noise)
    for hit, nominal in zip(tails(fn, value), (0.5, 0.9), strict=True):
        share = hit.mean(0)
        assert np.abs(share - nominal).max() < slack + 5 * np.sqrt(nominal * (1 - nominal) / 2e4)
        # `delta`s of one time are independent under the law: so are the events.
        both = (hit[:, 0] & hit[:, 1]).sum()
        assert_proportion(both, 2e4, share[0] * share[1], bias=0.03)
    if snr == 20:
        # Without correlations the same draws do not pass.
        loose = (
            np.abs(wrapped(value - np.asarray(fn.loc))) * closure_phases(truth).sd ** -1 < 0.6745
        )
        joint = loose.all(1).mean()
        assert abs(joint - 0.5**6) > 5 * np.sqrt(0.5**6 / 2e4)


# Log closure amplitudes


def test_log_closure_amplitudes_are_multivariate_normal():
    truth = at_snr(5.0, FIVE, (0.0, 1.0))
    truth = truth[np.arange(len(truth)) != 3]
    closures = log_closure_amplitudes(truth)
    fn = LogClosureAmplitudes(jnp.asarray(1.3 * truth.vis), closures)
    np.testing.assert_allclose(fn.loc, closures.value, atol=1e-12)
    normal = dist.MultivariateNormal(closures.value, closures.covariance)
    value = normal.sample(KEY, (4,))
    np.testing.assert_allclose(fn.log_prob(value), normal.log_prob(value), rtol=1e-12)
    scale = np.outer(closures.sd, closures.sd)
    draws = (np.asarray(fn.sample(KEY, (60_000,))) - closures.value) / closures.sd
    assert_mean(draws, 0.0)
    assert_cov(draws, closures.covariance / scale)


def exponential_integral(x):
    """`E1(x)` by the midpoint rule in `log t`."""
    t = x * np.exp((np.arange(20_000) + 0.5) * (6 / 20_000))
    return np.sum(np.exp(-t)) * 6 / 20_000


@pytest.mark.parametrize(("snr", "bias"), [(3.0, 0.001), (2.0, 0.024), (1.0, 0.28)])
def test_the_bias_of_log_amplitudes_is_as_stated(snr, bias):
    exact = exponential_integral(snr**2 / 2) / 2
    np.testing.assert_allclose(exact, bias, rtol=0.04, atol=5e-4)
    noise = np.random.default_rng(0).normal(size=(200_000, 2)) @ [1, 1j]
    assert_mean(np.log(np.abs(snr + noise))[:, None] - np.log(snr), exact, bias=0.03)


@pytest.mark.parametrize("kind", ["phases", "amplitudes"])
def test_closures_of_another_kind_or_size_are_refused(kind, as_user):
    truth = at_snr(5.0, FIVE)
    vis = jnp.asarray(truth.vis)
    laws = {
        "phases": (ClosurePhases, closure_phases, log_closure_amplitudes),
        "amplitudes": (LogClosureAmplitudes, log_closure_amplitudes, closure_phases),
    }
    law, right, wrong = laws[kind]
    for error, v, closures, message in [
        (
            ValueError,
            vis,
            wrong(truth),
            f"closures must be some of interferometry.{right.__name__}",
        ),
        (ValueError, vis, right(truth)[:0], "closures must be some of"),
        (TypeError, vis, truth, "closures must be Closures, got Visibilities"),
        (TypeError, vis.real, right(truth), "vis must be complex, got float64"),
        (ValueError, vis[:3], right(truth), r"vis must end in the 10 visibilities.*\(3,\)"),
    ]:
        with pytest.raises(error, match=message):
            law(v, closures)


# Counts


def test_photon_counts_are_poisson_over_a_background():
    intensity, background = jnp.array([0.5, 3.0]), jnp.array([0.2, 0.7])
    fn = PhotonCounts(intensity, 2.0, background)
    expected = dist.Poisson(2 * intensity + background)
    counts = jnp.array([0, 9])
    np.testing.assert_allclose(fn.log_prob(counts), expected.log_prob(counts), rtol=1e-14)
    draws = np.asarray(fn.sample(KEY, (80_000,)))
    assert_mean(draws, expected.rate)
    assert_cov(draws, np.diag(expected.rate))


def test_rates_that_are_not_positive_are_refused(as_user):
    for rate, found in [([1.0, -0.5], "-0.5"), ([0.0, 1.0], "0.0"), ([1.0, np.nan], "nan")]:
        with pytest.raises(ValueError, match=f"must be positive and finite, got {found} .1 of 2"):
            PhotonCounts(jnp.array(rate))
    inside = jax.jit(lambda rate: PhotonCounts(rate).log_prob(jnp.array([0, 0, 1])))
    np.testing.assert_array_equal(inside(jnp.array([-0.5, 0.0, 0.0])), [np.nan, 0.0, -np.inf])


# Posteriors


def gaussian_prior(size):
    denoiser = Gaussian(Moments(jnp.zeros(size), jnp.ones(size)))
    return ScorePrior(Flow(denoiser, denoiser.moments(), sigma_min=1e-3, solver=FixedGrid(1)))


def double(data, x):
    """Visibilities of two points: the second `20 + 1.5 x[0]` east, `1.5 x[1]` north, in uas."""
    phase = -2 * jnp.pi * UAS * (data.u * (20 + 1.5 * x[0]) + data.v * 1.5 * x[1])
    return 0.5 + 0.3 * jnp.exp(1j * phase)


def on_grid(log_likelihood):
    """Mean and sd of the posterior of two standard normals on a fine grid."""
    axis = np.linspace(-4, 4, 81)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log_post = np.array([log_likelihood(x) for x in points]) - (points**2).sum(1) / 2
    weight = np.exp(log_post - log_post.max())
    weight /= weight.sum()
    mean = weight @ points
    return mean, np.sqrt(weight @ (points - mean) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["complex", "phases", "amplitudes", "counts"])
def test_nuts_draws_from_the_posterior_of_a_grid(kind):
    sky = [(0.5, 0.0, 0.0), (0.3, 21 * UAS, -1.5 * UAS)]
    data = observe(FOUR, [0.0], sky=sky, sigma=0.05)
    phases, amplitudes = closure_phases(data), log_closure_amplitudes(data)
    counts = jnp.array([3, 9])
    u, v = data.u, data.v

    def complex_at(x):
        points = [(0.5, 0.0, 0.0), (0.3, (20 + 1.5 * x[0]) * UAS, 1.5 * x[1] * UAS)]
        return visibility(u, v, points)

    def law(x):
        vis = double(data, x)
        return {
            "complex": lambda: (ComplexNormal(vis, data.sigma).to_event(1), data.vis),
            "phases": lambda: (ClosurePhases(vis, phases), phases.value),
            "amplitudes": lambda: (LogClosureAmplitudes(vis, amplitudes), amplitudes.value),
            "counts": lambda: (PhotonCounts(jnp.exp(x), 3.0, 0.5).to_event(1), counts),
        }[kind]()

    def direct(x):
        match kind:
            case "complex":
                return -0.5 * (np.abs((data.vis - complex_at(x)) / data.sigma) ** 2).sum()
            case "phases":
                return direct_log_prob(phases, phases.value - phases(complex_at(x)))
            case "amplitudes":
                return -0.5 * amplitudes.chi_squared(complex_at(x))
            case _:
                rate = 3 * np.exp(x) + 0.5
                return (np.asarray(counts) * np.log(rate) - rate).sum()

    prior = gaussian_prior(2)

    def model():
        fn, value = law(numpyro.sample("x", prior))
        numpyro.sample("y", fn, obs=jnp.asarray(value))

    mean, sd = on_grid(direct)
    assert (sd < 0.9).any()
    assert (sd > 0.1).all()  # the spacing of the grid
    tree = infer(
        model, mcmc.NUTS(num_warmup=300, num_samples=2500, num_chains=2), key=KEY, progress=False
    )
    draws = tree["posterior"]["x"].values
    assert_mean_of_chains(draws, mean, bias=0.2)
    assert_mean_of_chains((draws - mean) ** 2, sd**2, bias=0.2)


def test_numpyros_own_sampler_takes_a_background_as_latent():
    counts = jnp.array([4, 7, 5, 6])

    def model():
        background = numpyro.sample("background", dist.Gamma(2.0, 1.0))
        numpyro.sample("y", PhotonCounts(jnp.zeros(4), 1.0, background), obs=counts)

    mcmc_run = MCMC(NUTS(model), num_warmup=300, num_samples=4000, num_chains=1, progress_bar=False)
    mcmc_run.run(KEY)
    draws = mcmc_run.get_samples(group_by_chain=True)["background"][..., None]
    exact = dist.Gamma(2.0 + counts.sum(), 1.0 + 4)
    assert_mean_of_chains(draws, exact.mean, bias=0.2)
