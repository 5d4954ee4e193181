"""The embedded default: the handwritten digits that scikit-learn ships."""

import numpy as np
from sklearn.datasets import load_digits

from curvlab.data.arrays import Array


def read_digits() -> dict[str, Array]:
    """Return 1797 images of 8x8 in [0, 1], shape ``(N, 1, 8, 8)``: 1437 to train on, 360 to test.

    The split is fixed and has no random part: with the samples sorted by class (their order kept within a
    class), every fifth, from the first on, is a test sample. So a class has a fifth of its samples in the test
    set, to within one. Both parts keep scikit-learn's order.
    """
    x, y = load_digits(return_X_y=True)
    test = np.zeros(len(y), dtype=bool)
    test[np.argsort(y, kind="stable")[::5]] = True
    images = (x / 16).reshape(-1, 1, 8, 8)
    return {"x_train": images[~test], "y_train": y[~test], "x_test": images[test], "y_test": y[test]}
