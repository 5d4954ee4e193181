"""The suites: a module a library, with ``cases()``, and the quantities and Kronecker structures of the library."""

from itertools import product

FISHERS = ("fisher", "empirical_fisher")
KFAC, EKFAC = "kfac:rest=diag", "ekfac:rest=diag"
REDUCE, INPUTS = "kfac:sharing=reduce,rest=diag", "kfac:factors=inputs,rest=diag"
SEPARATE, SEPARATE_REDUCE = "kfac:bias=separate,rest=diag", "kfac:sharing=reduce,bias=separate,rest=diag"


def each(*structures: str) -> tuple[tuple[str, str], ...]:
    """Return some structures of both Fishers."""
    return tuple(product(FISHERS, structures))
