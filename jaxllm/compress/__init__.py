"""Weights set to zero."""
