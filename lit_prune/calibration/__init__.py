"""Calibration: statistics of weights, gradients and activations from calibration batches."""
