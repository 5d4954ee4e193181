"""Fuzzer: random networks, each with one combination of quantity, structure and backend, compared with plain loops.

A network is source code, so that a failure is printed exactly as it was run. ``draft.py`` assembles the code from
steps: those in ``layers.py`` are operations of a forward pass, those in ``decorations.py`` change a finished model.
``cases.py`` draws a case from a seed and ``source.py`` writes its code; ``oracle.py`` and ``factors.py`` compute the
expected results; ``judge.py`` compares; ``shrink.py`` reduces a failure. Run it with ``python -m tests.fuzzing``.
"""
