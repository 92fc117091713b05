"""Priors on disk: a folder with `config.json` and `model.safetensors`; and the bundled priors.

    scoreprior.save("my_prior", prior, metadata={"data": "...", "licence": "..."})
    prior = scoreprior.load("my_prior")

A prior comes back bit for bit: its denoiser, moments, noise levels, solver and density policy.
Files hold numbers and names of this library's own classes; no code runs when one is read. Bundled
with the package:

- `"digits"`: handwritten digits of 8x8 pixels, in grey levels. The 17 levels 0, ..., 16 of the
  originals are dequantised, `x + U[0, 1)`, so an image lives in [0, 17).
- `"radio"`: radio sources of 32x32 pixels of 4 micro-arcseconds, such as black holes are seen
  among: rings, disks, double sources and blobs. It is a law of unconstrained `z`, and the image in
  units of its total flux is `softplus(z) / sum(softplus(z))`; `load("radio", context="ring")` is
  the law of one group of shapes, `"ring"`, `"disk"`, `"double"` or `"blob"`.
"""

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scoreprior.io import codec, files
from scoreprior.prior import ScorePrior

_WEIGHTS = Path(__file__).parents[1] / "weights"
BUNDLED = ("digits", "radio")
"""Names of the priors that ship with the package."""


def save(
    path: str | os.PathLike[str], prior: ScorePrior, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `prior` to the folder `path`, replacing a prior saved there before.

    **Arguments:** `metadata`, JSON kept beside the prior: its training data, licence, held-out
    loss, whatever its user should know.

    Raises `TypeError` naming the part of the prior that cannot be saved, such as a network of
    another library, and `FileExistsError` where `path` is something else.
    """
    if not isinstance(prior, ScorePrior):
        raise TypeError(f"prior must be a ScorePrior, got {type(prior).__name__}")
    if prior.batch_shape:
        raise ValueError(f"prior must have no batch shape, got {prior.batch_shape}")
    parts = {"flow": prior.flow, "density": prior.density}
    encoded = codec.encode(parts)
    files.write(Path(path), files.Stored(*encoded, files.plain(metadata or {})))


def load(
    path_or_name: str | os.PathLike[str],
    *,
    context: str | None = None,
    expect: Mapping[str, Any] | None = None,
) -> ScorePrior:
    """The prior saved in a folder, or bundled under a name: `load("digits")`.

    **Arguments:** `context`, a name among the `contexts` of the metadata: the prior given that
    context instead of the one it was saved with; see `ScorePrior.with_context`. `expect`: what the
    metadata must say, such as the scale of the pixels of the operator,
    `expect={"pixel_micro_arcseconds": 4.0}`, which no array shows; numbers may differ by rounding,
    one part in a million.

    A folder with the name of a bundled prior is reached as `Path(...)`. Arrays keep the precision
    in which they were saved; where JAX cannot, because 64-bit numbers are off, it warns.

    Raises `FileNotFoundError` where nothing is there, and `ValueError` for a folder that is not a
    saved prior or was damaged, saying which file and what to do, that has no such context, or
    whose metadata lack what is expected or say otherwise.
    """
    path = _find(path_or_name)
    stored = files.read(path)
    _check_expected(path_or_name, stored.metadata, files.plain(expect or {}, "expect"))
    if warning := files.warn_if_rounded(stored.arrays):
        warnings.warn(f"{path}: {warning}", stacklevel=2)
    try:
        parts = codec.decode(stored.description, stored.arrays)
        if parts.keys() != {"flow", "density"}:
            raise ValueError("the section 'prior' must have the keys 'flow' and 'density'")
        prior = ScorePrior(parts["flow"], parts["density"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold a prior that this scoreprior can build: {error}"
        ) from error
    return prior if context is None else _given(prior, context, stored.metadata)


def _given(prior: ScorePrior, context: str, metadata: Mapping[str, Any]) -> ScorePrior:
    contexts = metadata.get("contexts", {})
    if context not in contexts:
        raise ValueError(f"context must be one of {list(contexts)} of this prior, got {context!r}")
    dtype = prior.flow.moments.mean.dtype
    return prior.with_context(jnp.asarray(contexts[context], dtype))


def _check_expected(
    name: str | os.PathLike[str], metadata: Mapping[str, Any], expect: Mapping[str, Any]
) -> None:
    for key, value in expect.items():
        if key not in metadata:
            raise ValueError(
                f"expect asks for {key} = {value!r}, of which the metadata of the prior {name!s} "
                f"say nothing, only {list(metadata)}: save it again with metadata={{{key!r}: ...}}"
            )
        if not _agrees(metadata[key], value):
            raise ValueError(
                f"expect asks for {key} = {value!r}, but the prior {name!s} was saved with "
                f"{metadata[key]!r}: take another prior, or change what it is used with"
            )


def _agrees(stored: Any, value: Any) -> bool:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (stored, value))
    return math.isclose(stored, value, rel_tol=1e-6) if numbers else stored == value


def load_metadata(path_or_name: str | os.PathLike[str]) -> dict[str, Any]:
    """What was saved beside the prior: training data, licence, held-out loss."""
    return files.read_config(_find(path_or_name))["metadata"]


def load_images(name: str) -> Float[Array, "n row col"]:
    """Images that neither training nor the choice of settings has seen, in data units.

    For `"digits"`, 180 images [180, 8, 8] of whole grey levels from 0 to 16; to compare one with
    the prior, add the mean of the dequantisation, 1/2. For `"radio"`, 64 images `z` [64, 32, 32].
    """
    if name not in BUNDLED:
        raise ValueError(f"name must be one of {list(BUNDLED)}, got {name!r}")
    return jnp.asarray(np.load(_WEIGHTS / name / "held_out.npy", allow_pickle=False), jnp.float32)


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    if path_or_name in BUNDLED:
        return _WEIGHTS / str(path_or_name)
    path = Path(path_or_name)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"{path} {found}: give the folder of a saved prior, or the name of a bundled one, "
            f"{list(BUNDLED)}"
        )
    return path


__all__ = ["BUNDLED", "load", "load_images", "load_metadata", "save"]
