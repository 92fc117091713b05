"""Diffusion models as priors for Bayesian models."""
