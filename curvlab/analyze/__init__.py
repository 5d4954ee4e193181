"""The list of analyses. Each paper has a room, a subpackage; all rooms use the frame."""

from typing import Any, NamedTuple


class Entry(NamedTuple):
    """An entry of the list of analyses.

    Attributes:
        room: The subpackage of its module, which defines the analysis as ``ANALYSIS``.
        question: The question that it answers, one line.
    """

    room: str
    question: str


#: Room -> citation of its paper.
ROOMS = {
    "masq": "Gepperth and Wiech (2019): Simplified computation and interpretation of Fisher matrices in incremental "
    "learning with deep neural networks",
    "regimes": "Mirzadeh et al. (2020): Understanding the role of training regimes in continual learning",
    "dlcft": "Shon et al. (2022): DLCFT, deep linear continual fine-tuning for general incremental learning",
    "transfer": "Hwang and Shin: Effect of learning rate scheduling in transfer learning (project slides)",
    "lecture": "Carta: Continual learning, regularization priors (lecture slides)",
}

#: Name -> entry.
ANALYSES = {
    "fim_diagonality": Entry(
        "masq", "How diagonal is the Fisher? Sums and means on and off the diagonal, one row per parameter tensor."
    ),
    "ewc_grid": Entry(
        "masq", "Does EWC with MaSQ forget as little as with the FIM? A grid over three streams of two tasks."
    ),
    "masq_vs_fim": Entry(
        "masq", "How do MaSQ and FIM differ? Largest entries, batch sizes, correlation during training, cost."
    ),
    "imm_masq": Entry(
        "masq", "Does IMM work with MaSQ instead of the FIM? Mean-IMM and mode-IMM on three streams of two tasks."
    ),
    "fisher_variants": Entry(
        "masq", "Does the kind of Fisher matter for EWC? Accuracy over the strength, as estimated and at one trace."
    ),
    "doctor": Entry(
        "backends", "What can each backend compute for this network, and at what cost? A check before the computation."
    ),
    "agreement": Entry(
        "backends", "Do the backends agree? The same curvature from each backend: differences, time and memory."
    ),
    "estimators": Entry("backends", "Which backend computes what, for which modules? Tables generated from the code."),
    "eigenvalues": Entry(
        "dlcft", "Does the curvature vanish during training? Largest eigenvalues with softmax and with squared error."
    ),
    "softmax_hessian": Entry(
        "dlcft", "Why does the curvature vanish? The Hessian of the softmax loss, compared with the formula."
    ),
    "fisher_histogram": Entry(
        "lecture", "How skewed is the Fisher? The distribution of its exact diagonal after a task."
    ),
    "kl_gaussians": Entry(
        "lecture", "What does a step in the parameters do to a distribution? KL divergences, fits, and the Fisher."
    ),
    "empirical_fisher_field": Entry(
        "lecture", "Does the empirical Fisher precondition as the Fisher does? Three fields of a linear regression."
    ),
    "natural_gradient": Entry(
        "lecture", "Does the natural gradient converge faster? A linear regression, and a network with three Fishers."
    ),
    "adam_preconditioner": Entry(
        "lecture", "Is Adam's second moment the diagonal of the Fisher? Rank correlation and scale over training."
    ),
    "ewc_modes": Entry(
        "lecture", "Which form of EWC? Separate, online, averages, plain L2, SI and MAS: accuracy, memory, sensitivity."
    ),
    "laplace_posterior": Entry(
        "lecture", "How far is Laplace's sequential posterior from the exact one? Diagonal, K-FAC and full, by chunks."
    ),
    "surrogate": Entry(
        "lecture", "How good is a quadratic surrogate of the old loss? Diagonal, K-FAC and full against the exact loss."
    ),
    "clipped_fisher": Entry(
        "lecture", "How long is the Fisher's tail? Its diagonal after batches of new classes, averaged and clipped."
    ),
    "forgetting_bound": Entry(
        "regimes", "What bounds forgetting? The loss of an old task and its curvature, over training regimes."
    ),
    "training_regimes": Entry(
        "regimes",
        "What does stable training change? Forgetting, curvature and distance, compared with plastic training.",
    ),
    "forgetting_forecast": Entry(
        "regimes",
        "Does stored curvature forecast forgetting? Diagonal, K-FAC, EK-FAC and exact products at their cost.",
    ),
    "lr_schedules": Entry(
        "transfer", "Does the schedule matter in transfer learning? Speed, accuracy and curvature of six schedules."
    ),
    "methods": Entry(
        "regimes", "Which method forgets least? Naive, EWC, A-GEM, ER, Stable SGD and joint training, each tuned."
    ),
    "dlcft": Entry(
        "dlcft", "Does a linear network with squared error forget less? DLCFT and its baselines in three settings."
    ),
    "papers": Entry(
        "backends", "Which published items have a command, and what are the verdicts on their claims? A list."
    ),
}


def load_analysis(name: str) -> Any:
    """Import the module of an analysis, and return the analysis."""
    from importlib import import_module

    return import_module(f"curvlab.analyze.{ANALYSES[name].room}.{name}").ANALYSIS
