"""Reference networks `F(x, log_sigma, context)`, conditioned on the noise level.

Any callable pytree of that signature serves as well. The ones here describe themselves in plain
JSON, `config()`, from which `from_config` builds them anew.
"""

from collections.abc import Mapping
from typing import Any

from scoreprior._typing import Key
from scoreprior.nn.embed import Dropout, MixedPrecision, with_dropout
from scoreprior.nn.mlp import ResidualMLP
from scoreprior.nn.unet import UNet

_NETWORKS = {"ResidualMLP": ResidualMLP, "UNet": UNet}


def from_config(config: Mapping[str, Any], *, key: Key) -> ResidualMLP | UNet:
    """A network of the class and with the arguments that `config()` gave, freshly initialised."""
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in _NETWORKS:
        raise ValueError(f"config must name one of {sorted(_NETWORKS)}, got {name!r}")
    try:
        return _NETWORKS[name](**arguments, key=key)
    except TypeError as error:
        raise ValueError(f"config does not fit {name}: {error}") from error


__all__ = ["Dropout", "MixedPrecision", "ResidualMLP", "UNet", "from_config", "with_dropout"]
