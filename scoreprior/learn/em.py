"""`EM`: a diffusion prior from measurements, by expectation maximisation with posterior draws."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from scoreprior._typing import Event, Key, Scalar
from scoreprior._util import check_count
from scoreprior.denoise.base import AbstractDenoiser
from scoreprior.learn.measurements import Measurements
from scoreprior.learn.steps import AbstractMaximisation, PosteriorDraw
from scoreprior.train import checkpoint as files
from scoreprior.train.identity import described, digest, program


class Round(NamedTuple):
    """What one round measured; NaN where nothing was held out."""

    chi_squared: Float[np.ndarray, "..."]  # mean (y - A x)^2 / v over the draws: 1 if all is right
    held_out_chi_squared: Float[np.ndarray, "..."]
    held_out_before: Float[np.ndarray, "..."]  # objective at held-out draws, old denoiser
    held_out_after: Float[np.ndarray, "..."]  # and new


class Learned(NamedTuple):
    """A denoiser learned from measurements and how it came about; `history` [num_rounds]."""

    denoiser: AbstractDenoiser
    history: Round
    interrupted: bool


class EM(eqx.Module):
    """Expectation maximisation with posterior draws (Rozet et al., NeurIPS 2024, section 4).

    A round draws every event given its measurement under the present prior, and fits the next prior
    to the draws:

        x_i ~ p_k(x | y_i),     D_{k+1} = argmin sum_i loss(D, x_i) .

    With exact draws and a loss that bounds the log density, `log p(y)` does not fall on average,
    and in the limit of many measurements the law of `y` under the prior is that seen. What the
    operators never see, together, stays as it was in the beginning.

    A `denoise.Network` that has not been trained is the denoiser of its moments, so that the first
    round draws as if the prior were that Gaussian: start from `fit_gaussian`.

    **What to look at.** If prior and draws are right, `y - A x` of a posterior draw has the law of
    the noise, so `chi_squared`, its mean square in units of the noise, is 1; a prior too narrow for
    the data, or draws that ignore them, give more, a prior too wide, or draws that follow them too
    closely, less. `held_out_before - held_out_after` is what a round gained on draws for
    measurements that were not trained on; rounds are enough when it is nothing. It compares
    denoisers on the draws of the old one, and values of different rounds are not comparable.

    **Arguments:** `draw(denoiser, observation, key)`, one posterior draw, such as `GuidedDraws`;
    `maximise`, such as `Train(loss, num_steps)`; `num_rounds`; `batch_size`: draws made side by
    side, which bounds memory and does not change the draws.
    """

    draw: PosteriorDraw
    maximise: AbstractMaximisation
    num_rounds: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True, default=256, kw_only=True)

    def __check_init__(self):
        check_count("num_rounds", self.num_rounds)
        check_count("batch_size", self.batch_size)
        if not isinstance(self.maximise, AbstractMaximisation):
            raise TypeError(f"maximise must be such as Train(...), got {self.maximise!r}")

    def run(
        self,
        denoiser: AbstractDenoiser,
        measurements: Measurements,
        *,
        key: Key,
        start: AbstractDenoiser | None = None,
        held_out: Measurements | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> Learned:
        """Learn from `measurements`, beginning with the weights of `denoiser`.

        `start` is the prior of the first draws, `denoiser` itself when `None`. `checkpoint` is a
        directory: the same call goes on from the last round there, in the middle of its training
        too, and a greater `num_rounds` adds rounds. Ctrl-C ends with the last whole round.

        Raises `ValueError` before any work for shapes that do not fit and a checkpoint of another
        run, naming what differs; `FloatingPointError` where draws are not finite.
        """
        start = denoiser if start is None else start
        _check_shapes(self.draw, start, measurements, held_out)
        folder = None
        if checkpoint is not None:
            folder = _Folder(
                Path(checkpoint), self._identity(denoiser, start, measurements, held_out, key)
            )
        rounds: list[Round] = []
        interrupted, present = False, start
        try:
            for number in range(self.num_rounds):
                done = None if folder is None else folder.load(number, denoiser)
                if done is None:
                    job = _Job(number, jax.random.fold_in(key, number), folder, progress)
                    done = self._round(job, denoiser, present, measurements, held_out)
                    if folder is not None:
                        folder.save(number, *done)
                # In one statement, so that Ctrl-C cannot part the denoiser from its history.
                (denoiser, rounds), present = (done[0], [*rounds, done[1]]), done[0]
        except KeyboardInterrupt:
            interrupted = True
        columns = ([getattr(record, name) for record in rounds] for name in Round._fields)
        history = Round(*(np.array(column, float) for column in columns))
        return Learned(denoiser, history, interrupted)

    def _round(
        self,
        job: "_Job",
        denoiser: AbstractDenoiser,
        present: AbstractDenoiser,
        measurements: Measurements,
        held_out: Measurements | None,
    ) -> "_Done":
        keys = jax.random.split(job.key, 4)
        x, chi_squared = self._draws(job, "draws", present, measurements, keys[0])
        x_out, held_out_chi_squared, before, after = None, math.nan, math.nan, math.nan
        if held_out is not None:
            x_out, held_out_chi_squared = self._draws(job, "held out", present, held_out, keys[1])
            before = float(self.maximise.objective(denoiser, x_out, key=keys[2]))
        new = self.maximise(
            denoiser,
            x,
            key=keys[3],
            held_out=x_out,
            checkpoint=None if job.folder is None else job.folder.fit(job.number),
            progress=job.progress,
        )
        if jax.tree.structure(new) != jax.tree.structure(denoiser):
            raise ValueError(
                "maximise must return a denoiser of the structure of the one it was given, "
                f"{jax.tree.structure(denoiser)}, got {jax.tree.structure(new)}"
            )
        if x_out is not None:
            after = float(self.maximise.objective(new, x_out, key=keys[2]))
        return new, Round(*map(np.asarray, (chi_squared, held_out_chi_squared, before, after)))

    def _draws(
        self,
        job: "_Job",
        name: str,
        denoiser: AbstractDenoiser,
        measurements: Measurements,
        key: Key,
    ) -> tuple[Float[Array, "n *event"], float]:
        """A draw of every event, and the mean of `chi_squared` over data that are present."""
        num = len(measurements)
        size = min(self.batch_size, num)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        bar = tqdm(total=num, desc=f"round {job.number + 1}, {name}", disable=not job.progress)
        with bar:
            for begin in range(0, num, size):
                index = jnp.minimum(begin + jnp.arange(size), num - 1)
                batch = _draw_batch(self.draw, denoiser, measurements, key, index)
                count = min(size, num - begin)
                found.append((np.asarray(batch[0])[:count], np.asarray(batch[1])[:count]))
                bar.update(count)
        x, chi_squared = (np.concatenate(part) for part in zip(*found, strict=True))
        bad = int((~np.isfinite(x.reshape(num, -1)).all(1)).sum())
        if bad:
            raise FloatingPointError(
                f"{bad} of {num} posterior draws of round {job.number + 1} are not finite; take "
                "more noise levels, or fewer iterations of the guidance"
            )
        return jnp.asarray(x), float(chi_squared.sum() / np.sum(measurements.present))

    def _identity(
        self,
        denoiser: AbstractDenoiser,
        start: AbstractDenoiser,
        measurements: Measurements,
        held_out: Measurements | None,
        key: Key,
    ) -> dict[str, Any]:
        """What must agree for a run to be resumed."""
        number = jnp.zeros((), int)
        return {
            "platform": jax.default_backend(),
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "measurements": digest(measurements),
            "held_out": digest(held_out),
            "denoiser": f"{described(denoiser)} {digest(denoiser)}",
            "start": f"{described(start)} {digest(start)}",
            "arrays of draw": digest(self.draw),
            "program of draw": program(_one, self.draw, start, measurements, key, number),
            **self.maximise.identity(denoiser),
        }


_Done = tuple[AbstractDenoiser, Round]


class _Job(NamedTuple):
    """Where a round belongs."""

    number: int
    key: Key
    folder: "_Folder | None"
    progress: bool


class _Folder:
    """A directory with the denoiser after every round, and the training of the present one."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings

    def fit(self, number: int) -> Path:
        """The checkpoint of the training of a round."""
        return self.path / f"fit-{number + 1:04d}.safetensors"

    def load(
        self, number: int, denoiser: AbstractDenoiser
    ) -> tuple[AbstractDenoiser, Round] | None:
        """The result of a round, or `None`."""
        file = self._file(number)
        if not file.exists():
            return None
        arrays, static = eqx.partition(denoiser, eqx.is_array)
        template = {"denoiser": arrays, "round": Round(*(np.zeros(()),) * 4)}
        stored = files.read(file, template, self.settings)
        record = Round(*map(np.asarray, stored["round"]))
        return eqx.combine(stored["denoiser"], static), record

    def save(self, number: int, denoiser: AbstractDenoiser, record: Round) -> None:
        """Keep the result of a round, and let the state of its training go."""
        arrays = eqx.filter(denoiser, eqx.is_array)
        files.write(self._file(number), {"denoiser": arrays, "round": record}, self.settings)
        self.fit(number).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self.path / f"round-{number + 1:04d}.safetensors"


