"""Forward operators: what an instrument makes of one image, in pure JAX.

Every operator is an Equinox module, called on one image of shape `shape_in`; batch with `jax.vmap`.
Linear ones have an `adjoint`, a matrix (`materialise`) and an `svd`. `A @ B` composes, `Stack`
puts side by side. Parameters that are no shapes (the width of a blur, sensitivities of coils,
angles) may be traced, and so be latent sites of a model.
"""

from scoreprior.operators.base import (
    AbstractLinearOperator,
    AbstractOperator,
    LinearProduct,
    Product,
)
from scoreprior.operators.combine import ComplexImage, RealImag, Stack
from scoreprior.operators.convolution import (
    AbstractBoundary,
    AbstractConvolution,
    Circular,
    Convolution,
    GaussianBlur,
    Zero,
)
from scoreprior.operators.fourier import (
    FourierSampling,
    MultiCoilMRI,
    NonCartesianFourier,
    PhaseRetrieval,
)
from scoreprior.operators.interferometer import Interferometer
from scoreprior.operators.nonuniform import AbstractTransform, Direct, NonUniformFFT
from scoreprior.operators.pixels import Downsample, Mask
from scoreprior.operators.radon import Radon
from scoreprior.operators.svd import AbstractSVD, DenseSVD, FilterSVD, OrthogonalRows

__all__ = [
    "AbstractBoundary",
    "AbstractConvolution",
    "AbstractLinearOperator",
    "AbstractOperator",
    "AbstractSVD",
    "AbstractTransform",
    "Circular",
    "ComplexImage",
    "Convolution",
    "DenseSVD",
    "Direct",
    "Downsample",
    "FilterSVD",
    "FourierSampling",
    "GaussianBlur",
    "Interferometer",
    "LinearProduct",
    "Mask",
    "MultiCoilMRI",
    "NonCartesianFourier",
    "NonUniformFFT",
    "OrthogonalRows",
    "PhaseRetrieval",
    "Product",
    "Radon",
    "RealImag",
    "Stack",
    "Zero",
]
