"""Random networks, each on one cell of the table of estimators, against plain loops of automatic differentiation.

A network is source code: what is run is what is printed when it fails. ``draft.py`` puts the code together from steps:
those of ``layers.py`` are what a forward pass does, those of ``decorations.py`` what is done to a model that is made.
``cells.py`` draws a cell from a seed and ``source.py`` writes it out; ``oracle.py`` and ``factors.py`` compute what is
right; ``judge.py`` compares; ``shrink.py`` makes a failure small. ``python -m tests.fuzzing`` runs it.
"""
