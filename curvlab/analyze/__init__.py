"""The list of analyses: a room for each paper, and the frame that all of them share."""

from typing import Any, NamedTuple


class Entry(NamedTuple):
    """An analysis in the list.

    Attributes:
        room: The folder that its module is in; the module has the analysis as ``ANALYSIS``.
        question: What it answers, one line.
    """

    room: str
    question: str


#: The papers, by room.
ROOMS = {
    "masq": "Gepperth and Wiech (2019): Simplified computation and interpretation of Fisher matrices in incremental "
    "learning with deep neural networks",
    "regimes": "Mirzadeh et al. (2020): Understanding the role of training regimes in continual learning",
    "dlcft": "Shon et al. (2022): DLCFT, deep linear continual fine-tuning for general incremental learning",
    "lecture": "Carta: Continual learning, regularization priors (lecture slides)",
}

#: By name.
ANALYSES = {
    "fim_diagonality": Entry(
        "masq", "How diagonal is the Fisher? Sums and means on and off the diagonal, a row a parameter tensor."
    ),
    "doctor": Entry("backends", "What can each backend do for this network, and what will it cost? Before any number."),
    "agreement": Entry(
        "backends", "Do the backends agree? The same curvature from each: differences, time and memory."
    ),
    "estimators": Entry(
        "backends", "Which backend computes what, of which modules? Tables generated from the code itself."
    ),
    "eigenvalues": Entry(
        "dlcft", "Does the curvature vanish in training? Largest eigenvalues, softmax against squared error."
    ),
    "softmax_hessian": Entry(
        "dlcft", "Why does it vanish? The softmax loss's Hessian as the network fits, against the formula."
    ),
    "fisher_histogram": Entry(
        "lecture", "How skewed is the Fisher? The distribution of its exact diagonal after a task."
    ),
    "forgetting_bound": Entry(
        "regimes", "What bounds forgetting? Loss of an old task against its curvature, over training regimes."
    ),
    "training_regimes": Entry(
        "regimes", "What does a stable training change? Forgetting, curvature and distance against a plastic one."
    ),
    "methods": Entry(
        "regimes", "Which method forgets least? Naive, EWC, A-GEM, ER, Stable SGD and joint at their best."
    ),
    "dlcft": Entry(
        "dlcft", "Does a linear network with squared error forget less? DLCFT and its baselines in three settings."
    ),
    "papers": Entry("backends", "Which published items have a command, and what became of their claims? A list."),
}


def load_analysis(name: str) -> Any:
    """Return an analysis of the list; its module is imported only now."""
    from importlib import import_module

    return import_module(f"curvlab.analyze.{ANALYSES[name].room}.{name}").ANALYSIS
