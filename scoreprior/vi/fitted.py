"""`FittedGuide`: an approximate posterior to draw from, evaluate, save, load and use again."""

import os
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreprior._run import Draws, fingerprint
from scoreprior._typing import Key, PyTree, Scalar
from scoreprior._util import check_count
from scoreprior.io import files
from scoreprior.problem import Position, Problem
from scoreprior.vi.diagnose import diagnose, warn_k_hat, warn_not_finite
from scoreprior.vi.frame import Frame, is_normalised
from scoreprior.vi.guides import IAF, AbstractGuide, FullRank, LowRank, MeanField
from scoreprior.vi.optimise import describe
from scoreprior.vi.paths import Paths

KIND = files.Kind("scoreprior.guide", 1, "guide", "FittedGuide.save")
GUIDES = {guide.__name__: guide for guide in (MeanField, LowRank, FullRank, IAF, Paths)}
BATCH_SIZE = 64
LEAST_DRAWS = 25  # fewer have no tail to fit


class FittedGuide(eqx.Module):
    """A guide with its parameters: an approximation `q` of the posterior of one problem.

    Made by `VI.fit` and `Pathfinder.fit`. It is an engine too: `infer(model, fitted, key=...)`
    draws from it again. `history` [step] is the bound at every step of the fit, one noisy estimate
    each; `interrupted` says whether Ctrl-C cut it short.
    """

    guide: AbstractGuide
    params: PyTree[Any]
    frame: Frame
    history: Float[Array, " step"]
    is_centred: bool = eqx.field(static=True)
    data: str = eqx.field(static=True)  # fingerprint of what the problem was given
    num_samples: int = eqx.field(static=True, default=1000)
    resample: bool = eqx.field(static=True, default=False)
    interrupted: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_count("num_samples", self.num_samples, least=LEAST_DRAWS)

    def sample(self, key: Key, num_samples: int) -> dict[str, Array]:
        """Independent positions, [num_samples, *site]; see `Problem.constrain` for their values."""
        check_count("num_samples", num_samples)
        return _sample(self, key, num_samples)[0]

    def log_prob(self, position: Position) -> Scalar:
        """`log q` of one position, in nats; use `jax.vmap` for many."""
        return _log_prob(self, self.frame.z(position))

    def run(
        self,
        problem: Problem,
        key: Key,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Draws:
        """Draws [1, num_samples] of the guide, weighed against the posterior of `problem`.

        `stats` hold `lp`, the log joint density, and `log_weight`, `lp - log q`. `extra` holds
        `elbo`, `log_evidence`, their standard errors `elbo_se` and `log_evidence_se`, and `khat`,
        all of `num_samples` fresh draws, and the `bound` at every step of the fit. Of these only
        `khat` and `bound`, up to a constant, where the density of a prior lacks its constant: in
        the centred form of one with an `EnergyDensity`. With `resample`, draws are taken anew from
        these by their Pareto-smoothed weights.

        Warns where k-hat is too large. Raises `ValueError` for a problem with other sites, in the
        other form or with other data than the one that was fitted, and for a `checkpoint`: there is
        nothing to resume.
        """
        if checkpoint is not None:
            raise ValueError("a fitted guide has nothing to resume: leave checkpoint out")
        problem = problem.centred() if self.is_centred else problem
        self._check(problem)
        return draw(self, problem, key, "fit a richer guide, or take more steps", stacklevel=3)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the guide to the folder `path`, replacing a guide saved there before.

        `config.json` and `model.safetensors`, as for priors. Raises `TypeError` for a guide of
        another library, and `FileExistsError` where `path` is something else.
        """
        if type(self.guide) not in GUIDES.values():
            raise TypeError(
                f"guide must be one of {sorted(GUIDES)} to be saved, got {self.guide!r}"
            )
        description = {
            "kind": type(self.guide).__name__,
            "settings": vars(self.guide),
            "shapes": [[name, list(shape)] for name, shape in self.frame.shapes],
            "is_centred": self.is_centred,
            "data": self.data,
            "num_samples": self.num_samples,
            "resample": self.resample,
            "interrupted": self.interrupted,
        }
        frame = {"loc": self.frame.loc, "scale": self.frame.scale, "history": self.history}
        arrays = {f"frame.{name}": np.asarray(array) for name, array in frame.items()}
        arrays |= {name: np.asarray(leaf) for name, leaf in _named(self.params).items()}
        files.write(Path(path), files.Stored(description, arrays, {}), KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str], problem: Problem) -> "FittedGuide":
        """The guide saved in the folder `path`, for the problem that it was fitted to.

        `problem` may be given in either form. Raises `FileNotFoundError` where nothing is there,
        and `ValueError` for a folder that is not a saved guide, was damaged, or holds the guide of
        another problem, saying what differs.
        """
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no folder: give the folder of a saved guide")
        stored = files.read(path, KIND)
        if warning := files.warn_if_rounded(stored.arrays):
            warnings.warn(f"{path}: {warning}", stacklevel=2)
        try:
            fitted = _decode(stored)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} does not hold a guide that this scoreprior can build: {error}"
            ) from error
        fitted._check(problem.centred() if fitted.is_centred else problem)
        return fitted

    def _check(self, problem: Problem) -> None:
        """Raise `ValueError` unless `problem` is the one that was fitted."""
        positions = jax.eval_shape(problem.initial, jax.random.key(0))
        found = {name: positions[name].shape for name in sorted(positions)}
        if found != dict(self.frame.shapes):
            raise ValueError(
                "the guide is of another problem: it was fitted to sites of shapes "
                f"{dict(self.frame.shapes)}, and this one has {found}"
            )
        if problem.is_centred != self.is_centred:
            form = "centred" if self.is_centred else "non-centred"
            raise ValueError(f"the guide was fitted in the {form} form: give the problem in it")
        if data_of(problem) != self.data:
            raise ValueError(
                "the guide is of another problem: the arguments of the model, its data among them, "
                "differ from those that it was fitted to; fit it again"
            )

    def __repr__(self) -> str:
        steps = f"{len(self.history)} steps"
        return f"FittedGuide({describe(self.guide)}, {self.frame.size} coordinates, {steps})"


def data_of(problem: Problem) -> str:
    """A fingerprint of the arguments of a model and of its parameters."""
    return fingerprint((problem.args, problem.kwargs, problem.sites.params))


def draw(fitted: FittedGuide, problem: Problem, key: Key, remedy: str, stacklevel: int) -> Draws:
    """Weighed draws of a guide, with warnings that end in `remedy`."""
    key_draw, key_choice = jax.random.split(key)
    positions, log_q = _sample(fitted, key_draw, fitted.num_samples)
    lp = np.asarray(_log_density(problem, positions))
    log_weight = lp - np.asarray(log_q)
    extra, weights = diagnose(log_weight)
    if not is_normalised(problem):
        extra = {"khat": extra["khat"]}
    extra["bound"] = (fitted.guide.history_axis,), np.asarray(fitted.history)
    stats = {"lp": lp, "log_weight": log_weight}
    warn_not_finite(log_weight, stacklevel + 1)
    warn_k_hat(float(extra["khat"][1]), fitted.num_samples, remedy, stacklevel + 1)
    rows = jax.tree.map(np.asarray, (positions, stats))
    if fitted.resample:
        num, p = fitted.num_samples, jnp.asarray(weights)
        chosen = np.asarray(jax.random.choice(key_choice, num, (num,), p=p))
        rows = jax.tree.map(lambda leaf: leaf[chosen], rows)
    positions, stats = jax.tree.map(lambda leaf: leaf[None], rows)
    return Draws(problem, positions, stats, fitted.interrupted, extra)


@eqx.filter_jit
def _sample(
    fitted: FittedGuide, key: Key, num_samples: int
) -> tuple[dict[str, Array], Float[Array, " n"]]:
    """Positions [n, *site] and their `log q`."""
    distribution, frame = fitted.guide.distribution(fitted.params), fitted.frame
    z, intermediates = distribution.sample_with_intermediates(key, (num_samples,))
    if fitted.guide.has_cheap_density:
        log_q = distribution.log_prob(z)
    else:
        log_q = distribution.log_prob(z, intermediates)
    return jax.vmap(frame.position)(z), log_q - frame.log_det


@eqx.filter_jit
def _log_prob(fitted: FittedGuide, z: Float[Array, " size"]) -> Scalar:
    return fitted.guide.distribution(fitted.params).log_prob(z) - fitted.frame.log_det


@eqx.filter_jit
def _log_density(problem: Problem, positions: dict[str, Array]) -> Float[Array, " n"]:
    num = len(jax.tree.leaves(positions)[0])
    return jax.lax.map(problem.log_density, positions, batch_size=min(num, BATCH_SIZE))


def _decode(stored: files.Stored) -> FittedGuide:
    config, arrays = dict(stored.description), dict(stored.arrays)
    kind = config.pop("kind")
    if kind not in GUIDES:
        raise ValueError(f"the guide is of kind {kind!r}, which this version does not know")
    guide = GUIDES[kind](**config.pop("settings"))
    shapes = tuple((name, tuple(shape)) for name, shape in config.pop("shapes"))
    loc, scale, history = (
        jnp.asarray(arrays.pop(f"frame.{name}")) for name in ("loc", "scale", "history")
    )
    frame = Frame(loc, scale, shapes)
    if not loc.shape == scale.shape == (frame.size,):
        raise ValueError(f"frame.loc and frame.scale must have shape ({frame.size},)")
    template = jax.eval_shape(lambda key: guide.init(key, frame.size), jax.random.key(0))
    wanted = {name: leaf.shape for name, leaf in _named(template).items()}
    found = {name: array.shape for name, array in arrays.items()}
    if wanted != found:
        raise ValueError(f"the guide needs arrays of shapes {wanted}, found {found}")
    leaves = [jnp.asarray(arrays[name]) for name in wanted]
    params = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return FittedGuide(guide, params, frame, history, **config)


def _named(tree: PyTree[Any]) -> dict[str, Any]:
    """Leaves by name: their path, the parts joined by dots."""
    paths = jax.tree.leaves_with_path(tree)
    return {
        "params." + jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in paths
    }


__all__ = ["FittedGuide", "data_of", "draw"]
