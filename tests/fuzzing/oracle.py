"""Expected matrices by a plain loop: the model itself, one sample at a time, and ``torch.autograd.grad``.

This module does not use curvlab. The curvature of a sample is ``J' M J``, where ``J`` has the gradients of some values
of the sample and ``M`` their weights: the losses at all classes and their probabilities, the outputs and the second
derivative of the loss with respect to them, or the loss itself and one.
"""

import torch
from torch.nn import functional as F


def losses(name, f, y):
    """Return the negative log-likelihood of every sample, with accurate derivatives also where it saturates."""
    if name == "cross_entropy":
        rest = torch.arange(f.shape[1]) != y.long()[:, None]
        behind = (f - f.gather(1, y.long()[:, None]))[rest].view(len(f), -1)
        return torch.cat([torch.zeros(len(f), 1).to(f), behind], dim=1).logsumexp(dim=1)
    if name == "squared_error":
        return (f - y).square().sum(dim=1) / 2
    if name == "poisson":
        return (f.exp() - y * f).sum(dim=1)
    return (y * F.softplus(-f) + (1 - y) * F.softplus(f)).sum(dim=1)


def output_hessian(name, f):
    """Return the second derivative of a sample's loss with respect to its outputs ``(C,)``."""
    if name == "cross_entropy":
        p = f.softmax(dim=0)
        off = p.outer(p) * (1 - torch.eye(len(p)).to(p))
        return off.sum(dim=0).diag() - off
    if name == "squared_error":
        return torch.eye(len(f), dtype=f.dtype)
    return (f.exp() if name == "poisson" else f.sigmoid() * (-f).sigmoid()).diag()


def values(quantity, name, f, y, drawn):
    """Return the values of one sample, with outputs ``f`` ``(1, C)``, and ``M``; ``drawn``: its Monte Carlo labels."""
    f = f.double()
    y = y.double() if y.is_floating_point() else y
    if quantity == "empirical_fisher":
        return [losses(name, f, y).sum()], torch.ones(1, 1).double()
    if quantity.startswith("fisher:"):
        return [losses(name, f, label[None]).sum() for label in drawn], torch.eye(len(drawn)).double() / len(drawn)
    if quantity == "fisher" and name == "cross_entropy":
        class_losses = [losses(name, f, torch.tensor([c])).sum() for c in range(f.shape[1])]
        return class_losses, f.detach().softmax(dim=1)[0].diag()
    return list(f[0]), output_hessian(name, f.detach()[0])  # for these losses, the Fisher equals the GGN


def gradient(value, parameters, graph=False):
    """Return the flat gradient of a value in float64."""
    found = [None] * len(parameters)
    if value.requires_grad:
        found = torch.autograd.grad(value, parameters, retain_graph=True, create_graph=graph, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.reshape(-1) for g in found]).to(torch.float64)


def curvature(model, quantity, name, x, y, drawn=None):
    """Return the matrix over all trainable parameters, ``(P, P)``, or None if it is not symmetric."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind, _, options = quantity.partition(":")
    total = 0
    if kind == "masq":
        options = dict(option.split("=") for option in options.split(","))
        size, norm = int(options["batch_size"]), options.get("norm", "sumsq")
        each = [
            gradient(losses(name, model(x[n : n + 1].clone()), y[n : n + 1]).sum(), parameters) for n in range(len(x))
        ]
        batches = torch.stack(each).split(size)
        for batch in batches:
            whole = batch.sum(dim=0) if norm == "sumsq" else batch.mean(dim=0)
            total = total + whole.outer(whole)
        return total / (len(batches) if norm == "mean" else len(x))
    if kind == "hessian":
        whole = sum(losses(name, model(x[n : n + 1].clone()), y[n : n + 1]).sum() for n in range(len(x)))
        total = torch.stack([gradient(s, parameters) for s in gradient(whole, parameters, graph=True)])
    else:
        for n in range(len(x)):
            f = model(x[n : n + 1].clone())
            sample_values, weights = values(quantity, name, f, y[n : n + 1], None if drawn is None else drawn[n])
            jacobian = torch.stack([gradient(value, parameters) for value in sample_values])
            total = total + jacobian.mT @ weights @ jacobian
    if (total - total.mT).abs().max() > 1e-9 * total.abs().max():
        return None
    return total / len(x)
