"""Sweeps from the command line: a YAML file with a base configuration and axes, and a store of the results."""
