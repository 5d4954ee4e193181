"""Sweeps from the command line: a YAML file of a base configuration and axes, run into a store."""
