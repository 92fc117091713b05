"""Amortised posteriors on disk: what was learnt is in the file, and what is code is given again.

A folder as for priors, with `config.json` and `model.safetensors`. The prior, a distribution or a
model, is Python code, and so is an embedding of the user's; no file holds code. They are given on
loading, and checked by values that the file keeps of them: `theta` and the density of a few `z`,
and what the embedding says of one observation.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from scoreprior._typing import PyTree
from scoreprior.io import codec, files
from scoreprior.sbi.conditional import Amortised, BoxRegression, Regression, Told
from scoreprior.sbi.embed import Flat, SetEncoder, Standardise
from scoreprior.sbi.parameters import Parameters
from scoreprior.train import History

POSTERIOR = files.Kind("scoreprior.posterior", 1, "posterior", "sbi.Posterior.save")
JOINT = files.Kind("scoreprior.joint_posterior", 1, "posterior", "sbi.JointPosterior.save")

NUM_PROBES = 4
"""Values of `z` at which a prior is compared with that of training."""


def write(
    path: str | os.PathLike[str],
    kind: files.Kind,
    parts: Mapping[str, Any],
    parameters: Parameters,
    history: History | None,
) -> None:
    """Write `parts`, which the codec of priors knows, with what tells the prior from another."""
    z = jax.random.normal(jax.random.key(0), (NUM_PROBES, parameters.size))
    sites = (parameters.names, parameters.shapes, parameters.is_model)
    told = {"sites": sites, "probes": (z, *_probe(parameters, z))}
    config, arrays = codec.encode({**parts, **told})
    if history is not None:
        arrays |= {f"history.{name}": np.asarray(a) for name, a in history._asdict().items()}
    files.write(Path(path), files.Stored(config, arrays, {}), kind)


def read(
    path: str | os.PathLike[str],
    kind: files.Kind,
    prior: dist.Distribution | Callable[[], Any] | Parameters,
    build: Callable[..., Any],
) -> Any:
    """`build(parts, parameters, history)` of what `write` wrote, for the prior of training.

    Raises `FileNotFoundError` where nothing is there and `ValueError` for a folder that holds no
    such posterior or was damaged, and for another prior, saying what differs.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: give the folder of a saved posterior")
    parameters = prior if isinstance(prior, Parameters) else Parameters.of(prior)
    stored = files.read(path, kind)
    # Losses are no numbers of JAX: they keep the precision in which they were written.
    losses = {n: stored.arrays.pop(n) for n in sorted(stored.arrays) if n.startswith("history.")}
    if warning := files.warn_if_rounded(stored.arrays):
        warnings.warn(f"{path}: {warning}", stacklevel=4)
    try:
        parts = codec.decode(stored.description, stored.arrays)
        _check_prior(parameters, parts.pop("sites"), parts.pop("probes"))
        history = History(*(losses[f"history.{n}"] for n in History._fields)) if losses else None
        return build(parts, parameters, history)
    except KeyError as error:
        raise ValueError(f"{path} does not hold a whole posterior: it lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold a posterior that can be built of what was given: {error}"
        ) from error


def amortised_parts(denoiser: Any, max_items: int | None) -> dict[str, Any]:
    """The parts of an `Amortised`; raises `TypeError` for another denoiser."""
    if type(denoiser) is not Amortised:
        raise TypeError(
            f"denoiser must be that of NPSE.fit to be saved, got {type(denoiser).__name__}"
        )
    net, regression = denoiser.net, denoiser.regression
    return {
        "mlp": net.mlp,
        "null": net.null,
        "embedding": _describe(net.embedding, denoiser.standardise, max_items),
        "regression": (
            type(regression).__name__,
            *(getattr(regression, name) for name in _fields(type(regression))),
        ),
        "levels": denoiser.levels,
    }


def amortised(
    parts: dict[str, Any],
    standardise: Standardise,
    max_items: int | None,
    embedding: Callable[..., Array] | None,
) -> Amortised:
    """The `Amortised` of the parts, with the saved weights in the user's `embedding`."""
    embedding = _rebuild(parts["embedding"], standardise, max_items, embedding)
    net = Told(embedding, parts["mlp"], parts["null"])
    name, *values = parts["regression"]
    kind = {kind.__name__: kind for kind in (Regression, BoxRegression)}[name]
    regression = kind(**dict(zip(_fields(kind), values, strict=True)))
    return Amortised(net, standardise, regression, parts["levels"])


def ranges(standardise: Standardise) -> tuple[Array, ...]:
    """The fields of `standardise`, of which the constructor makes it again."""
    return tuple(getattr(standardise, name) for name in _fields(Standardise))


