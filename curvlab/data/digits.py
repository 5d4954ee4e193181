"""The default data set: the handwritten digits included in scikit-learn."""

import numpy as np
from sklearn.datasets import load_digits

from curvlab.data.arrays import Array


def read_digits() -> dict[str, Array]:
    """Return 1797 images of 8x8 in [0, 1], shape ``(N, 1, 8, 8)``: 1437 training samples, 360 test samples.

    The split is fixed and not random: if the samples are sorted by class (a stable sort), every fifth, from the first,
    is a test sample. So each class has a fifth of its samples in the test set, within one sample. Both parts keep the
    order of scikit-learn.
    """
    x, y = load_digits(return_X_y=True)
    test = np.zeros(len(y), dtype=bool)
    test[np.argsort(y, kind="stable")[::5]] = True
    images = (x / 16).reshape(-1, 1, 8, 8)
    return {"x_train": images[~test], "y_train": y[~test], "x_test": images[test], "y_test": y[test]}
