"""What the tests of training share: a mixture, a small network for it, and short runs of `fit`."""

import equinox as eqx
import jax
import jax.numpy as jnp

from scoreprior import nn
from scoreprior.denoise import GaussianMixture
from scoreprior.denoise.network import Network
from scoreprior.gaussian import Moments
from scoreprior.train import DenoisingLoss, LogUniform, Residual, fit

KEY = jax.random.key(0)
MIXTURE = GaussianMixture.diagonal(
    jnp.array([0.4, 0.6]), jnp.array([[-2.0, 1.0], [1.5, -1.0]]), 0.1
)
MIXTURE_MOMENTS = Moments(jnp.array([0.1, -0.2]), jnp.array([3.04, 1.06]))
LOSS = DenoisingLoss(LogUniform(0.05, 20.0), Residual(MIXTURE_MOMENTS))


def draws(law, num, key=KEY):
    return jax.vmap(law.sample)(jax.random.split(key, num))


def mlp_denoiser(moments=MIXTURE_MOMENTS, width=48):
    net = nn.ResidualMLP((2,), width=width, num_blocks=2, embedding_size=16, key=KEY)
    return Network(net, moments)


class Shift(eqx.Module):
    """A network that predicts the context times one weight."""

    weight: jax.Array

    def __call__(self, x, log_sigma, context):
        return self.weight * context


def quick(denoiser, data, loss=LOSS, **options):
    settings = {"key": KEY, "num_steps": 40, "batch_size": 32, "evaluate_every": 10}
    return fit(denoiser, data, loss, **(settings | {"progress": False} | options))
