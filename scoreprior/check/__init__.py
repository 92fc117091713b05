"""Checks of posteriors: calibration, coverage, two-sample tests, predictions."""
