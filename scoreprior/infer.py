"""`infer`: a model and an engine in, a posterior as an ArviZ `DataTree` out.

Every engine solves the same `Problem`, so changing the algorithm changes one argument. Nothing in
the tree depends on the form in which the engine worked: `posterior` holds values of the model's own
sites, the image `x` and not its noise.
"""

import inspect
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scoreprior._run import Draws
from scoreprior._typing import Key
from scoreprior._util import check_count
from scoreprior.problem import Problem, Site, Sites

# ArviZ and xarray take longer to load than everything else together: not before they are needed.
if TYPE_CHECKING:
    from xarray import DataTree
else:
    DataTree = Any

MAX_R_HAT = 1.05


def infer(
    model: Callable[..., Any] | Problem,
    engine: Any,
    /,
    *args: Any,
    key: Key,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    num_prior: int = 0,
    posterior_predictive: bool = False,
    **kwargs: Any,
) -> DataTree:
    """Infer the latent sites of the NumPyro model `model(*args, **kwargs)` with `engine`.

    A `Problem` may stand in place of the model. Without further arguments it is taken as it is;
    with them, it is `problem.with_data(*args, **kwargs)`, so that many data sets of the same shapes
    share compiled programs.

    **Arguments:** `engine`, such as `NUTS(...)`. `progress`: show a bar. `checkpoint`: a directory
    from which the same call resumes a stopped run. `num_prior`: number of prior draws to add, with
    their simulated data. `posterior_predictive`: add data simulated at every posterior draw.

    **Returns** groups `posterior`, `sample_stats`, `observed_data` and, where asked, `prior`,
    `prior_predictive` and `posterior_predictive`, with the provenance of the run in the attributes.
    What an engine gives beside numbers per draw, such as `log_evidence`, is in `sample_stats` too.
    Axes are named by `dims`, a list of names per site, with values `coords`. By default the axes of
    plates take the names of the plates, those of an image under a prior are `row` and `col`, shared
    by every site of the same shape, and other axes are `{site}_dim_0` and so on.

    Ctrl-C returns the draws made so far. Trouble, such as divergences or an R-hat above 1.05, is
    reported once as a warning, with the remedy. Raises `ValueError` before any compilation for a
    model that cannot be treated (see `Problem.from_model`) and for arguments that do not fit it.
    """
    import arviz as az

    _check_arguments(model, engine, args, key, num_prior)
    problem = _problem(model, args, kwargs)
    names = name_axes(problem.sites, dims or {})
    _check_coords(problem.sites, names, coords or {})
    key_run, key_prior, key_predictive = jax.random.split(key, 3)

    start = time.perf_counter()
    draws = engine.run(problem, key_run, progress=progress, checkpoint=checkpoint)
    sampling_time = time.perf_counter() - start

    values = _constrain(draws.problem, draws.positions)
    groups: dict[str, dict[str, Any]] = {"posterior": values, "sample_stats": draws.stats}
    if posterior_predictive:
        groups["posterior_predictive"] = _predict(problem, values, key_predictive)
    if num_prior:
        groups["prior"], groups["prior_predictive"] = _prior(problem, num_prior, key_prior)
    if problem.sites.data:
        groups["observed_data"] = problem.sites.data
    with warnings.catch_warnings():
        # Of ensembles, which may well have more chains than draws.
        warnings.filterwarnings("ignore", "Found chain dimension to be longer than draw")
        tree = az.from_dict(
            jax.tree.map(np.asarray, groups),
            dims=names,
            coords=dict(coords or {}),
            attrs={"/": _provenance(engine, draws, sampling_time)},
        )
    tree["sample_stats"].dataset = tree["sample_stats"].to_dataset().assign(draws.extra)
    _warn_r_hat(tree)
    return tree


def _problem(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Problem:
    if not isinstance(model, Problem):
        return Problem.from_model(model, *args, **kwargs)
    return model.with_data(*args, **kwargs) if args or kwargs else model


def name_axes(sites: Sites, dims: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """A name for every axis of every site, those in `dims` first."""
    kinds = sites.priors, sites.latents, sites.deterministic, sites.observed
    every = {name: site for kind in kinds for name, site in kind.items()}
    for name, own in dims.items():
        if name not in every:
            raise ValueError(f"dims must name sites of the model, {sorted(every)}, got {name!r}")
        if len(own) != len(every[name].shape):
            raise ValueError(
                f"dims[{name!r}] must have a name for each of the {len(every[name].shape)} axes of "
                f"shape {every[name].shape}, got {list(own)}"
            )
    images: dict[tuple[int, ...], list[str]] = {}
    for site in sites.priors.values():
        free = _free(site)
        if len(free) > 1:
            prefix = f"{site.name}_" if images else ""
            images.setdefault(free, _axes(site.name, prefix, len(free)))
    named: dict[str, list[str]] = {}
    for name, site in every.items():
        free = _free(site)
        own = iter(images.get(free) or _axes(name, f"{name}_", len(free)))
        named[name] = [_plate(plate, every) if plate else next(own) for plate in site.plates]
    return named | {name: list(own) for name, own in dims.items()}


def _free(site: Site) -> tuple[int, ...]:
    """Sizes of the axes that no plate names."""
    return tuple(n for n, plate in zip(site.shape, site.plates, strict=True) if plate is None)


def _axes(name: str, prefix: str, rank: int) -> list[str]:
    if rank == 2:
        return [f"{prefix}row", f"{prefix}col"]
    return [f"{name}_dim_{axis}" for axis in range(rank)]


def _plate(plate: str, sites: Mapping[str, Site]) -> str:
    # An axis cannot have the name of a variable.
    return f"{plate}_dim" if plate in sites else plate


@eqx.filter_jit
def _constrain(problem: Problem, positions: dict[str, Array]) -> dict[str, Array]:
    """Model-space values [chain, draw, ...], all chains at once and draw after draw."""
    by_draw = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), positions)
    values = jax.lax.map(jax.vmap(problem.constrain), by_draw)
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), values)