def _one(
    draw: PosteriorDraw,
    denoiser: AbstractDenoiser,
    measurements: Measurements,
    key: Key,
    i: Int[Array, ""],
) -> tuple[Event, Scalar]:
    """A draw of event `i`, with a key of its own, and its `chi_squared`."""
    seen = measurements.observation(i)
    x = draw(denoiser, seen, jax.random.fold_in(key, i))
    return x, seen.chi_squared(x)


@eqx.filter_jit
def _draw_batch(
    draw: PosteriorDraw,
    denoiser: AbstractDenoiser,
    measurements: Measurements,
    key: Key,
    index: Int[Array, " size"],
) -> tuple[Float[Array, "size *event"], Float[Array, " size"]]:
    return jax.vmap(lambda i: _one(draw, denoiser, measurements, key, i))(index)


def _check_shapes(
    draw: PosteriorDraw,
    start: AbstractDenoiser,
    measurements: Measurements,
    held_out: Measurements | None,
) -> None:
    """Raise unless `draw` makes events of the measurements' shape, found without computation."""
    shape = measurements.event_shape
    if held_out is not None and held_out.event_shape != shape:
        raise ValueError(
            f"held_out must be of events of shape {shape}, as measurements, got "
            f"{held_out.event_shape}"
        )
    try:
        first = measurements.observation(0)
        made = eqx.filter_eval_shape(draw, start, first, jax.random.key(0)).shape
    except Exception as error:
        raise ValueError(
            f"measurements of events of shape {shape} must suit draw and denoiser; a draw fails: "
            f"{error}"
        ) from error
    if made != shape:
        raise ValueError(f"draw must make events of shape {shape}, got {made}")
