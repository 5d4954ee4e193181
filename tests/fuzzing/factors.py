"""Expected results for the Kronecker structures, from the operation that applies a layer's weight.

A layer has factors if, for every sample, equally many ``linear`` or ``conv`` operations use its weight, and the
gradients of its parameters follow from these operations: ``G = sum_t g_t a_t'`` agrees with automatic differentiation,
where ``t`` runs over the positions of all of them. All changes by hooks or patches around the operations are then part
of ``a`` and ``g``.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .oracle import gradient, values

OPERATIONS = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class Watch(TorchFunctionMode):
    """Mode that records the inputs of operations with layers' weights, and adds a zero to the selected outputs."""

    def __init__(self, layers, names, selected):
        super().__init__()
        self.layers, self.selected = layers, selected
        self.calls = {name: [] for name in names}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in OPERATIONS.values() and len(args) > 1:
            # A computed weight, such as a pruned one, is a new tensor in every call.
            candidates = [name for name, module in self.layers.items() if module.weight is args[1]]
            # If layers share a weight, the operation belongs to the layer with the same bias.
            bias = args[2] if len(args) > 2 else None
            users = [name for name in candidates if self.layers[name].bias is bias] or candidates
            # If the weight is not selected, other uses of it do not matter for the layer's bias.
            users = [name for name in users if self.layers[name].bias is bias or self.selected(f"{name}.weight")]
            for name in [name for name in users if name in self.calls]:
                if torch._C._functorch.is_functorch_wrapped_tensor(out):
                    self.calls[name].append(None)  # no factors
                    continue
                shift = torch.zeros_like(out, requires_grad=True)
                self.calls[name].append((func, args, shift))
                out = out + shift
        return out


def patches(func, args):
    """Return the vectors that the weight multiplies at each position, ``(T, d)``."""
    given, weight = args[0].detach(), args[1].detach()
    if func is F.linear:
        return given.reshape(-1, weight.shape[1])
    unit = weight[:1].clone().requires_grad_()
    out = func(given, unit, None, *args[3:]).flatten()
    return torch.stack([torch.autograd.grad(value, unit, retain_graph=True)[0].flatten() for value in out])


def samples(model, names, quantity, name, x, y, drawn):
    """Return, by layer with factors, ``a`` ``(T, d)``, ``g`` ``(R, T, o)`` and ``M`` of every sample."""
    parameters = {key: p for key, p in model.named_parameters() if key in names}
    layers = {
        key: module
        for key, module in model.named_modules()
        if type(module) in OPERATIONS and getattr(module, "groups", 1) == 1
    }
    # Only for layers with selected parameters: adding a zero would affect in-place operations on other outputs.
    numbers = {}
    found = {name.rpartition(".")[0]: [] for name in parameters if name.rpartition(".")[0] in layers}
    for n in range(len(x)):
        with Watch(layers, found, lambda key: key.removeprefix(".") in parameters) as watch:
            f = model(x[n : n + 1].clone())
        sample_values, weights = values(quantity, name, f, y[n : n + 1], None if drawn is None else drawn[n])
        for key in list(found):
            calls = watch.calls[key]
            if not calls or None in calls or numbers.setdefault(key, len(calls)) != len(calls):
                del found[key]
                continue
            a = torch.cat([patches(func, args) for func, args, _ in calls])
            uses = []
            for func, args, shift in calls:
                g, o = torch.stack([gradient(v, [shift]).view(shift.shape) for v in sample_values]), len(args[1])
                uses.append(g.reshape(len(g), -1, o) if func is F.linear else g[:, 0].flatten(2).mT)
            g = torch.cat(uses, dim=1)
            columns = {f"{key}.weight".removeprefix("."): a, f"{key}.bias".removeprefix("."): torch.ones_like(a[:, :1])}
            columns = {each: part for each, part in columns.items() if each in parameters}
            right = bool(columns)
            for each, part in columns.items():
                truth = torch.stack([gradient(value, [parameters[each]]) for value in sample_values])
                gap = (g.mT @ part.double()).flatten(1) - truth.view(len(truth), -1)
                right = right and bool(gap.abs().max() <= 1e-10 * truth.abs().max() + 1e-14)
            if right:
                found[key].append((torch.cat(list(columns.values()), dim=1).double(), g, weights))
            else:
                del found[key]
    return found


def factors(layer_samples, structure, sharing="expand", variant="gao"):
    """Return ``A`` and ``S`` of a layer, by the definitions in the documentation of the structures."""
    total_a, total_s, trace = 0, 0, 0
    weighted = structure == "tkfac" and variant == "gao"
    for a, g, m in layer_samples:
        trace = trace + torch.einsum("rs,rod,sod->", m, g.mT @ a, g.mT @ a)
        if sharing == "reduce":
            a, g = a.mean(dim=0, keepdim=True), g.sum(dim=1, keepdim=True)
        a_n, s_n = a.mT @ a / len(a), torch.einsum("rs,rto,stp->op", m, g, g)
        total_a = total_a + a_n * (s_n.trace() if weighted else 1)
        total_s = total_s + s_n * (a_n.trace() if weighted else 1)
    count = len(layer_samples)
    a, s, trace = total_a / count, total_s / count, trace / count
    if structure == "tkfac" and a.trace() * s.trace() > 0:
        s = s * trace / (a.trace() * s.trace())
    return a, s


def moments(layer_samples, basis_a, basis_s):
    """Return the second moments of a layer's gradients along a Kronecker basis, ``(o, d)``."""
    total = 0
    for a, g, m in layer_samples:
        rotated = (g @ basis_s).mT @ (a @ basis_a)
        total = total + torch.einsum("rs,rod,sod->od", m, rotated, rotated)
    return total / len(layer_samples)
