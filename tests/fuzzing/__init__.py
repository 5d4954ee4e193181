"""Random networks, each on one cell of the table of estimators, against plain loops of automatic differentiation.

A network is source code: what is run is what is printed when it fails. ``draft.py`` puts the code together from the
steps in ``layers.py`` (what a forward pass does) and ``decorations.py`` (what is done to a model that is made);
``cells.py`` draws one cell from a seed; ``oracle.py`` computes what is right; ``judge.py`` compares; ``shrink.py`` makes
a failure small. ``python -m tests.fuzzing`` runs it.
"""
