"""Analyses of the backends: what they compute, at what cost, and whether they agree."""