def _probe(parameters: Parameters, z: Array) -> tuple[Float[Array, "n k"], Float[Array, " n"]]:
    """All of `theta` as rows, and the log density of `z`."""
    theta = jax.tree.leaves(jax.vmap(parameters.from_vector)(z))
    rows = jnp.concatenate([leaf.reshape(len(z), -1) for leaf in theta], 1)
    return rows, jax.vmap(parameters.log_prob)(z)


def _check_prior(parameters: Parameters, sites: tuple[Any, ...], probes: tuple[Array, ...]) -> None:
    found = (parameters.names, parameters.shapes, parameters.is_model)
    if found != sites:
        raise ValueError(
            f"prior must be that of training, with sites {sites[0]} of shapes {sites[1]}, got "
            f"{found[0]} of shapes {found[1]}"
        )
    z, theta, log_prob = (np.asarray(probe) for probe in probes)
    ours, density = (np.asarray(value) for value in _probe(parameters, jnp.asarray(z)))
    # What single precision and another device may change, and no more.
    near = 1e-3 * theta.std(0) + 2e-6 * np.abs(theta)
    is_same = (np.abs(ours - theta) <= near).all(1)
    is_same &= np.abs(density - log_prob) <= 1e-3 * (1 + np.abs(log_prob))
    if not is_same.all():
        first = int(np.argmin(is_same))
        raise ValueError(
            f"prior must be that of training, which at z = {z[first]} has theta = {theta[first]} "
            f"and log density {log_prob[first]:.6g}, got {ours[first]} and {density[first]:.6g}"
        )


def _describe(embedding: Any, standardise: Standardise, max_items: int | None) -> tuple[Any, ...]:
    """Name, arguments where it is the library's own, names of arrays, arrays, and an output."""
    arrays = _arrays(embedding)
    name = getattr(embedding, "__name__", type(embedding).__name__)
    output = embedding(*_input(standardise, max_items))
    return name, _settings(embedding), tuple(arrays), tuple(arrays.values()), output


def _rebuild(
    described: tuple[Any, ...],
    standardise: Standardise,
    max_items: int | None,
    template: Callable[..., Array] | None,
) -> Any:
    name, settings, names, leaves, output = described
    if template is None:
        if settings is None:
            raise ValueError(
                f"embedding must be given: the posterior was trained with {name!r}, which is none "
                "of this library's; build it with the same arguments, and its weights are replaced "
                "by those of the file"
            )
        template = Flat() if name == "Flat" else _set_encoder(settings)
    wanted = dict(zip(names, (leaf.shape for leaf in leaves), strict=True))
    found = {name: leaf.shape for name, leaf in _arrays(template).items()}
    if found != wanted:
        raise ValueError(
            f"embedding must have the arrays of that of training, {wanted}, got {found}"
        )
    params, rest = eqx.partition(template, eqx.is_array)
    embedding = eqx.combine(jax.tree.unflatten(jax.tree.structure(params), leaves), rest)
    again, output = np.asarray(embedding(*_input(standardise, max_items))), np.asarray(output)
    # Not of another device's matrix products, which are good to a per mille.
    near = 1e-2 * np.abs(output).max()
    if again.shape != output.shape or not np.abs(again - output).max() <= near:
        raise ValueError(
            f"embedding must be that of training, {name!r}, got one that makes another vector of "
            "the same observation and weights: a function or a number in it differs"
        )
    return embedding


def _settings(embedding: Any) -> tuple[Any, ...] | None:
    """Arguments that give an embedding of this library again; `None` for any other."""
    if type(embedding) is Flat:
        return ()
    if type(embedding) is not SetEncoder:
        return None
    first, second = embedding.first, embedding.second
    settings = (embedding.item_shape, second.out_size, first.width_size, first.depth)
    is_same = jax.tree.structure(_set_encoder(settings)) == jax.tree.structure(embedding)
    return settings if is_same else None


def _set_encoder(settings: tuple[Any, ...]) -> SetEncoder:
    item_shape, size, width, depth = settings
    return SetEncoder(item_shape, size, width=width, depth=depth, key=jax.random.key(0))


def _input(standardise: Standardise, max_items: int | None) -> tuple[Array, ...]:
    """One standardised observation, the same at all times, and its mask where it is a set."""
    some = () if max_items is None else (max_items,)
    shape = (*some, *standardise.mean.shape)
    x = jnp.cos(jnp.arange(np.prod(shape), dtype=standardise.mean.dtype)).reshape(shape)
    return (x,) if max_items is None else (x, jnp.ones(some, bool))


def _arrays(tree: PyTree[Any]) -> dict[str, Array]:
    """Arrays by the path of fields that leads to them."""
    leaves = jax.tree.leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _fields(kind: type) -> tuple[str, ...]:
    return tuple(kind.__dataclass_fields__)


__all__ = ["JOINT", "POSTERIOR", "amortised", "amortised_parts", "ranges", "read", "write"]
