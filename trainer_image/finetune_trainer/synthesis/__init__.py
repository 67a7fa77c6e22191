"""Rows that a model writes: a Generate stage, in the manner of Self-Instruct (Wang et al. 2023)."""
