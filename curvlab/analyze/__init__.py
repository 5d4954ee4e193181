"""The command line: one module an analysis, each a frozen config and a run function."""

#: Name -> what it answers, one line. The module of that name has ``ANALYSIS``, imported only when it is asked for.
ANALYSES = {
    "fim_diagonality": "How diagonal is the Fisher? Sums and means on and off the diagonal, a row a parameter tensor.",
    "doctor": "What can each backend do for this network, and what will it cost? Before any number.",
    "agreement": "Do the backends agree? The same curvature from each: differences, time and memory.",
    "estimators": "Which backend computes what, of which modules? Tables generated from the code itself.",
    "eigenvalues": "Does the curvature vanish in training? Largest eigenvalues, softmax against squared error.",
    "softmax_hessian": "Why does it vanish? The softmax loss's Hessian as the network fits, against the formula.",
    "forgetting_bound": "What bounds forgetting? Loss of an old task against its curvature, over training regimes.",
    "training_regimes": "What does a stable training change? Forgetting, curvature and distance against a plastic one.",
    "methods": "Which method forgets least? Naive, EWC, A-GEM, ER, Stable SGD and joint, each at its best.",
    "dlcft": "Does a linear network with squared error forget less? DLCFT and its baselines in three settings.",
}
