"""Exact products of per-text gradients with fixed directions, without per-text gradients."""
