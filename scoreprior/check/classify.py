"""Classifier two-sample tests: can a network tell draws of a posterior from those of another?

They need scikit-learn, of the extra `sbi`.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike

from scoreprior._util import check_count
from scoreprior.check._inputs import as_attrs, bonferroni, check_least, check_no_nan, matrix, varies

if TYPE_CHECKING:
    from xarray import DataTree
else:
    DataTree = Any

NUM_FOLDS = 5


def c2st(
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int = 1,
    n_jobs: int | None = None,
    max_iter: int = 10_000,
) -> DataTree:
    """Classifier two-sample test: held-out accuracy of telling draws `a` from draws `b`.

    1/2 for equal laws, 1 for laws apart; no classifier does better than `(1 + TV(a, b)) / 2`, with
    the total variation `TV`. Lopez-Paz & Oquab (2017), "Revisiting classifier two-sample tests",
    with the settings of the benchmark `sbibm` (Lueckmann, Boelts, Greenberg, Gonçalves & Macke
    2021, "Benchmarking simulation-based inference"), for figures to stand beside the published
    ones: both sets in units of the mean and standard deviation of `a`, in single precision;
    scikit-learn's `MLPClassifier` with two hidden layers of `10 d` rectified linear units, Adam and
    otherwise its defaults; five folds, shuffled by `seed`. The benchmark has the reference draws as
    `a`, and 10,000 of both.

    **Arguments:** `a` and `b` [n, d], of one `n`, since the accuracy of guessing is 1/2 only then;
    `n_jobs`, folds at a time, as scikit-learn takes it; `max_iter`, epochs at most.

    **Returns** a tree whose attribute `accuracy` is the mean over folds, with its binomial standard
    error `se` of 2 n draws and the one-sided `p_value` of guessing, in the normal approximation,
    which takes the folds for independent; `num_unconverged` counts fits that stopped at `max_iter`.
    The group `c2st` has `accuracy` and `num_iter` [fold].

    Raises `ImportError` without scikit-learn, and `ValueError` for other shapes, unequal numbers
    of draws, NaN, and columns of `a` that do not vary.
    """
    import xarray as xr

    first = matrix("a", a)
    second = matrix("b", b, first.shape[1])
    if len(first) != len(second):
        raise ValueError(
            f"a and b must have equal numbers of draws, got {len(first)} and {len(second)}"
        )
    check_count("seed", seed, least=0)
    check_count("max_iter", max_iter)
    mean = first.mean(0)
    scale = varies("a", first, [f"column {i}" for i in range(first.shape[1])])
    scale = scale * np.sqrt(len(first) / (len(first) - 1))
    data = ((np.concatenate([first, second]) - mean) / scale).astype(np.float32)
    label = np.repeat([0.0, 1.0], len(first))
    sklearn = _sklearn()
    folds = sklearn.model_selection.KFold(NUM_FOLDS, shuffle=True, random_state=seed)
    network = sklearn.neural_network.MLPClassifier(
        hidden_layer_sizes=(10 * first.shape[1],) * 2,
        activation="relu",
        solver="adam",
        max_iter=max_iter,
        random_state=seed,
    )
    with _counted(network):
        results = sklearn.model_selection.cross_validate(
            network, data, label, cv=folds, scoring="accuracy", n_jobs=n_jobs, return_estimator=True
        )
    accuracy = results["test_score"]
    mean_accuracy, num = float(accuracy.mean()), len(data)
    attrs = as_attrs(
        check="c2st",
        statistic="accuracy, mean over folds",
        accuracy=mean_accuracy,
        se=float(np.sqrt(mean_accuracy * (1 - mean_accuracy) / num)),
        p_value=_normal_tail((mean_accuracy - 0.5) * 2 * np.sqrt(num)),
        num=len(first),
        num_unconverged=_num_unconverged(results["estimator"]),
        seed=seed,
    )
    num_iter = [fitted.n_iter_ for fitted in results["estimator"]]
    values = {"accuracy": ("fold", accuracy), "num_iter": ("fold", num_iter)}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), "c2st": xr.Dataset(values)})


def local_c2st(
    truth: ArrayLike,
    draws: ArrayLike,
    data: ArrayLike,
    observed: ArrayLike,
    observed_draws: ArrayLike,
    *,
    classifier: Any = None,
    num_null: int = 100,
    seed: int = 1,
    n_jobs: int | None = None,
) -> DataTree:
    """Local classifier two-sample test: is the posterior right at the data that were observed?

    Linhart, Gramfort & Rodrigues (2023), "L-C2ST: local diagnostics for posterior approximations in
    simulation-based inference", section 3 and Algorithms 1 and 2. One classifier learns the
    probability `d(theta, x)` that `theta` is a draw of the posterior and not the truth that `x` was
    simulated from. The statistic, which needs no draw of the true posterior, is

        t(x_o) = mean of (d(theta, x_o) - 1/2)^2 over posterior draws theta given x_o,

    zero where the posterior is right. Its null law is that of classifiers trained on permuted
    labels. Truth and draw of one `x` are swapped with probability 1/2, and not labels among all
    pairs as in the paper: both have the same `x`, and only the swap leaves that as it is. So the
    p-value `(1 + #{t_null >= t}) / (1 + num_null)` is exact if the posterior is right at all `x`.

    **Arguments:** `truth` [n, d] and `data` [n, m] from prior and simulator; `draws` [n, d], one
    posterior draw for each of `data`; `observed` [m] or [k, m], where to test, and `observed_draws`
    [num, d] or [k, num, d], posterior draws there; `classifier`, one of scikit-learn with
    `predict_proba`, which is cloned, by default `MLPClassifier` with two hidden layers of
    `10 (d + m)` units and early stopping; `num_null`, permutations, 1 / (1 + num_null) being the
    smallest p-value; `seed`; `n_jobs`, fits at a time. Parameters and data are standardised.

    **Returns** a tree with the group `local_c2st`: `statistic` and `p_value` [observation],
    `null` [observation, permutation] and `probability` [observation, draw], `d(theta, x_o)`, above
    1/2 where the posterior puts too much mass. Attributes are `p_value`, of all observations
    (Bonferroni), `num`, `num_null` and `num_unconverged`, fits that stopped early for want of
    iterations.

    Raises `ImportError` without scikit-learn, and `ValueError` for shapes that disagree, fewer than
    ten rows or draws, NaN, and columns that do not vary.
    """
    import xarray as xr

    theta = matrix("truth", truth)
    drawn = matrix("draws", draws, theta.shape[1])
    x = matrix("data", data)
    for name, rows in {"draws": drawn, "data": x}.items():
        if len(rows) != len(theta):
            raise ValueError(
                f"truth and {name} must have equal numbers of rows, got {len(theta)} and "
                f"{len(rows)}: one draw for each of the data"
            )
    points, at_points = _observations(observed, observed_draws, theta.shape[1], x.shape[1])
    check_count("num_null", num_null)
    check_count("seed", seed, least=0)
    # Both classes standardise alike, so that a swap changes nothing else.
    rows = np.stack([np.c_[theta, x], np.c_[drawn, x]])
    flat = rows.reshape(-1, rows.shape[-1])
    names = [f"parameter {i}" for i in range(theta.shape[1])]
    names += [f"datum {i}" for i in range(x.shape[1])]
    mean, scale = flat.mean(0), varies("truth, draws and data", flat, names)
    rows = (rows - mean) / scale
    places = np.broadcast_to(points[:, None], (*at_points.shape[:2], points.shape[1]))
    places = (np.concatenate([at_points, places], -1) - mean) / scale
    model = _classifier(rows.shape[-1]) if classifier is None else classifier
    swaps = np.random.default_rng(seed).integers(0, 2, (num_null + 1, len(theta))).astype(bool)
    swaps[0] = False
    fits = _fits(model, seed, rows, swaps, n_jobs)
    flat_places = places.reshape(-1, places.shape[-1])
    probability = np.stack([fitted.predict_proba(flat_places)[:, 1] for fitted in fits])
    probability = probability.reshape(len(fits), *places.shape[:2])
    statistic = ((probability - 0.5) ** 2).mean(-1)
    seen, null = statistic[0], statistic[1:]
    p_value = (1 + (null >= seen).sum(0)) / (1 + num_null)
    found = xr.Dataset(
        {
            "statistic": ("observation", seen),
            "p_value": ("observation", p_value),
            "null": (("observation", "permutation"), null.T),
            "probability": (("observation", "draw"), probability[0]),
        }
    )
    attrs = as_attrs(
        check="local_c2st",
        statistic="mean of (probability - 1/2)^2 over posterior draws",
        p_value=bonferroni(p_value),
        num=len(theta),
        num_null=num_null,
        num_unconverged=_num_unconverged(fits),
        seed=seed,
    )
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), "local_c2st": found})


def _fits(
    model: Any, seed: int, rows: np.ndarray, swaps: np.ndarray, n_jobs: int | None
) -> list[Any]:
    """Classifiers of `rows` [class, n, column], one for each of `swaps` [fit, n] of pairs."""
    sklearn = _sklearn()
    label = np.repeat([0, 1], rows.shape[1])

    def job(swap: np.ndarray) -> Any:
        swapped = np.where(swap[:, None], rows[::-1], rows)
        network = sklearn.base.clone(model)
        if "random_state" in network.get_params():
            network.set_params(random_state=seed)
        # A method of scikit-learn: workers need not import this library, which takes seconds.
        return sklearn.utils.parallel.delayed(network.fit)(np.concatenate(swapped), label)

    with _counted(model):
        return sklearn.utils.parallel.Parallel(n_jobs=n_jobs)(job(swap) for swap in swaps)


def _observations(
    observed: ArrayLike, draws: ArrayLike, size: int, num_data: int
) -> tuple[np.ndarray, np.ndarray]:
    points, at_points = np.asarray(observed, float), np.asarray(draws, float)
    if points.ndim == 1:
        points, at_points = points[None], at_points[None]
    if points.ndim != 2 or points.shape[1] != num_data or not len(points):
        raise ValueError(
            f"observed must be [{num_data}] or [k, {num_data}], as data are, got shape "
            f"{np.shape(observed)}"
        )
    if at_points.ndim != 3 or at_points.shape[::2] != (len(points), size):
        raise ValueError(
            f"observed_draws must be [num, {size}] for each of {len(points)} observed, got shape "
            f"{np.shape(draws)}"
        )
    check_least("observed_draws", at_points.shape[1], "draws")
    check_no_nan("observed", points)
    check_no_nan("observed_draws", at_points)
    return points, at_points


def _classifier(size: int) -> Any:
    return _sklearn().neural_network.MLPClassifier(
        hidden_layer_sizes=(10 * size, 10 * size),
        max_iter=1000,
        early_stopping=True,
        n_iter_no_change=50,
    )


@contextmanager
def _counted(model: Any) -> Iterator[None]:
    """No warnings of fits that do not converge, of a `model` whose fits `_num_unconverged` counts.

    Of others, a pipeline say, they come through.
    """
    with warnings.catch_warnings():
        if hasattr(model, "max_iter"):
            warnings.simplefilter("ignore", _sklearn().exceptions.ConvergenceWarning)
        yield


def _num_unconverged(fits: Sequence[Any]) -> int:
    return sum(
        bool(np.max(fitted.n_iter_) >= fitted.max_iter)
        for fitted in fits
        if hasattr(fitted, "max_iter")
    )


def _sklearn() -> Any:
    try:
        import sklearn.base
        import sklearn.exceptions
        import sklearn.model_selection
        import sklearn.neural_network
        import sklearn.utils.parallel
    except ImportError as error:
        raise ImportError(
            'classifier tests need scikit-learn: pip install "scoreprior[sbi]"'
        ) from error
    return sklearn


def _normal_tail(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2))


__all__ = ["c2st", "local_c2st"]
