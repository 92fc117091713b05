"""Closed-form posteriors: what an engine must reproduce.

The law of a prior with an exact denoiser is that of `X + sigma_min N`, so `at_level` first adds
`sigma_min^2 I` to the covariances; conditioning on a linear-Gaussian observation is then exact.
"""

import jax
import jax.numpy as jnp
import numpy as np

from scoreprior.denoise import Gaussian, GaussianMixture
from scoreprior.gaussian import Moments

# A Gaussian and a mixture in two dimensions, each with a linear observation, for every engine.
GAUSSIAN = Gaussian(Moments.dense(jnp.array([0.5, -1.0]), jnp.array([[1.0, 0.6], [0.6, 0.8]])))
MIXTURE = GaussianMixture.full(
    jnp.array([0.4, 0.6]),
    jnp.array([[-1.0, 0.5], [1.0, -0.5]]),
    jnp.array([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]]),
)
A_G, Y_G, SD_G = jnp.array([[1.0, 1.0]]), jnp.array([2.5]), 0.7
A_M, Y_M = jnp.array([[0.5, 1.0], [1.0, 0.0]]), jnp.array([0.9, 0.4])
COV_M = jnp.array([[1.0, 0.3], [0.3, 0.8]])


def at_level(law, sigma):
    """The exact law of `X + sigma N`."""
    if isinstance(law, Gaussian):
        noisy = law.law.covariance() + sigma**2 * jnp.eye(law.law.size)
        return Gaussian(Moments.dense(law.law.mean, noisy))
    noise = sigma**2 * jnp.eye(law.components.mean[0].size)
    covariances = law._each(Moments.covariance) + noise[None]
    return GaussianMixture.full(law.weights, law.components.mean, covariances)


def posterior(prior, A, y, cov_y):
    """Exact law of `x` given `y = A x + N(0, cov_y)`, for a prior with an exact denoiser."""
    return at_level(prior.flow.denoiser, prior.sigma_min).posterior(A, y, cov_y)


def moments(law):
    """Mean [*event] and covariance [size, size]."""
    law = law.moments()
    return np.asarray(law.mean), np.asarray(law.covariance())


class UnknownScale:
    """`x_i ~ prior`, `y_i = x_i + scale * N(0, I)`, `log scale ~ N(location, width^2)`.

    Given the scale everything is closed form; the scale itself is integrated by the trapezoid rule
    in `log scale`, on a grid so fine that its error is far below any gate.
    """

    def __init__(self, prior, y, location, width, num_points=4001):
        self.law = at_level(prior.flow.denoiser, prior.sigma_min)
        self.y, eye = y, jnp.eye(y.shape[-1])
        log_scales = location + width * jnp.linspace(-8, 8, num_points)
        self.scales = jnp.exp(log_scales)

        def log_joint(log_scale):
            cov_y = jnp.exp(2 * log_scale) * eye
            evidence = jax.vmap(lambda y: self.law.log_evidence(eye, y, cov_y))(y)
            log_prior = jax.scipy.stats.norm.logpdf(log_scale, location, width)
            return log_prior + evidence.sum()

        log_weights = jax.lax.map(log_joint, log_scales, batch_size=500)
        self.weights = jax.nn.softmax(log_weights)

        def mean(scale):
            cov_y = scale**2 * eye
            return jax.vmap(lambda y: self.law.posterior(eye, y, cov_y).moments().mean)(y)

        self.means = jax.lax.map(mean, self.scales, batch_size=500)

    def scale_moments(self):
        """Posterior mean and variance of the scale."""
        mean = jnp.sum(self.weights * self.scales)
        return float(mean), float(jnp.sum(self.weights * (self.scales - mean) ** 2))

    def mean(self):
        """Posterior mean of every `x_i`, [n, size]."""
        return np.asarray(jnp.tensordot(self.weights, self.means, 1))
