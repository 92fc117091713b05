"""The settings that chains with a tuned kernel have in common, with their defaults."""

import equinox as eqx

from scoreprior.mcmc.adaptive import AbstractAdaptiveChains


class AbstractKernelChains(AbstractAdaptiveChains):
    """Chains of one kernel out of blackjax, which the subclass names, under `Warmup`.

    **Arguments:** `num_warmup`, `num_samples`: steps per chain; `num_chains`. `centred`: sample `x`
    with the prior's density policy, rather than its noise. `dense_mass`: learn a full covariance.
    `step_size`: the first one; without a warm-up the only one, beside unit scales. `chunk_size`:
    steps between two updates of the progress bar and of the checkpoint; it does not change the
    draws. `init`: where chains start, at prior draws by default.
    """

    num_warmup: int = eqx.field(static=True, default=500)
    num_samples: int = eqx.field(static=True, default=500)
    num_chains: int = eqx.field(static=True, default=4)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    dense_mass: bool = eqx.field(static=True, default=False, kw_only=True)
    step_size: float = eqx.field(static=True, default=1.0, kw_only=True)
    chunk_size: int = eqx.field(static=True, default=100, kw_only=True)