@eqx.filter_jit
def _predict(problem: Problem, values: dict[str, Array], key: Key) -> dict[str, Array]:
    """Simulated data [chain, draw, ...] at model-space values [chain, draw, ...]."""
    shape = next(iter(values.values())).shape[:2]
    keys = jax.random.split(key, shape)
    return jax.lax.map(lambda row: jax.vmap(problem.predict)(*row), (keys, values))


@eqx.filter_jit
def _prior(problem: Problem, num_draws: int, key: Key) -> tuple[dict[str, Array], dict[str, Array]]:
    """Prior draws [1, draw, ...] and data simulated from them."""
    key_values, key_data = jax.random.split(key)
    keys = jax.random.split(key_values, num_draws)
    values = jax.lax.map(lambda key: problem.constrain(problem.initial(key)), keys)
    values = jax.tree.map(lambda leaf: leaf[None], values)
    return values, _predict(problem, values, key_data)


def _provenance(engine: Any, draws: Draws, sampling_time: float) -> dict[str, Any]:
    return {
        "inference_library": "scoreprior",
        "inference_library_version": _version(),
        "jax_version": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "engine": _describe(engine),
        "problem": repr(draws.problem),
        "sampling_time": sampling_time,
        "interrupted": int(draws.interrupted),
    }


def _is_key(key: Any) -> bool:
    """Whether `key` is a typed random key or, in the older style, its words."""
    if not isinstance(key, jax.Array):
        return False
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == 0 if typed else key.dtype == jnp.uint32 and key.ndim == 1


def _describe(engine: Any) -> str:
    """The engine with all its settings, defaults included."""
    settings = ", ".join(f"{name}={value!r}" for name, value in vars(engine).items())
    return f"{type(engine).__name__}({settings})"


def _version() -> str:
    try:
        return metadata.version("scoreprior")
    except metadata.PackageNotFoundError:
        return "not installed"


def _warn_r_hat(tree: DataTree) -> None:
    import arviz as az

    posterior = tree["posterior"].dataset
    if posterior.sizes["chain"] < 2 or posterior.sizes["draw"] < 20:
        return
    r_hat = {str(name): float(worst.max()) for name, worst in az.rhat(posterior).items()}
    bad = {name: worst for name, worst in r_hat.items() if worst > MAX_R_HAT}
    if bad:
        found = ", ".join(f"{worst:.2f} for {name!r}" for name, worst in bad.items())
        warnings.warn(
            f"chains disagree: the largest R-hat is {found}, above {MAX_R_HAT}; run longer, and if "
            "that does not help, the posterior may have several modes",
            stacklevel=3,
        )


def _check_arguments(
    model: Any, engine: Any, args: tuple[Any, ...], key: Any, num_prior: Any
) -> None:
    model = model.model if isinstance(model, Problem) else model
    if not callable(model):
        raise TypeError(f"model must be a NumPyro model, a callable, got {model!r}")
    if isinstance(engine, type) or not callable(getattr(engine, "run", None)):
        raise TypeError(f"engine must be an engine such as NUTS(), got {engine!r}")
    if not _is_key(key):
        raise TypeError(f"key must be a random key such as jax.random.key(0), got {key!r}")
    check_count("num_prior", num_prior, least=0)
    reserved = {
        name
        for name, parameter in inspect.signature(infer).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    signature = inspect.signature(model)
    free = signature.parameters.keys() - signature.bind_partial(*args).arguments.keys()
    if clash := sorted(reserved & free):
        raise ValueError(
            f"the model has an argument with the name of an argument of infer, {clash[0]!r}: "
            f"rename it, or pass lambda *args: model(*args, {clash[0]}=...) as the model"
        )


def _check_coords(
    sites: Sites, names: Mapping[str, Sequence[str]], coords: Mapping[str, Any]
) -> None:
    shapes = {name: site.shape for kind in sites[:4] for name, site in kind.items()}
    sizes = {dim: n for name in names for dim, n in zip(names[name], shapes[name], strict=True)}
    for dim, values in coords.items():
        if dim not in sizes:
            raise ValueError(f"coords must name dims, {sorted(sizes)}, got {dim!r}")
        if len(values) != sizes[dim]:
            raise ValueError(
                f"coords[{dim!r}] must have {sizes[dim]} values, one per entry, got {len(values)}"
            )


__all__ = ["infer"]
