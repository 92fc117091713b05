"""Sequential rounds for one observation: simulate where the posterior is, and train again.

Truncated sequential neural posterior score estimation (Sharrock et al., "Sequential neural score
estimation", ICML 2024): each round draws parameters from the prior truncated to the region of
highest posterior density of the round before. On that region the proposal is proportional to the
prior, so the loss needs no correction. The posterior that comes out serves the one observation.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float

from scoreprior._typing import Key, PyTree, Scalar
from scoreprior._util import check_count, check_finite, check_positive
from scoreprior.prior import ScorePrior
from scoreprior.sbi.amortise import NPSE
from scoreprior.sbi.parameters import Parameters
from scoreprior.sbi.posterior import Posterior, push
from scoreprior.sbi.simulate import as_simulator, check_share, simulate_given
from scoreprior.sbi.simulators import AbstractSimulator
from scoreprior.train import checkpoint as files
from scoreprior.train.identity import described, digest, program

NUM_DRAWS = 2000
"""Posterior draws of which the region and the change between rounds are estimated."""

NUM_DIRECTIONS = 64


class Region(NamedTuple):
    """`{z : log q(z) >= threshold}` within a box, for a posterior `q`.

    The threshold is the quantile of `log q` of its own draws; the box, which spares most densities,
    holds all of them with a margin of half its width on either side.
    """

    law: ScorePrior
    threshold: Scalar
    low: Float[Array, " size"]
    high: Float[Array, " size"]

    @classmethod
    def of(cls, law: ScorePrior, key: Key, quantile: float) -> "Region":
        """That of highest density of `law` with all but about `quantile` of its mass."""
        draws = law.sample(key, (NUM_DRAWS,))
        threshold = jnp.quantile(_log_probs(law, draws), quantile)
        low, high = draws.min(0), draws.max(0)
        margin = (high - low) / 2
        return cls(law, threshold, low - margin, high + margin)

    def __call__(self, z: Float[Array, "n size"]) -> Bool[Array, " n"]:
        """Which of the points lie in the region, [n]."""
        inside = np.array(((z >= self.low[None]) & (z <= self.high[None])).all(1))
        candidates = z[inside]
        if len(candidates):
            # A length of few values, so that few programs are compiled.
            padded = 1 << (len(candidates) - 1).bit_length()
            filled = jnp.resize(candidates, (padded, z.shape[1]))
            above = np.asarray(_log_probs(self.law, filled) >= self.threshold)[: len(candidates)]
            inside[inside] = above
        return jnp.asarray(inside)


class Round(NamedTuple):
    """One round: what was simulated, and how far the posterior moved."""

    num_simulations: int  # all that have been trained on
    acceptance: float  # share of prior draws in the region; 1 in the first round
    change: float  # distance from the posterior before, in its standard deviations; NaN at first


class Sequential(NamedTuple):
    """The posterior of the last round, and all rounds. It serves the one observation only."""

    posterior: Posterior
    rounds: tuple[Round, ...]
    theta: PyTree[Array]  # [n, ...]
    x: Float[Array, "n *x"]
    interrupted: bool = False  # whether Ctrl-C came before the last round


class TSNPSE(eqx.Module):
    """Truncated sequential rounds of `NPSE` for one observation.

    **Arguments:** `prior`; `simulate`, a simulator as `sbi.simulate` takes one: a function of JAX,
    `simulate(key, theta)`, for one `x` [*x] of one draw of the prior, a `BlackBox` or a `Command`;
    `num_simulations` of each round, at most `num_rounds` of them; `quantile`, the posterior
    mass that a region may leave out; `tolerance`, below which change from one round to the next
    the rounds stop: the sliced Wasserstein distance of the posteriors in standard deviations, with
    the same noise for both, so that equal posteriors have distance zero. `None` takes all rounds.
    `settings` of `NPSE`, `training` of `NPSE.fit`; no `surrogate` unless it says so, which would
    draw from the whole prior. `max_failures`, the share of the draws of a round that may fail, as
    in `sbi.simulate`.
    """

    prior: dist.Distribution | Callable[[], Any]
    simulate: AbstractSimulator | Callable[[Key, Any], Array]
    num_simulations: int = eqx.field(static=True)
    num_rounds: int = eqx.field(static=True)
    quantile: float = eqx.field(static=True, default=1e-4)
    tolerance: float | None = eqx.field(static=True, default=None)
    settings: dict[str, Any] = eqx.field(default_factory=dict)
    training: dict[str, Any] = eqx.field(default_factory=dict)
    max_failures: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        as_simulator("simulate", self.simulate)
        check_count("num_simulations", self.num_simulations, least=4)
        check_count("num_rounds", self.num_rounds)
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must lie in (0, 1), got {self.quantile}")
        if self.tolerance is not None:
            check_positive("tolerance", self.tolerance)
        check_share("max_failures", self.max_failures)
        _check_names(
            "settings", self.settings, NPSE, {"key", "num_simulations", "store", "progress"}
        )
        _check_names("training", self.training, NPSE.fit, {"key", "checkpoint"})

    def fit(
        self, x_o: Float[Array, "*x"], *, key: Key, checkpoint: str | Path | None = None
    ) -> Sequential:
        """Run the rounds for the observation `x_o`.

        `checkpoint` is a folder: the same call goes on from what is there, in the middle of
        simulations and of training too, and ends with the same posterior; a greater `num_rounds`
        adds rounds, and `tolerance` and `max_failures` may change. `simulations-0001` and so on in
        it are stores of `sbi.simulate`, for `Simulations.load`. It needs the extra `sbi`.

        Ctrl-C ends with the last whole round, and raises `KeyboardInterrupt` in the first. An error
        has the whole rounds before it in its attribute `done`.

        **Errors:** `ValueError` before any work for an `x_o` that is not finite and a checkpoint of
        another run, naming what differs, and for an `x_o` of another shape than simulations have:
        with a black box, as soon as the first has arrived. `TooManyFailures` as `sbi.simulate`.
        `RuntimeError` where a region holds less than one prior draw in 100,000.
        """
        x_o = jnp.asarray(x_o)
        check_finite("x_o", x_o)
        parameters, simulator = Parameters.of(self.prior), as_simulator("simulate", self.simulate)
        shape = simulator.shape(_blank(parameters, 1), key)
        if shape is not None:
            self._check_shape(x_o, shape)
        folder = None
        if checkpoint is not None:
            folder = _Folder(Path(checkpoint), self._identity(parameters, x_o, key))
        job = _Job(parameters, simulator, x_o, folder)
        done: Sequential | None = None
        before: _Before | None = None
        try:
            while done is None or not self._is_last(done.rounds):
                number = 0 if done is None else len(done.rounds)
                keys = jax.random.split(jax.random.fold_in(key, number), 4)
                done, before = self._round(job, done, before, keys)
        except KeyboardInterrupt:
            if done is None:
                raise KeyboardInterrupt("interrupted before the end of the first round") from None
            return done._replace(interrupted=True)
        except Exception as error:
            if done is not None:
                error.done = done  # type: ignore[attr-defined]
                error.add_note(f"rounds kept in attribute done of this error: {len(done.rounds)}")
            raise
        return done

    def _round(
        self, job: "_Job", done: Sequential | None, before: "_Before | None", keys: Array
    ) -> tuple[Sequential, "_Before"]:
        draw, simulate, train, select = keys
        number = 0 if done is None else len(done.rounds)
        theta, acceptance = self._draws(job, number, before, draw)
        made = simulate_given(
            theta,
            job.simulator,
            key=simulate,
            store=None if job.folder is None else job.folder.simulations(number),
            max_failures=self.max_failures,
            progress=self.training.get("progress", True),
            check=functools.partial(self._check_shape, job.x_o),
        )
        theta, x, rounds = made.theta, made.x, ()
        if done is not None:
            theta = jax.tree.map(lambda *parts: jnp.concatenate(parts), done.theta, theta)
            x, rounds = jnp.concatenate([done.x, x]), done.rounds
        training: dict[str, Any] = {"surrogate": None} | self.training
        if job.folder is not None:
            training["checkpoint"] = job.folder.fit(number)
        npse = NPSE(job.parameters, (theta, x), **self.settings)
        posterior = npse.fit(key=train, **training)
        law = posterior.condition(job.x_o)
        change = np.nan if before is None else distance(before.law, law, select)
        rounds = (*rounds, Round(len(x), acceptance, change))
        return Sequential(posterior, rounds, theta, x), _Before(law, select)

    def _draws(
        self, job: "_Job", number: int, before: "_Before | None", key: Key
    ) -> tuple[PyTree[Array], float]:
        """Parameters of a round and their acceptance, from the checkpoint if they are there."""
        if job.folder is not None:
            found = job.folder.load(number, _blank(job.parameters, self.num_simulations))
            if found is not None:
                return found
        region = None if before is None else Region.of(before.law, before.key, self.quantile)
        found = draw_truncated(job.parameters, region, key, self.num_simulations)
        if job.folder is not None:
            job.folder.save(number, *found)
        return found

    def _is_last(self, rounds: tuple[Round, ...]) -> bool:
        is_settled = self.tolerance is not None and rounds[-1].change <= self.tolerance
        return is_settled or len(rounds) >= self.num_rounds

    def _check_shape(self, x_o: Array, shape: tuple[int, ...]) -> None:
        """Raise unless `x_o` fits simulations of this shape."""
        if getattr(self.settings.get("embedding"), "takes_sets", False):
            if not (x_o.ndim == len(shape) > 0 and x_o.shape[1:] == shape[1:]):
                raise ValueError(f"x_o must be a set of items {shape[1:]}, got shape {x_o.shape}")
            if not 1 <= len(x_o) <= shape[0]:
                raise ValueError(
                    f"x_o must hold from 1 to {shape[0]} items, as simulations, got {len(x_o)}"
                )
        elif x_o.shape != shape:
            raise ValueError(f"x_o must have the shape of a simulation, {shape}, got {x_o.shape}")

    def _identity(self, parameters: Parameters, x_o: Array, key: Key) -> dict[str, Any]:
        """What must agree for a run to be resumed; the rest is checked with each round's files."""
        training = {n: value for n, value in self.training.items() if n != "progress"}
        parts = {"settings": self.settings, "training": training}
        return {
            "platform": jax.default_backend(),
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "x_o": digest(x_o),
            "program of prior": program(lambda key: parameters.sample(key), key),
            "num_simulations": self.num_simulations,
            "quantile": self.quantile,
            **{name: described(sorted(part.items())) for name, part in parts.items()},
            **{f"arrays of {name}": digest(part) for name, part in parts.items()},
        }


