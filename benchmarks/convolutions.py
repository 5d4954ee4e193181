"""The two ways to the per-sample gradients of a convolution's weight, and the one that is taken.

    python benchmarks/convolutions.py

``curvlab.estimators.positions`` chooses by shapes between unfolding and a convolution in as many groups as samples; the
rule in ``ConvPositions._unfolds`` was read off these numbers: the processor's microseconds per sample, the least of
some calls, over 64 samples. Prints a line of JSON per layer; ``loss`` is by how much the way that is taken is slower
than the other.
"""

import time

import torch
from measure import emit, machine
from torch import nn

from curvlab.estimators.layers import Layer
from curvlab.estimators.positions import ConvPositions

SAMPLES, ROUNDS = 64, 9
# Channels, outputs, size, stride and kernel: the layers of the small CNN and of ResNet-20 first.
LAYERS = [
    *[(1, 16, 28, 1, 3), (16, 32, 28, 1, 3)],
    *[(3, 16, 32, 1, 3), (16, 16, 32, 1, 3), (16, 32, 32, 2, 3), (32, 32, 16, 1, 3), (32, 64, 16, 2, 3)],
    *[(64, 64, 8, 1, 3), (64, 128, 16, 1, 1), (3, 64, 32, 1, 3), (3, 64, 32, 2, 7), (1, 6, 28, 1, 5)],
    *[(6, 16, 14, 1, 5), (10, 20, 12, 1, 5), (12, 16, 16, 1, 3), (16, 10, 16, 1, 3), (24, 24, 16, 1, 3)],
]


def microseconds(layer: nn.Conv2d, inputs: torch.Tensor, gradient: torch.Tensor, unfolds: bool) -> float:
    """Return what a sample takes in one of the ways."""

    class Positions(ConvPositions):
        def _unfolds(self, _: int) -> bool:
            return unfolds

    taken = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in Positions(Layer("", layer, "weight", None), inputs).sample_gradients(gradient):
            pass
        taken.append(time.process_time() - started)
    return round(min(taken) / len(inputs) * 1e6, 1)


def main() -> None:
    torch.set_num_threads(1)
    emit({"machine": machine(), "samples": SAMPLES})
    for channels, outputs, size, stride, kernel in LAYERS:
        layer = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
        inputs = torch.randn(SAMPLES, channels, size, size)
        gradient = torch.randn_like(layer(inputs))
        unfolding, groups = (microseconds(layer, inputs, gradient, unfolds) for unfolds in (True, False))
        unfolds = ConvPositions(Layer("", layer, "weight", None), inputs)._unfolds(outputs)
        loss = (unfolding / groups if unfolds else groups / unfolding) - 1
        shape = {"channels": channels, "outputs": outputs, "size": size, "stride": stride, "kernel": kernel}
        emit({**shape, "unfolding": unfolding, "groups": groups, "unfolds": unfolds, "loss": round(max(0.0, loss), 2)})


if __name__ == "__main__":
    main()
