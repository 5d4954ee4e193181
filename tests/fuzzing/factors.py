"""What is right for the Kronecker structures, from the one operation that applies a layer's weight.

A layer has factors if, in every sample, its weight goes into one ``linear`` or ``conv`` operation, and the gradients of
its parameters follow from that: ``G = sum_t g_t a_t'`` is automatic differentiation's. Then whatever is done around
the operation, by hooks or patches, is part of ``a`` and ``g``.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .oracle import gradient, values

OPERATIONS = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class Watch(TorchFunctionMode):
    """Keeps the inputs of the operations on layers' weights, and adds a zero to the outputs of those wanted."""

    def __init__(self, layers, wanted, asked):
        super().__init__()
        self.layers, self.asked = layers, asked
        self.calls = {name: [] for name in wanted}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in OPERATIONS.values() and len(args) > 1:
            # A weight that is computed, such as a pruned one, is another tensor at every call.
            having = [name for name, module in self.layers.items() if module.weight is args[1]]
            # Of layers with one weight, each has the operation with its own bias.
            bias = args[2] if len(args) > 2 else None
            of = [name for name in having if self.layers[name].bias is bias] or having
            # Where no gradient of the weight is asked for, other uses of it say nothing of the layer's bias.
            of = [name for name in of if self.layers[name].bias is bias or self.asked(f"{name}.weight")]
            for name in [name for name in of if name in self.calls]:
                if torch._C._functorch.is_functorch_wrapped_tensor(out):
                    self.calls[name] += [None, None]  # as good as several
                    continue
                shift = torch.zeros_like(out, requires_grad=True)
                self.calls[name].append((func, args, shift))
                out = out + shift
        return out


def patches(func, args):
    """What the weight is multiplied with at each position, ``(T, d)``."""
    given, weight = args[0].detach(), args[1].detach()
    if func is F.linear:
        return given.reshape(-1, weight.shape[1])
    unit = weight[:1].clone().requires_grad_()
    out = func(given, unit, None, *args[3:]).flatten()
    return torch.stack([torch.autograd.grad(value, unit, retain_graph=True)[0].flatten() for value in out])


def samples(model, names, quantity, name, x, y, drawn):
    """By layer that has factors: for every sample ``a`` ``(T, d)``, ``g`` ``(R, T, o)`` and ``M``."""
    parameters = {key: p for key, p in model.named_parameters() if key in names}
    layers = {
        key: module
        for key, module in model.named_modules()
        if type(module) in OPERATIONS and getattr(module, "groups", 1) == 1
    }
    # A zero changes what is done to outputs of which no gradient is wanted.
    found = {name.rpartition(".")[0]: [] for name in parameters if name.rpartition(".")[0] in layers}
    for n in range(len(x)):
        with Watch(layers, found, lambda key: key.removeprefix(".") in parameters) as watch:
            f = model(x[n : n + 1].clone())
        of_sample, weights = values(quantity, name, f, y[n : n + 1], None if drawn is None else drawn[n])
        for key in list(found):
            calls = watch.calls[key]
            if len(calls) != 1:
                del found[key]
                continue
            func, args, shift = calls[0]
            a, o = patches(func, args), len(args[1])
            g = torch.stack([gradient(value, [shift]).view(shift.shape) for value in of_sample])
            g = g.reshape(len(g), -1, o) if func is F.linear else g[:, 0].flatten(2).mT
            columns = {f"{key}.weight".removeprefix("."): a, f"{key}.bias".removeprefix("."): torch.ones_like(a[:, :1])}
            columns = {each: part for each, part in columns.items() if each in parameters}
            right = bool(columns)
            for each, part in columns.items():
                truth = torch.stack([gradient(value, [parameters[each]]) for value in of_sample])
                gap = (g.mT @ part.double()).flatten(1) - truth.view(len(truth), -1)
                right = right and bool(gap.abs().max() <= 1e-10 * truth.abs().max() + 1e-14)
            if right:
                found[key].append((torch.cat(list(columns.values()), dim=1).double(), g, weights))
            else:
                del found[key]
    return found


def factors(of_layer, structure, sharing="expand", variant="gao"):
    """``A``, ``S`` of a layer; the definitions of the structures' documentation."""
    total_a, total_s, trace = 0, 0, 0
    weighted = structure == "tkfac" and variant == "gao"
    for a, g, m in of_layer:
        trace = trace + torch.einsum("rs,rod,sod->", m, g.mT @ a, g.mT @ a)
        if sharing == "reduce":
            a, g = a.mean(dim=0, keepdim=True), g.sum(dim=1, keepdim=True)
        a_n, s_n = a.mT @ a / len(a), torch.einsum("rs,rto,stp->op", m, g, g)
        total_a = total_a + a_n * (s_n.trace() if weighted else 1)
        total_s = total_s + s_n * (a_n.trace() if weighted else 1)
    count = len(of_layer)
    a, s, trace = total_a / count, total_s / count, trace / count
    if structure == "tkfac" and a.trace() * s.trace() > 0:
        s = s * trace / (a.trace() * s.trace())
    return a, s


def moments(of_layer, basis_a, basis_s):
    """The second moments of a layer's gradients along a Kronecker basis, ``(o, d)``."""
    total = 0
    for a, g, m in of_layer:
        rotated = (g @ basis_s).mT @ (a @ basis_a)
        total = total + torch.einsum("rs,rod,sod->od", m, rotated, rotated)
    return total / len(of_layer)
