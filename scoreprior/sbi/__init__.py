"""Simulation-based inference: simulate, amortise, and compose scores of many observations."""
