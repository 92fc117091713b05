"""Negative controls: a planted fault is seen by the checker of its noun."""

import jax
import jax.numpy as jnp
import pytest

from laws import (
    check_denoiser,
    check_distribution,
    check_exact_denoiser,
    check_guidance,
    check_operator,
    check_transform,
)
from oracles import A_M, COV_M, Y_M
from priors import COARSE, PRIORS, draws, mixture
from scoreprior.denoise import AbstractDenoiser, Empirical
from scoreprior.guide import TMPD
from scoreprior.observation import LinearObservation
from scoreprior.operators import Circular, GaussianBlur
from scoreprior.prior import ProbabilityFlow, ScorePrior

X = draws(PRIORS["exact"], 2)
KEY = jax.random.key(0)


class Rounded(AbstractDenoiser):
    """Constant almost everywhere: its derivative says nothing of its differences."""

    def __call__(self, x, sigma, context=None):
        return x + 1e-3 * jax.lax.stop_gradient(jnp.sin(x))


class WrongScore(AbstractDenoiser):
    def __call__(self, x, sigma, context=None):
        return 0.5 * x

    def score(self, x, sigma, context=None):
        return (0.5 * x - x) / sigma


class WrongDensity(Empirical):
    def log_prob(self, x, sigma=0.0):
        return 1.01 * super().log_prob(x, sigma)


class IgnoresData(TMPD):
    def guide(self, denoise, observation, x, sigma):
        return denoise(x)


class WrongJacobian(TMPD):
    def guide(self, denoise, observation, x, sigma):
        return x + jax.lax.stop_gradient(super().guide(denoise, observation, x, sigma) - x)


class WrongDeterminant(ProbabilityFlow):
    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return super().log_abs_det_jacobian(x, y) + 0.05


class WrongInverse(ProbabilityFlow):
    def _inverse(self, y):
        return 1.01 * super()._inverse(y)


class SharedDraws(ScorePrior):
    """One draw for a whole batch."""

    def sample(self, key, sample_shape=()):
        return jnp.broadcast_to(super().sample(key), (*sample_shape, *self.event_shape))


class SeesItsNeighbours(ScorePrior):
    def log_prob(self, value, intermediates=None):
        return super().log_prob(value) + jnp.mean(value)


class WrongAdjoint(GaussianBlur):
    def adjoint(self, y):
        return 1.01 * super().adjoint(y)


class NotLinear(GaussianBlur):
    def apply(self, x):
        return super().apply(x) + 1e-3


class SVDOfAnother(GaussianBlur):
    def svd(self):
        return GaussianBlur(1.01 * self.width, self.shape_in, self.boundary).svd()


@pytest.mark.parametrize("denoiser", [Rounded(), WrongScore()])
def test_wrong_denoisers_are_seen(denoiser):
    check_denoiser(mixture(), X, 0.5)
    with pytest.raises(AssertionError):
        check_denoiser(denoiser, X, 0.5)


def test_a_wrong_density_of_an_exact_denoiser_is_seen():
    with pytest.raises(AssertionError):
        check_exact_denoiser(WrongDensity(X, 0.4), X, 0.5)


@pytest.mark.parametrize("guidance", [IgnoresData(), WrongJacobian()])
def test_wrong_guidance_is_seen(guidance):
    arguments = mixture(), LinearObservation(A_M, Y_M, COV_M), X, 0.5
    check_guidance(TMPD(), *arguments)
    with pytest.raises(AssertionError):
        check_guidance(guidance, *arguments)


@pytest.mark.parametrize("kind", [WrongDeterminant, WrongInverse])
def test_wrong_transforms_are_seen(kind):
    prior = PRIORS["exact"]
    with pytest.raises(AssertionError):
        check_transform(kind(prior.flow, prior.density), X, atol=2e-2)


@pytest.mark.parametrize("kind", [SharedDraws, SeesItsNeighbours])
def test_wrong_distributions_are_seen(kind):
    prior = kind(PRIORS["exact"].flow)
    assert prior.flow.solver == COARSE
    with pytest.raises(AssertionError):
        check_distribution(prior, KEY)


@pytest.mark.parametrize(
    "operator",
    [kind(0.7, (3, 4), Circular()) for kind in (WrongAdjoint, NotLinear, SVDOfAnother)],
    ids=lambda operator: type(operator).__name__,
)
def test_wrong_operators_are_seen(operator):
    check_operator(GaussianBlur(0.7, (3, 4), Circular()), KEY)
    with pytest.raises(AssertionError):
        check_operator(operator, KEY)