class _Job(NamedTuple):
    """What all rounds have in common."""

    parameters: Parameters
    simulator: AbstractSimulator
    x_o: Array
    folder: "_Folder | None"


class _Before(NamedTuple):
    """The posterior of the round before, and the key of its region."""

    law: ScorePrior
    key: Key


class _Folder:
    """A directory with the parameters, the simulations and the training of every round."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        if path.exists() and not path.is_dir():
            raise ValueError(f"checkpoint must be a folder, got the file {path}")
        self.path, self.settings = path, settings

    def simulations(self, number: int) -> Path:
        """The store of the simulations of a round."""
        return self.path / f"simulations-{number + 1:04d}"

    def fit(self, number: int) -> Path:
        """The checkpoint of the training of a round."""
        return self.path / f"fit-{number + 1:04d}.safetensors"

    def load(self, number: int, theta: PyTree[np.ndarray]) -> tuple[PyTree[Array], float] | None:
        """Parameters of a round, like `theta`, and their acceptance, or `None`."""
        file = self._draws(number)
        if not file.exists():
            return None
        stored = files.read(file, {"theta": theta, "acceptance": _bits(0.0)}, self.settings)
        return stored["theta"], float(np.asarray(stored["acceptance"]).view(np.float64)[0])

    def save(self, number: int, theta: PyTree[Array], acceptance: float) -> None:
        """Keep them, before any is simulated."""
        state = {"theta": theta, "acceptance": _bits(acceptance)}
        files.write(self._draws(number), state, self.settings)

    def _draws(self, number: int) -> Path:
        return self.path / f"draws-{number + 1:04d}.safetensors"


def _blank(parameters: Parameters, num: int) -> PyTree[np.ndarray]:
    """Zeros in place of `num` draws of the prior."""
    one = jax.eval_shape(parameters.sample, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros((num, *leaf.shape), leaf.dtype), one)


def _bits(value: float) -> np.ndarray:
    """Those of a double, which JAX rounds in single precision."""
    return np.array([value], np.float64).view(np.uint32)


def _check_names(
    name: str, given: dict[str, Any], taker: Callable[..., Any], own: set[str]
) -> None:
    """Raise for arguments that `taker` does not have, or that are the rounds' `own`."""
    allowed = set(inspect.signature(taker).parameters) - {"self", "prior", "simulations", *own}
    if unknown := sorted(set(given) - allowed):
        raise ValueError(f"{name} must be among {sorted(allowed)}, got {unknown}")


