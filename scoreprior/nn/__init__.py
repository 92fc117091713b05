"""Reference networks `F(x, log_sigma, context)`, conditioned on the noise level."""

from scoreprior.nn.mlp import ResidualMLP

__all__ = ["ResidualMLP"]
