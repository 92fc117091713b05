"""Complex data in models: engines that want data in Gaussian noise read them as two real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from oracles import at_level, moments
from scoreprior import operators as op
from scoreprior.denoise import Gaussian
from scoreprior.flow import FixedGrid, Flow
from scoreprior.gaussian import Moments
from scoreprior.guide import DPS, JFPS, MMPS, NRLG, TMPD, DiagonalTMPD, DiffPIR, PiGDM
from scoreprior.likelihood import ComplexNormal
from scoreprior.mcmc import Guided, SplitGibbs
from scoreprior.prior import ScorePrior
from scoreprior.problem import Problem
from scoreprior.smc import FeynmanKac
from stats import assert_cov, assert_mean, assert_mean_of_groups

pytestmark = pytest.mark.promotes_ranks

KEY = jax.random.key(3)
SHAPE = (2, 3)
SIGMA_MIN = 0.5
ROOT = np.random.default_rng(0).normal(size=(6, 6))
LAW = Gaussian(
    Moments.dense(
        jnp.linspace(-1, 1, 6).reshape(SHAPE), jnp.asarray(ROOT @ ROOT.T / 3 + 0.2 * np.eye(6))
    )
)
PRIOR = ScorePrior(Flow(LAW, LAW.law, sigma_min=SIGMA_MIN, solver=FixedGrid(1)))
EXACT = at_level(LAW, SIGMA_MIN)
FOURIER = op.FourierSampling(np.array([[1, 1, 0], [0, 1, 0]], bool))
# From NumPy's transform: row k of `F` is what datum k sees of each pixel.
F = np.fft.fft2(np.eye(6).reshape(6, *SHAPE), norm="ortho")[:, [0, 0, 1], [0, 1, 1]].T
SD = np.array([0.3, 0.5, 0.8])
DATA = jnp.array([0.4 - 0.3j, -1.0 + 1.2j, 0.3 + 0.9j])


def problem_of(y=DATA, sd=SD, law=lambda mean, sd: ComplexNormal(mean, sd).to_event(1)):
    def model(y):
        numpyro.sample("y", law(FOURIER(numpyro.sample("x", PRIOR)), jnp.asarray(sd)), obs=y)

    return Problem.from_model(model, y)


def closed_form(y=DATA, sd=SD):
    """Real parts before imaginary ones."""
    matrix = jnp.asarray(np.concatenate([F.real, F.imag]))
    noise = jnp.diag(jnp.asarray(np.concatenate([sd, sd]) ** 2))
    return matrix, jnp.concatenate([y.real, y.imag]), noise


PROBLEM = problem_of()
TRUTH = EXACT.posterior(*closed_form())


def test_complex_data_are_linearised_as_two_real_ones():
    x = jax.random.normal(KEY, SHAPE)
    seen = PROBLEM.linearise({"x": x})
    matrix, y, noise = closed_form()
    order = jnp.arange(6).reshape(2, 3).T.ravel()  # the two parts of a datum together
    np.testing.assert_allclose(seen.matrix(), matrix[order], atol=1e-12)
    np.testing.assert_allclose(seen.y.ravel(), y[order], atol=1e-12)
    np.testing.assert_allclose(seen.cov_y(), noise[order][:, order], atol=1e-12)
    assert seen.is_linear(KEY)
    # The Gaussian it describes has the likelihood of the model.
    residual = seen.noise.log_prob(seen.data - seen.mean(x))
    position = {"x": PRIOR.flow.to_noise(x)}
    np.testing.assert_allclose(residual, PROBLEM.log_likelihood(position), rtol=1e-12)


def test_shapes_of_mean_noise_and_mask_broadcast():
    keep = jnp.array([True, False, True])
    missing = DATA.at[1].set(jnp.nan)

    def model(y):
        x = numpyro.sample("x", PRIOR)
        law = ComplexNormal(x[0, 0] + 1j * x[0, 1], 0.5).expand((3,)).mask(keep)
        numpyro.sample("y", law.to_event(1), obs=y)

    seen = Problem.from_model(model, missing).linearise({"x": jnp.zeros(SHAPE)})
    parts = jnp.stack([DATA.real, DATA.imag], -1)
    np.testing.assert_allclose(seen.y, jnp.where(keep[:, None], parts, 0))
    np.testing.assert_array_equal(seen.mask, keep[:, None] & jnp.ones(2, bool)[None])
    np.testing.assert_allclose(seen.cov_y(), 0.25 * np.eye(6))
    unit = np.eye(6)[:2] * 1.0
    np.testing.assert_allclose(seen.matrix(), np.concatenate([unit, 0 * unit, unit]))


def test_complex_data_of_a_real_law_are_refused():
    problem = problem_of(law=lambda mean, sd: dist.Normal(mean.real, sd).to_event(1))
    with pytest.raises(ValueError, match="'y' has complex data, but its distribution, Normal, is"):
        problem.linearise({"x": jnp.zeros(SHAPE)})


METHODS = {
    "TMPD": TMPD(),
    "MMPS": MMPS(12, rtol=1e-12),
    "JFPS": JFPS(LAW.law),
    "DiagonalTMPD": DiagonalTMPD(),
    "PiGDM": PiGDM(1.3),
    "DiffPIR": DiffPIR(2.0),
    "NRLG": NRLG(),
    "DPS": DPS(0.4),
}
EXACT_METHODS = ("TMPD", "MMPS", "JFPS")


def real_and_imaginary(mean, sd):
    return dist.Normal(op.RealImag.split(mean), jnp.stack([sd, sd])).to_event(2)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_complex_data_as_two_real_ones(name):
    two = problem_of(jnp.stack([DATA.real, DATA.imag]), law=real_and_imaginary)
    x, exact = 1.5 * jax.random.normal(KEY, SHAPE), LAW.posterior(*closed_form())
    for sigma in (0.3, 2.0):
        found, real = (
            METHODS[name](LAW, problem.linearise({"x": jnp.zeros(SHAPE)}))(x, sigma)
            for problem in (PROBLEM, two)
        )
        np.testing.assert_allclose(found, real, rtol=1e-9, atol=1e-9)
        assert np.abs(found - LAW(x, sigma)).max() > 1e-3
        if name in EXACT_METHODS:
            np.testing.assert_allclose(found, exact(x, sigma), rtol=1e-8, atol=1e-8)


ENGINES = {
    "TMPD": Guided(TMPD(), 6000, 60),
    "MMPS": Guided(MMPS(6), 6000, 60),
    "SplitGibbs": SplitGibbs(None, 60, 1, 6000, num_steps=10),
    "FeynmanKac": FeynmanKac(TMPD(), 120, 48, 40),
}


@pytest.mark.parametrize("name", ENGINES)
def test_posteriors_given_complex_data_are_those_of_the_closed_form(name):
    draws = ENGINES[name].run(PROBLEM, KEY, progress=False)
    x = draws.positions["x"].reshape(-1, *SHAPE)
    if name == "FeynmanKac":
        groups = draws.stats["group_of_draw"].ravel()
        check = lambda truth: assert_mean_of_groups(x, groups, moments(truth)[0], bias=0.2)
        evidence, error = draws.extra["log_evidence"][1], draws.extra["log_evidence_se"][1]
        assert abs(evidence - EXACT.log_evidence(*closed_form())) < 5 * error + 0.01
    else:
        check = lambda truth: assert_mean(x, moments(truth)[0], bias=0.1)
        assert_cov(x, moments(TRUTH)[1], bias=0.2)
        # `E |e|^2 = sd^2`, the other convention of complex noise.
        half = EXACT.posterior(*closed_form(sd=SD / np.sqrt(2)))
        with pytest.raises(AssertionError, match="outside 5 standard errors"):
            assert_cov(x, moments(half)[1], bias=0.2)
    check(TRUTH)
    # Of the other sign of the transform.
    with pytest.raises(AssertionError, match="outside 5 standard errors"):
        check(EXACT.posterior(*closed_form(DATA.conj())))
