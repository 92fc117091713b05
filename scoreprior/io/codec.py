"""The parts of a prior as JSON and named arrays, and back.

A part is written as `{"kind": its class, field: value, ...}`, an array as `{"array": its name}`,
the name being the path of fields that leads to it, and a reference network by the arguments it was
built with. Classes are found in the table below: nothing is imported by a name out of a file.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from scoreprior import denoise, density, flow, gaussian, nn
from scoreprior._typing import PyTree

PARTS = (
    *(denoise.Calibrated, denoise.Conditioned, denoise.Network, denoise.Rescaled),
    *(denoise.Empirical, denoise.Gaussian, denoise.GaussianMixture, denoise.Smoothed),
    *(denoise.BlurredUniform, denoise.Subspace),
    *(denoise.EnergyNetwork, denoise.InnerProduct, denoise.SquaredDistance),
    *(denoise.CleanPrediction, denoise.NoisePrediction, denoise.ScorePrediction),
    *(denoise.VPrediction, denoise.VelocityPrediction),
    *(denoise.Cosine, denoise.Discrete, denoise.FlowMatching, denoise.SubVP, denoise.VE),
    denoise.VP,
    *(density.BoundDensity, density.EnergyDensity, density.FlowDensity, density.ScoreOnly),
    *(density.Exact, density.Hutchinson, density.ScoreGradient),
    *(flow.Adaptive, flow.FixedGrid, flow.Flow, flow.Multistep, flow.RungeKutta),
    *(flow.ArctanTime, flow.LogRatioTime, flow.LogTime, flow.PowerTime),
    *(gaussian.Eigenbasis, gaussian.HartleyBasis, gaussian.HouseholderBasis),
    *(gaussian.KroneckerBasis, gaussian.Moments, gaussian.StandardBasis),
)
"""What can be saved: classes whose constructor takes their fields."""

_BY_NAME = {part.__name__: part for part in PARTS}
_NETWORKS = (nn.ResidualMLP, nn.UNet)


class Encoded(NamedTuple):
    """Parts as plain JSON, and their arrays by name."""

    config: Any
    arrays: dict[str, np.ndarray]


def encode(parts: Mapping[str, Any]) -> Encoded:
    """The named `parts`; raises `TypeError` saying which of them cannot be saved."""
    arrays: dict[str, np.ndarray] = {}
    return Encoded({name: _encode(part, name, arrays) for name, part in parts.items()}, arrays)


def decode(config: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parts that `encode` wrote.

    Raises `ValueError` saying where the config and the arrays do not make them.
    """
    if not isinstance(config, dict):
        raise ValueError(f"the section 'prior' must be a JSON object, got {config!r}")
    used: set[str] = set()
    parts = {name: _decode(part, arrays, name, used) for name, part in config.items()}
    if extra := sorted(arrays.keys() - used):
        raise ValueError(f"the array {extra[0]!r} belongs to no part of the config")
    return parts


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, jax.Array | np.ndarray):
        arrays[path] = np.asarray(value)
        return {"array": path}
    if type(value) in PARTS:
        fields = {name: getattr(value, name) for name in _field_names(type(value))}
        encoded = {name: _encode(field, f"{path}.{name}", arrays) for name, field in fields.items()}
        return {"kind": type(value).__name__, **encoded}
    if type(value) in _NETWORKS:
        arrays.update(_weights(value, path))
        return {"network": value.config()}
    if isinstance(value, tuple):
        return [_encode(item, f"{path}.{i}", arrays) for i, item in enumerate(value)]
    raise TypeError(
        f"{path} is a {type(value).__name__}, which cannot be saved: a file holds the library's "
        "own denoisers, moments, solvers and densities, and networks of scoreprior.nn. Save the "
        "weights of another network with its own library, and build the prior around it again"
    )


def _weights(net: Any, path: str) -> dict[str, np.ndarray]:
    """Weights by name, once it is sure that the arguments of `net` give the same structure."""
    template = _template(net.config())
    if _shapes(template) != _shapes(net):
        raise TypeError(
            f"{path} is a {type(net).__name__} altered after it was built, which cannot be saved: "
            "its arguments do not give it back"
        )
    return {f"{path}.{name}": np.asarray(leaf) for name, leaf in _named(net).items()}


def _decode(config: Any, arrays: Mapping[str, np.ndarray], path: str, used: set[str]) -> Any:
    if isinstance(config, list):
        items = enumerate(config)
        return tuple(_decode(item, arrays, f"{path}.{i}", used) for i, item in items)
    if not isinstance(config, dict):
        return config
    if "array" in config:
        return _take(arrays, config["array"], used)
    if "network" in config:
        return _decode_network(config["network"], arrays, path, used)
    part = _BY_NAME.get(config.get("kind", ""))
    if part is None:
        raise ValueError(
            f"{path} is of kind {config.get('kind')!r}, which this version of scoreprior does not "
            "know"
        )
    names = config.keys() - {"kind"}
    if wrong := sorted((names ^ set(_field_names(part))) - _optional(part)):
        raise ValueError(f"{path}, a {part.__name__}, has a missing or unknown key {wrong[0]!r}")
    fields = {name: _decode(config[name], arrays, f"{path}.{name}", used) for name in names}
    try:
        return part(**fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not make a {part.__name__}: {error}") from error


def _decode_network(
    config: Any, arrays: Mapping[str, np.ndarray], path: str, used: set[str]
) -> PyTree[Any]:
    try:
        template = _template(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not make a network: {error}") from error
    leaves = []
    for name, leaf in _named(template).items():
        array = _take(arrays, f"{path}.{name}", used)
        if array.shape != leaf.shape:
            raise ValueError(
                f"the array '{path}.{name}' must have shape {leaf.shape}, got {array.shape}"
            )
        leaves.append(array)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _take(arrays: Mapping[str, np.ndarray], name: Any, used: set[str]) -> jax.Array:
    if name not in arrays:
        raise ValueError(f"the array {name!r} is missing")
    used.add(name)
    return jnp.asarray(arrays[name])


def _field_names(part: Any) -> tuple[str, ...]:
    if dataclasses.is_dataclass(part):
        return tuple(field.name for field in dataclasses.fields(part))
    return part._fields


def _optional(part: Any) -> set[str]:
    """Fields with a default, which a file from before they existed lacks."""
    if not dataclasses.is_dataclass(part):
        return set(part._field_defaults)
    return {
        field.name for field in dataclasses.fields(part) if field.default is not dataclasses.MISSING
    }


def _template(config: Any) -> PyTree[Any]:
    """The network's structure, with shapes in place of weights."""
    return eqx.filter_eval_shape(lambda key: nn.from_config(config, key=key), jax.random.key(0))


def _named(tree: PyTree[Any]) -> dict[str, Any]:
    """Leaves by name: their path, the parts joined by dots."""
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _shapes(tree: PyTree[Any]) -> Any:
    return jax.tree.structure(tree), {name: leaf.shape for name, leaf in _named(tree).items()}
