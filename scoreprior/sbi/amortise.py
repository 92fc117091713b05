"""Neural posterior score estimation: one conditional denoiser for all observations.

The network is trained on pairs of parameters and simulations by denoising score matching (Geffner
et al., "Compositional score modeling for simulation-based inference", ICML 2023; Sharrock et al.,
"Sequential neural score estimation", ICML 2024), in the coordinates of `Parameters` and in the
language of noise levels of the rest of the library.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from scoreprior._typing import Key, Scalar
from scoreprior._util import check_count, check_positive
from scoreprior.nn import ResidualMLP
from scoreprior.nn.embed import Dropout
from scoreprior.sbi.conditional import (
    Amortised,
    ConditionalLoss,
    DrawContext,
    Observed,
    Told,
    regress,
)
from scoreprior.sbi.embed import Flat, Standardise
from scoreprior.sbi.pairs import Source, pairs
from scoreprior.sbi.parameters import Parameters
from scoreprior.sbi.posterior import Posterior
from scoreprior.sbi.surrogate import Surrogate
from scoreprior.train import Fit, LogUniform, adamw, fit


class NPSE(eqx.Module):
    """Amortised inference of the parameters of a simulator by their score.

    **Arguments:** `prior`, a NumPyro distribution or model; `simulations`, anything with `theta`
    and `x`, such as the result of `sbi.simulate`, or the pair `(theta, x)`, with leading axis
    [n], `theta` an array or a dict as `prior` has it, and `x` [n, *x]; or a simulator, of which
    `sbi.simulate` makes `num_simulations` draws with `key`, kept in the folder `store` if there is
    one, with its bar if `progress`, and its rules and errors for draws that fail; `embedding(x)`, a
    callable pytree from one standardised observation to a vector, trained with the network, by
    default the flattened observation itself; `SetEncoder(...)` where an observation is a set, `x`
    [n, max_items, *x], of which training draws subsets of every size; `drop`, the share of
    training without an observation, from which `Posterior.prior` is learnt.

    `width`, `num_blocks` and `dropout` are those of a `nn.ResidualMLP`; `sigma_min` and `sigma_max`
    the noise levels, in standard deviations of the prior in `z`.

    Simulations with values that are not finite are left out, with a warning that counts them: the
    posterior is then that given a finite simulation. Raises `ValueError` before any work for
    shapes that disagree, for none or all of them left out, for `theta` outside the prior, for a
    simulator without `num_simulations` and `key`, and for these beside simulations.
    """

    parameters: Parameters
    z: Float[Array, "n size"]
    x: Float[Array, "n ..."]
    embedding: Any
    width: int = eqx.field(static=True)
    num_blocks: int = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    drop: float = eqx.field(static=True)
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)

    def __init__(
        self,
        prior: dist.Distribution | Callable[[], Any] | Parameters,
        simulations: Any,
        *,
        num_simulations: int | None = None,
        key: Key | None = None,
        store: str | os.PathLike[str] | None = None,
        embedding: Callable[..., Array] | None = None,
        width: int = 128,
        num_blocks: int = 3,
        dropout: float = 0.1,
        drop: float = 0.0,
        sigma_min: float = 3e-3,
        sigma_max: float = 10.0,
        progress: bool = True,
    ):
        if not 0 <= drop < 1:
            raise ValueError(f"drop must lie in [0, 1), got {drop}")
        check_positive("sigma_min", sigma_min)
        check_positive("sigma_max", sigma_max)
        self.parameters = prior if isinstance(prior, Parameters) else Parameters.of(prior)
        source = Source(num_simulations, key, store, progress)
        self.z, self.x = pairs(self.parameters, simulations, source)
        self.embedding = Flat() if embedding is None else embedding
        self.width, self.num_blocks, self.dropout = width, num_blocks, dropout
        self.drop, self.sigma_min, self.sigma_max = drop, sigma_min, sigma_max
        if self.takes_sets and self.x.ndim < 2:
            raise ValueError(f"x must be sets [n, max_items, *x], got shape {self.x.shape}")

    @property
    def takes_sets(self) -> bool:
        """Whether an observation is a set of items."""
        return bool(getattr(self.embedding, "takes_sets", False))

    def fit(
        self,
        *,
        key: Key,
        num_steps: int = 20_000,
        batch_size: int = 256,
        peak: float = 1e-3,
        weight_decay: float = 0.1,
        held_out: float = 0.1,
        patience: int | None = None,
        least_gain: float = 2.0,
        surrogate: Surrogate | None = Surrogate(),  # noqa: B008
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> Posterior:
        """Train, and return the posterior with the weights of the lowest held-out loss.

        Two networks are trained, one on the simulations and one on draws of a likelihood fitted to
        them, `surrogate`, and the one of the lower held-out loss is kept. Sets have no surrogate,
        nor have observations of many values. `None` trains on simulations alone, in half the time,
        and is for those whose `theta` is not from the prior.

        Where the network is not better than the regression under it by `least_gain` standard errors
        of that loss, it is left out, as it started: the simpler of two models that held-out data do
        not tell apart (Breiman et al., "Classification and regression trees", 1984, section 3.4.3).
        What it would add is noise, the same for all observations, of which a product has `n` times.

        **Arguments:** `num_steps`, of each network; `held_out`, the share of simulations kept for
        the loss; `peak` of `train.adamw`, and its `weight_decay` for simulations; `least_gain`,
        `patience`, `checkpoint` and `progress` as in `train.fit`, the second network with a
        checkpoint beside the other's.
        """
        check_count("num_steps", num_steps)
        split_key, init, train = jax.random.split(key, 3)
        within, out = split(split_key, len(self.z), held_out)
        start = self._start(self.z[within], self.x[within], init)
        loss = ConditionalLoss(LogUniform(*start.levels))

        def train_on(denoiser: Any, z: Array, x: Array, key: Key, **settings: Any) -> Fit:
            return fit(
                denoiser,
                z,
                loss,
                key=key,
                num_steps=num_steps,
                batch_size=batch_size,
                context=self._contexts(x),
                held_out=self.z[out],
                held_out_context=self._contexts(self.x[out]),
                patience=patience,
                least_gain=least_gain,
                augment_context=DrawContext(self.drop),
                progress=progress,
                **settings,
            )

        trained = train_on(
            start,
            self.z[within],
            self.x[within],
            train,
            optimiser=adamw(num_steps, peak=peak, weight_decay=weight_decay),
            checkpoint=checkpoint,
        )
        made = None
        if surrogate is not None and not self.takes_sets:
            made = surrogate.pairs(
                self.parameters,
                start.standardise,
                (self.z[within], self.z[out]),
                (self.x[within], self.x[out]),
                num_steps=num_steps,
                num_pairs=num_steps * batch_size,
                key=jax.random.fold_in(train, 1),
            )
        if made is not None:
            try:
                # There are enough pairs: no network learns them by heart.
                taught = train_on(
                    _with_dropout(start, 0.0),
                    *made,
                    jax.random.fold_in(train, 2),
                    optimiser=adamw(num_steps, peak=peak),
                    checkpoint=None if checkpoint is None else beside(checkpoint),
                )
            except FloatingPointError as error:
                warnings.warn(
                    f"the network taught by a surrogate is left out: {error}", stacklevel=2
                )
                taught = trained
            taught = taught._replace(denoiser=_with_dropout(taught.denoiser, self.dropout))
            tests = self.z[out], self._contexts(self.x[out]), jax.random.fold_in(train, 3)
            trained = min(trained, taught, key=lambda fit: _mean_loss(fit.denoiser, loss, *tests))
        return Posterior(
            parameters=self.parameters,
            denoiser=trained.denoiser,
            standardise=start.standardise,
            moments=start.regression.prior,
            sigma_min=start.levels[0],
            sigma_max=start.levels[1],
            max_items=self.x.shape[1] if self.takes_sets else None,
            can_drop=self.drop > 0,
            history=trained.history,
        )

    def _start(self, z: Array, x: Array, key: Key) -> Amortised:
        """The denoiser before training."""
        items = x.reshape(-1, *x.shape[2:]) if self.takes_sets else x
        standardise = Standardise.fit(items)
        features = jax.vmap(standardise)(items).reshape(len(items), -1)
        # Sets of different sizes have no features in common that a regression could use.
        features = jnp.zeros((len(z), 0), z.dtype) if self.takes_sets else features
        regression = regress(z, features, self.parameters.law)
        first = jax.tree.map(lambda leaf: leaf[0], self._contexts(x[:1]))
        given = () if first.mask is None else (first.mask,)
        made = eqx.filter_eval_shape(self.embedding, first.x, *given)
        if made.ndim != 1:
            raise ValueError(f"embedding must give a vector, got shape {made.shape}")
        mlp = ResidualMLP(
            z.shape[1:],
            width=self.width,
            num_blocks=self.num_blocks,
            context_size=made.size,
            dropout=self.dropout,
            joins_context=True,
            key=key,
        )
        net = Told(self.embedding, mlp, jnp.zeros(made.size, made.dtype))
        scale = np.sqrt(np.asarray(regression.prior.eigenvalues))
        levels = self.sigma_min * float(scale.min()), self.sigma_max * float(scale.max())
        return Amortised(net, standardise, regression, levels)

    def _contexts(self, x: Array) -> Observed:
        """Contexts of simulations [n, ...], all of their items and all of them known."""
        mask = jnp.ones(x.shape[:2], bool) if self.takes_sets else None
        return Observed(x, mask, jnp.ones(len(x), bool) if self.drop > 0 else None)


@eqx.filter_jit
def _mean_loss(
    denoiser: Any, loss: ConditionalLoss, z: Float[Array, "n size"], context: Any, key: Key
) -> Scalar:
    """Over simulations and eight levels of noise, with the same noise for every denoiser."""
    levels = (jnp.arange(8, dtype=z.dtype) + 0.5) / 8

    def one(given: tuple[Array, Any, Key]) -> Scalar:
        z, context, key = given
        keys = jax.random.split(key, len(levels))
        return jnp.mean(jax.vmap(lambda u, k: loss(denoiser, z, u, context, key=k))(levels, keys))

    keys = jax.random.split(key, len(z))
    return jnp.mean(jax.lax.map(one, (z, context, keys), batch_size=min(len(z), 256)))


def _with_dropout(denoiser: Any, rate: float) -> Any:
    """A denoiser with another dropout in its network; that of the embedding stays."""

    def is_dropout(node: Any) -> bool:
        return isinstance(node, Dropout)

    mlp = jax.tree.map(
        lambda node: Dropout(rate) if is_dropout(node) else node,
        denoiser.net.mlp,
        is_leaf=is_dropout,
    )
    return eqx.tree_at(lambda d: d.net.mlp, denoiser, mlp)


def beside(checkpoint: str | Path) -> Path:
    """Where training on draws of a surrogate has its checkpoint."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}_surrogate{path.suffix}")


def split(key: Key, num: int, held_out: float) -> tuple[Int[Array, " n"], Int[Array, " m"]]:
    """Indices of the simulations to train on, and of those held out."""
    num_held_out = int(held_out * num)
    if not (0 < held_out < 1 and 2 <= num_held_out <= num - 2):
        raise ValueError(
            f"held_out must leave at least 2 of {num} simulations to each side, got {held_out}"
        )
    order = jax.random.permutation(key, num)
    return order[num_held_out:], order[:num_held_out]