def draw_truncated(
    parameters: Parameters, region: Region | None, key: Key, num: int
) -> tuple[PyTree[Array], float]:
    """`num` draws of the prior in the region, by rejection, and the share that was accepted."""
    kept, num_kept, num_tried, batch = [], 0, 0, max(num, 1000)
    to_vectors = jax.vmap(parameters.to_vector)
    while num_kept < num:
        keys = jax.random.split(jax.random.fold_in(key, num_tried), batch)
        theta = jax.vmap(parameters.sample)(keys)
        inside = np.ones(batch, bool) if region is None else np.asarray(region(to_vectors(theta)))
        kept.append(jax.tree.map(lambda leaf, inside=inside: leaf[inside], theta))
        num_kept, num_tried = num_kept + int(inside.sum()), num_tried + batch
        if num_kept < 1e-5 * num_tried and num_tried >= 1e6:
            raise RuntimeError(
                f"the truncated prior holds {num_kept} of {num_tried} prior draws: take fewer "
                "rounds, or a prior that is nearer to the posterior"
            )
    theta = jax.tree.map(lambda *parts: jnp.concatenate(parts)[:num], *kept)
    return theta, num_kept / num_tried


def distance(old: ScorePrior, new: ScorePrior, key: Key) -> float:
    """Sliced Wasserstein-2 distance of two laws of `z`, whitened by the covariance of the old."""
    noise, directions = jax.random.split(key)
    u = jax.random.normal(noise, (NUM_DRAWS, *old.event_shape), old.flow.moments.mean.dtype)
    moments = old.flow.moments
    white = [jax.vmap(lambda z: moments.whiten(z, 0.0))(push(law.flow, u)) for law in (old, new)]
    axes = jax.random.normal(directions, (old.event_shape[0], NUM_DIRECTIONS), u.dtype)
    axes = axes / jnp.linalg.norm(axes, axis=0)[None]
    a, b = (jnp.sort(z @ axes, axis=0) for z in white)
    return float(jnp.sqrt(jnp.mean((a - b) ** 2)))


@eqx.filter_jit
def _log_probs(law: ScorePrior, z: Float[Array, "n size"]) -> Float[Array, " n"]:
    return law.log_prob(z)
