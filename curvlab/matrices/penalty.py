"""Quadratic penalties."""


class Penalty:
    """To be written."""
