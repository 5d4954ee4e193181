"""Changes of a finished model: hooks, pruning, parametrizations, patches, frozen parameters."""

from random import Random

from .draft import Draft, Registry

DECORATIONS = Registry()

_LINEAR = ("Linear",)
_WEIGHTED = ("Linear", "Conv1d", "Conv2d", "Conv3d")
_PLAIN = (
    *_WEIGHTED,
    *("ConvTranspose1d", "ConvTranspose2d", "Embedding", "PReLU", "RMSNorm", "LayerNorm", "GroupNorm"),
    *("BatchNorm1d", "BatchNorm2d", "InstanceNorm1d", "InstanceNorm2d", "Bilinear", "Tanh", "ReLU", "Softmax"),
)


@DECORATIONS(3)
def forward_hook(d: Draft, r: Random) -> None:
    m = d.pick(r, _PLAIN)
    body = r.choice(
        [
            "lambda m, args, out: out * 1.5",
            "lambda m, args, out: out + out.tanh()",
            "lambda m, args, out: torch.relu(out)",
            "lambda m, args, out: None",
            "lambda m, args, out: out.mul_(1.5)",
            "lambda m, args, out: (out[..., :1].add_(0.5), None)[1]",
        ]
    )
    d.after.append(f"model.{m}.register_forward_hook({body})")


@DECORATIONS(2)
def pre_hook(d: Draft, r: Random) -> None:
    m = d.pick(r, [kind for kind in _PLAIN if kind not in ("Embedding", "Bilinear")])
    scaled = "lambda m, args, kwargs: (tuple(a * 2 for a in args), {k: v * 2 for k, v in kwargs.items()})"
    d.after.append(f"model.{m}.register_forward_pre_hook({scaled}, with_kwargs=True)")


@DECORATIONS(0.5)
def backward_hook(d: Draft, r: Random) -> None:
    m = d.pick(r, _WEIGHTED)
    d.after.append(f"model.{m}.register_full_backward_hook(lambda m, given, got: None)")


@DECORATIONS(1.5)
def lora(d: Draft, r: Random) -> None:
    """Additional parameters of a layer that a hook uses."""
    m = d.pick(r, _LINEAR)
    d.after += [
        f"layer = model.{m}",
        r.choice(
            [
                "layer.lora_a = nn.Parameter(torch.randn(1, layer.in_features))",
                "layer.register_parameter('lora_a', nn.Parameter(torch.randn(1, layer.in_features)))",
            ]
        ),
        "layer.lora_b = nn.Parameter(torch.randn(layer.out_features, 1))",
        "layer.register_forward_hook("
        "lambda m, args, kw, out: out + [*args, *kw.values()][0] @ m.lora_a.T @ m.lora_b.T, with_kwargs=True)",
    ]


@DECORATIONS()
def child(d: Draft, r: Random) -> None:
    """A submodule of a layer that a hook uses, or nothing uses."""
    m = d.pick(r, _LINEAR)
    d.after += [f"layer = model.{m}", "layer.child = nn.Linear(layer.out_features, layer.out_features)"]
    if r.random() < 0.7:
        d.after.append("layer.register_forward_hook(lambda m, args, out: m.child(out))")


@DECORATIONS(1.5)
def pruned(d: Draft, r: Random) -> None:
    m = d.pick(r, _WEIGHTED)
    d.after.append(
        r.choice(
            [
                f"prune.l1_unstructured(model.{m}, 'weight', 0.4)",
                f"prune.random_unstructured(model.{m}, 'weight', 0.4)",
                f"prune.ln_structured(model.{m}, 'weight', 0.5, n=2, dim=0)",
                f"prune.identity(model.{m}, 'weight')",
            ]
        )
    )


@DECORATIONS(1.5)
def normed_weight(d: Draft, r: Random) -> None:
    m = d.pick(r, _WEIGHTED)
    d.after.append(
        r.choice(
            [
                f"nn.utils.weight_norm(model.{m})",
                f"nn.utils.weight_norm(model.{m}, dim=None)",
                f"nn.utils.parametrizations.weight_norm(model.{m})",
                f"nn.utils.spectral_norm(model.{m})",
                f"nn.utils.parametrizations.spectral_norm(model.{m})",
            ]
        )
    )


@DECORATIONS()
def parametrized(d: Draft, r: Random) -> None:
    m = d.pick(r, _WEIGHTED)
    d.after.append(
        r.choice(
            [
                f"parametrize.register_parametrization(model.{m}, 'weight', nn.Tanh())",
                f"parametrize.register_parametrization(model.{m}, 'weight', nn.Softplus())",
                f"nn.utils.parametrizations.orthogonal(model.{m}, orthogonal_map='cayley')",
            ]
        )
    )


@DECORATIONS(2)
def patched(d: Draft, r: Random) -> None:
    m = d.pick(r, (*_WEIGHTED, "LayerNorm", "PReLU", "ConvTranspose2d", "Embedding"))
    d.after += [
        f"layer = model.{m}",
        r.choice(
            [
                "layer.forward = types.MethodType(lambda self, *a, **k: 2 * type(self).forward(self, *a, **k), layer)",
                "layer.forward = lambda *a, plain=layer.forward, **k: 2 * plain(*a, **k)",
                "layer.forward = lambda *a, plain=layer.forward, **k: plain(*a, **k).tanh()",
                "layer.forward = lambda *a, plain=layer.forward, **k: plain(*a, **k).clamp(-1)",
                "layer.forward = types.MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), layer)",
            ]
        ),
    ]


@DECORATIONS()
def frozen(d: Draft, r: Random) -> None:
    m = d.pick(r, _PLAIN[:-3])
    d.after.append(
        r.choice(
            [f"model.{m}.requires_grad_(False)", f"next(model.{m}.parameters(), torch.zeros(1)).requires_grad_(False)"]
        )
    )


@DECORATIONS(0.7)
def has_gradients(d: Draft, r: Random) -> None:
    d.after += ["for p in model.parameters():", "    p.grad = torch.ones_like(p)"]


@DECORATIONS(0.7)
def has_run(d: Draft, r: Random) -> None:
    """A forward pass before the call: modules that cache their weight then have one."""
    d.after += ["with torch.no_grad():", "    model(inputs(3))"]
