"""Simulated radio sources: the family of shapes that tests of black-hole imaging use.

Rings, crescents, disks, double sources, elliptical Gaussians and random blobs, as in section 6 of
The Event Horizon Telescope Collaboration (2019), "First M87 Event Horizon Telescope results IV:
Imaging the central supermassive black hole", ApJL 875, L4, of random size, width, position, tilt
and contrast, each smoothed by a random beam. `simulate(key)` is one image of unit total flux, a
pure function; many are `jax.vmap(simulate)(keys)`.

An image is [row, col], row 0 north and column 0 east, 32 x 32 pixels of 4 micro-arcseconds. Shapes
are drawn on pixels of a half of that, with edges one of them wide, smoothed there and averaged over
pixels. Lengths are in micro-arcseconds throughout; angles from north through east.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

NUM_PIXELS, PIXEL = 32, 4.0
OVERSAMPLING = 2
FINE = PIXEL / OVERSAMPLING

SHAPES = ("ring", "crescent", "disk", "double", "gaussian", "blobs")
GROUPS = ("ring", "disk", "double", "blob")
GROUP_OF_SHAPE = (0, 0, 1, 2, 3, 3)
"""Rings and crescents are one group, Gaussians and random blobs another."""

PEAK, FLOOR = 5.0, 0.002
"""`z = softplus^-1(PEAK I / max I + FLOOR)`: dark sky has `z = -6.2` and the peak `z = 5`. The
floor adds `1024 FLOOR` to a sum of `PEAK sum I / max I`: see `floor_share`. On average it is 0.8 %
of the flux, 1.4 % for double sources, and at most 3 % in 99 images of 100."""

Image = Float[Array, "row col"]
Number = Float[Array, ""]


class Source(NamedTuple):
    """One simulated source."""

    image: Image  # flux per pixel, in units of the total flux
    shape: Int[Array, ""]  # index into SHAPES
    diameter: Number  # of the middle of a ring, of a disk; NaN for other shapes


class Grid(NamedTuple):
    """Offsets from the centre of a source, on fine pixels, along and across its axis."""

    along: Image
    across: Image

    @property
    def radius(self) -> Image:
        return jnp.hypot(self.along, self.across)


def simulate(key: Array) -> Source:
    """One source, all shapes being equally frequent."""
    shape_key, source_key = jax.random.split(key)
    return simulate_shape(source_key, jax.random.randint(shape_key, (), 0, len(SHAPES)))


def simulate_shape(key: Array, shape: Int[Array, ""]) -> Source:
    """One source of a given shape, an index into `SHAPES`."""
    place, beam, draw = jax.random.split(key, 3)
    grid = random_grid(place)
    branches = (ring, crescent, disk, double, gaussian, blobs)
    fine, diameter = jax.lax.switch(shape, branches, draw, grid)
    smoothed = smooth(fine, fwhm(beam, 8, 20))
    image = smoothed.reshape(NUM_PIXELS, OVERSAMPLING, NUM_PIXELS, OVERSAMPLING).sum((1, 3))
    return Source(image / image.sum(), shape, diameter)


def random_grid(key: Array) -> Grid:
    """Offsets from a centre uniform in a disk of radius 10, along an axis of random angle."""
    far, towards, tilt = jax.random.uniform(key, (3,))
    distance, towards, tilt = 10 * jnp.sqrt(far), 2 * jnp.pi * towards, 2 * jnp.pi * tilt
    size = NUM_PIXELS * OVERSAMPLING
    offset = ((size - 1) / 2 - jnp.arange(size)) * FINE
    north = offset[:, None] - distance * jnp.cos(towards)
    east = offset[None, :] - distance * jnp.sin(towards)
    along = north * jnp.cos(tilt) + east * jnp.sin(tilt)
    return Grid(along, -north * jnp.sin(tilt) + east * jnp.cos(tilt))


def ring(key: Array, grid: Grid) -> tuple[Image, Number]:
    """An elliptical annulus, brighter on one side and knotty, around a darker hole."""
    keys = jax.random.split(key, 5)
    diameter = uniform(keys[0], 20, 70)
    width = diameter * log_uniform(keys[1], 0.1, 0.7)
    stretched = Grid(grid.along / uniform(keys[2], 0.8, 1), grid.across)
    radius = stretched.radius
    annulus = inside(radius, (diameter + width) / 2) - inside(radius, (diameter - width) / 2)
    hole = 0.4 * uniform(keys[3], 0, 1) ** 2 * inside(radius, (diameter - width) / 2)
    angle = jnp.arctan2(grid.across, grid.along)
    return (annulus + hole) * jnp.exp(modulation(keys[4], angle)), diameter


def modulation(key: Array, angle: Image) -> Image:
    """Log brightness around a ring: `sum_m a_m cos(m angle - p_m)`, with less and less power."""
    sizes, phases = jax.random.split(key)
    scale = jnp.array([0.7, 0.3, 0.2, 0.15])
    size = scale * jax.random.normal(sizes, (4,))
    phase = 2 * jnp.pi * jax.random.uniform(phases, (4,))
    m = jnp.arange(1.0, 5.0)
    waves = jnp.cos(m[:, None, None] * angle[None] - phase[:, None, None])
    return jnp.sum(size[:, None, None] * waves, 0)


def crescent(key: Array, grid: Grid) -> tuple[Image, Number]:
    """A disk less a smaller one off its centre (Kamruddin & Dexter, MNRAS 434, 2013)."""
    keys = jax.random.split(key, 4)
    outer = uniform(keys[0], 15, 40)
    inner = outer * uniform(keys[1], 0.4, 0.9)
    shift = (outer - inner) * uniform(keys[2], 0.2, 1)
    hole = inside(jnp.hypot(grid.along - shift, grid.across), inner)
    image = inside(grid.radius, outer) - (1 - 0.4 * uniform(keys[3], 0, 1) ** 2) * hole
    return jnp.maximum(image, 0), outer + inner


def disk(key: Array, grid: Grid) -> tuple[Image, Number]:
    """An elliptical disk with a gradient of brightness."""
    keys = jax.random.split(key, 3)
    diameter = uniform(keys[0], 20, 70)
    stretched = Grid(grid.along, grid.across / uniform(keys[1], 0.6, 1))
    gradient = 1 + uniform(keys[2], 0, 0.8) * grid.along / (diameter / 2)
    return jnp.maximum(gradient, 0) * inside(stretched.radius, diameter / 2), diameter


def double(key: Array, grid: Grid) -> tuple[Image, Number]:
    """Two elliptical Gaussians apart from one another, of different flux."""
    keys = jax.random.split(key, 6)
    separation, share = uniform(keys[0], 20, 60), uniform(keys[1], 0.15, 0.85)
    one = blob(shifted(grid, separation / 2), fwhm(keys[2], 5, 20), fwhm(keys[3], 5, 20))
    two = blob(shifted(grid, -separation / 2), fwhm(keys[4], 5, 20), fwhm(keys[5], 5, 20))
    return share * one + (1 - share) * two, jnp.asarray(jnp.nan)


def gaussian(key: Array, grid: Grid) -> tuple[Image, Number]:
    """One elliptical Gaussian, with a fainter companion that overlaps it and skews it."""
    keys = jax.random.split(key, 6)
    major, ratio = fwhm(keys[0], 15, 60), uniform(keys[1], 0.3, 1)
    skew = shifted(grid, major / 2 * jnp.sign(uniform(keys[2], -1, 1)))
    size = major * uniform(keys[3], 0.4, 1)
    share = uniform(keys[4], 0, 0.4)
    companion = blob(skew, size, size * uniform(keys[5], 0.5, 1))
    return (1 - share) * blob(grid, major, major * ratio) + share * companion, jnp.asarray(jnp.nan)


def blobs(key: Array, grid: Grid) -> tuple[Image, Number]:
    """Six Gaussians of random flux, size and place, most of which overlap."""
    keys = jax.random.split(key, 4)
    spread = uniform(keys[0], 5, 18)
    places = spread * jax.random.normal(keys[1], (6, 2))
    sizes = jax.vmap(lambda k: fwhm(k, 12, 40))(jax.random.split(keys[2], 6))
    flux = jax.random.exponential(keys[3], (6,))

    def one(place: Array, size: Array) -> Image:
        return blob(Grid(grid.along - place[0], grid.across - place[1]), size, size)

    each = jax.vmap(one)(places, sizes)
    return jnp.sum(flux[:, None, None] * each, 0), jnp.asarray(jnp.nan)


def blob(grid: Grid, along: Number, across: Number) -> Image:
    """A Gaussian of unit flux, with these standard deviations."""
    squared = (grid.along / along) ** 2 + (grid.across / across) ** 2
    return jnp.exp(-squared / 2) / (along * across)


def shifted(grid: Grid, offset: Number) -> Grid:
    """Offsets from a point `offset` up the axis."""
    return Grid(grid.along - offset, grid.across)


def inside(radius: Image, edge: Number) -> Image:
    """One within `edge`, zero outside, and a ramp of one fine pixel between."""
    return jnp.clip((edge - radius) / FINE + 0.5, 0, 1)


def smooth(fine: Image, sigma: Number) -> Image:
    """Convolution with a round Gaussian of standard deviation `sigma`; nothing beyond the field."""
    offset = jnp.arange(fine.shape[0]) * FINE
    kernel = jnp.exp(-(((offset[:, None] - offset[None]) / sigma) ** 2) / 2)
    kernel = kernel / jnp.sqrt(2 * jnp.pi) * FINE / sigma
    return kernel @ fine @ kernel


def uniform(key: Array, low: float, high: float) -> Number:
    """Uniform between `low` and `high`."""
    return jax.random.uniform(key, minval=low, maxval=high)


def log_uniform(key: Array, low: float, high: float) -> Number:
    """`log` uniform between those of `low` and `high`."""
    return jnp.exp(uniform(key, np.log(low), np.log(high)))


def fwhm(key: Array, low: float, high: float) -> Number:
    """A standard deviation whose full width at half maximum is log-uniform."""
    return log_uniform(key, low, high) / np.sqrt(8 * np.log(2))


def simulate_many(key: Array, num: int, chunk: int = 1000) -> Source:
    """`num` independent sources, [num, ...], as NumPy arrays, a chunk at a time."""
    several = jax.jit(jax.vmap(simulate))
    keys = jax.random.split(key, num)
    parts = [several(keys[i : i + chunk]) for i in range(0, num, chunk)]
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(x) for x in leaves]), *parts)


def to_z(image: Image) -> Image:
    """Unconstrained image `z = softplus^-1(PEAK I / max I + FLOOR)`."""
    value = PEAK * image / jnp.max(image) + FLOOR
    return value + jnp.log(-jnp.expm1(-value))


def to_image(z: Image) -> Image:
    """The image in units of its total flux, `softplus(z) / sum(softplus(z))`."""
    positive = jax.nn.softplus(z)
    return positive / jnp.sum(positive)


def floor_share(image: Image) -> Number:
    """Share of the flux of `to_image(to_z(image))` that the floor adds, spread over the field."""
    floor = FLOOR * image.size
    return floor / (floor + PEAK * jnp.sum(image / jnp.max(image)))


def bilinear(image: Image, north: Array, east: Array) -> Array:
    """The image between pixels, at offsets from the centre of the field; zero beyond it."""
    where = [(NUM_PIXELS - 1) / 2 - offset / PIXEL for offset in (north, east)]
    return jax.scipy.ndimage.map_coordinates(image, where, order=1)


def draw_page(images: Float[Array, "n row col"], path: Path, titles: list[str]) -> None:
    """A page of images, each on its own scale, eight in a row."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // 8)
    figure = Figure(figsize=(12, 1.65 * rows), layout="constrained")
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        ax = figure.add_subplot(rows, 8, i + 1)
        ax.imshow(image, cmap="afmhot", vmin=0)
        ax.set_title(title, fontsize=7)
        ax.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate a page of sources and save a picture of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("radio_sources.png"))
    parser.add_argument("--num", type=int, default=48)
    arguments = parser.parse_args()
    sources = simulate_many(jax.random.key(0), arguments.num)
    titles = [SHAPES[i] for i in sources.shape]
    draw_page(sources.image, arguments.output, titles)
    shares = jax.vmap(floor_share)(sources.image)
    print(f"floor: {float(shares.mean()):.2%} of the flux, at most {float(shares.max()):.2%}")


if __name__ == "__main__":
    main()
