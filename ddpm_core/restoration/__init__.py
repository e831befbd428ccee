"""Inverse problems solved with a trained unconditional denoiser, without training for the problem."""
