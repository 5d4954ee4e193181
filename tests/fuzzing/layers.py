"""Operations of a forward pass: one function per kind, which adds its lines to a draft."""

from math import prod
from random import Random

from .draft import Draft, Registry, require_fit

LAYERS = Registry()
ODD = Registry()  # operations that must be refused


def chance(random: Random, probability: float) -> bool:
    return random.random() < probability


# Linear maps ---------------------------------------------------------------------------------------------------------


@LAYERS(5)
def linear(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    out = r.randint(1, 5)
    m = d.module(f"nn.Linear({d.shape[-1]}, {out}, bias={chance(r, 0.8)})")
    d.then(f"x = {m}({r.choice(['x', 'x', 'input=x'])})", shape=(*d.shape[:-1], out), fresh=True)


@LAYERS()
def linear_on_folded(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) > 1)
    out = r.randint(1, 3)
    m = d.module(f"nn.Linear({d.shape[-1]}, {out})")
    shape = (*d.shape[:-1], out)
    d.then(f"x = {m}(x.reshape(-1, {d.shape[-1]})).view(-1, {', '.join(map(str, shape))})", shape=shape)


@LAYERS()
def linear_subclass(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    out = r.randint(1, 4)
    body = r.choice(
        [
            "2 * nn.Linear.forward(self, x)",
            "F.linear(x, self.weight * self.weight.new_tensor(0.5), self.bias)",
            "F.linear(x, self.weight - self.weight.mean(), self.bias)",
            "nn.Linear.forward(self, x) + nn.Linear.forward(self, x.sin())",
        ]
    )
    m = d.attribute(f"type('Odd', (nn.Linear,), {{'forward': lambda self, x: {body}}})({d.shape[-1]}, {out})")
    d.then(f"x = {m}(x)", shape=(*d.shape[:-1], out))


@LAYERS(0.4)
def bilinear(d: Draft, r: Random) -> None:
    require_fit(not d.whole and d.shape[-1] <= 4)
    out = r.randint(1, 3)
    m = d.module(f"nn.Bilinear({d.shape[-1]}, {d.shape[-1]}, {out}, bias={chance(r, 0.5)})")
    d.then(f"x = {m}(x, x.sin())", shape=(*d.shape[:-1], out))


@LAYERS()
def nested(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    n, k, out = d.shape[-1], r.randint(1, 3), r.randint(1, 3)
    parts = f"nn.Linear({n}, {k}), nn.{r.choice(['Tanh', 'ReLU', 'GELU'])}(), nn.Linear({k}, {out}, bias=False)"
    container, call = r.choice(
        [
            (f"nn.Sequential({parts})", "x = {m}(x)"),
            (f"nn.Sequential(nn.Sequential({parts}), nn.Identity())", "x = {m}(x)"),
            (f"nn.ModuleList([{parts}])", "for part in {m}:\n    x = part(x)"),
            (
                f"nn.ModuleDict(dict(zip(['weight_', 'b', 'c'], [{parts}])))",
                "for part in {m}.values():\n    x = part(x)",
            ),
            (f"nn.DataParallel(nn.Sequential({parts}))", "x = {m}.module(x)"),
        ]
    )
    m = d.attribute(container)
    d.then(*call.format(m=m).split("\n"), shape=(*d.shape[:-1], out))


@LAYERS(3)
def conv(d: Draft, r: Random) -> None:
    require_fit(not d.whole and 2 <= len(d.shape) <= 4)
    channels, *spatial = d.shape
    groups = r.choice([1, 1, 1, channels])
    out = groups * r.randint(1, max(1, 3 // groups))
    kernel = [r.randint(1, min(3, size)) for size in spatial]
    mode = r.choice(["zeros", "zeros", "circular", "reflect", "replicate"])
    dilation = [r.choice([1, 1, 2]) if size > 2 * (k - 1) else 1 for k, size in zip(kernel, spatial, strict=True)]
    reach = [g * (k - 1) for g, k in zip(dilation, kernel, strict=True)]
    if chance(r, 0.3):
        stride, padding = [1] * len(kernel), "'same'"
        require_fit(mode == "zeros" or all(reached < size for reached, size in zip(reach, spatial, strict=True)))
        after = spatial
    else:
        stride = [r.randint(1, 2) for _ in kernel]
        pads = [r.randint(0, min(1, size - 1)) for size in spatial]
        padding = str(tuple(pads))
        after = [
            (n + 2 * p - reached - 1) // s + 1 for n, p, reached, s in zip(spatial, pads, reach, stride, strict=True)
        ]
    require_fit(all(size > 0 for size in after))
    m = d.module(
        f"nn.Conv{len(spatial)}d({channels}, {out}, {tuple(kernel)}, stride={tuple(stride)}, padding={padding}, "
        f"dilation={tuple(dilation)}, groups={groups}, bias={chance(r, 0.7)}, padding_mode={mode!r})"
    )
    d.then(f"x = {m}(x)", shape=(out, *after), fresh=True)


@LAYERS()
def conv_transpose(d: Draft, r: Random) -> None:
    require_fit(not d.whole and 2 <= len(d.shape) <= 4 and max(d.shape[1:]) <= 4)
    channels, *spatial = d.shape
    groups = r.choice([1, 1, channels])
    out = groups * r.randint(1, max(1, 2 // groups))
    stride, kernel = r.randint(1, 2), r.randint(1, 2)
    after = [(n - 1) * stride + kernel for n in spatial]
    m = d.module(
        f"nn.ConvTranspose{len(spatial)}d({channels}, {out}, {kernel}, stride={stride}, groups={groups}, "
        f"bias={chance(r, 0.7)})"
    )
    if stride == 2 and chance(r, 0.4):
        after = [size + 1 for size in after]
        d.then(f"x = {m}(x, output_size={after})", shape=(out, *after))
    else:
        d.then(f"x = {m}(x)", shape=(out, *after), fresh=True)


@LAYERS()
def embedding(d: Draft, r: Random) -> None:
    require_fit(d.whole)
    size = r.randint(1, 3)
    option = r.choice(["", "", "", ", padding_idx=0", ", sparse=True", ", max_norm=0.5", ", scale_grad_by_freq=True"])
    m = d.module(f"nn.Embedding(5, {size}{option})")
    d.then(f"x = {m}(x)", shape=(*d.shape, size))


@LAYERS(0.4)
def embedding_bag(d: Draft, r: Random) -> None:
    require_fit(d.whole and len(d.shape) == 1)
    size, mode = r.randint(1, 4), r.choice(["sum", "mean", "max"])
    m = d.module(f"nn.EmbeddingBag(5, {size}, mode={mode!r})")
    d.then(f"x = {m}(x)", shape=(size,))


@LAYERS()
def one_hot(d: Draft, r: Random) -> None:
    require_fit(d.whole)
    m = d.attribute("nn.Parameter(torch.randn(5, 3))")
    d.then(f"x = F.one_hot(x, 5).to({m}.dtype) @ {m}", shape=(*d.shape, 3))


# Normalisations ------------------------------------------------------------------------------------------------------


@LAYERS(1.5)
def batch_norm(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    dims = max(1, len(d.shape) - 1)
    m = d.module(f"nn.BatchNorm{dims}d({d.shape[0]}, affine={chance(r, 0.9)})")
    name = m.removeprefix("self.")
    d.after.append(f"model.{name}.running_mean.uniform_(-1, 1), model.{name}.running_var.uniform_(0.5, 2)")
    d.then(f"x = {m}(x)", shape=d.shape, fresh=True)


@LAYERS(1.5)
def layer_norm(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    last = d.shape[-r.randint(1, len(d.shape)) :]
    require_fit(prod(last) > 1)
    m = d.module(f"nn.LayerNorm({last}, eps={r.choice([1e-5, 0.1])}, bias={chance(r, 0.7)})")
    d.then(f"x = {m}(x)", fresh=True)


@LAYERS()
def rms_norm(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    m = d.module(f"nn.RMSNorm({d.shape[-1]}, eps=0.01)")
    d.then(f"x = {m}(x)")


@LAYERS()
def group_norm(d: Draft, r: Random) -> None:
    require_fit(not d.whole and prod(d.shape) > 2)
    groups = r.choice([g for g in range(1, d.shape[0] + 1) if d.shape[0] % g == 0 and prod(d.shape) > g])
    m = d.module(f"nn.GroupNorm({groups}, {d.shape[0]}, eps=0.01)")
    d.then(f"x = {m}(x)", fresh=True)


@LAYERS()
def instance_norm(d: Draft, r: Random) -> None:
    require_fit(not d.whole and 2 <= len(d.shape) <= 4 and prod(d.shape[1:]) > 1)
    m = d.module(
        f"nn.InstanceNorm{len(d.shape) - 1}d({d.shape[0]}, affine={chance(r, 0.8)}, eps=0.01, "
        f"track_running_stats={chance(r, 0.3)})"
    )
    d.then(f"x = {m}(x)", fresh=True)


@LAYERS(0.5)
def local_response_norm(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) >= 2)
    m = d.module("nn.LocalResponseNorm(2)")
    d.then(f"x = {m}(x)")


# Recurrence and attention --------------------------------------------------------------------------------------------


@LAYERS(1.5)
def recurrent(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) == 2 and d.shape[-1] <= 4)
    kind, hidden = r.choice(["LSTM", "GRU", "RNN"]), r.randint(1, 2)
    both = chance(r, 0.3)
    options = f"batch_first=True, bidirectional={both}, bias={chance(r, 0.8)}"
    m = d.module(f"nn.{kind}({d.shape[1]}, {hidden}, {options})")
    out = hidden * (2 if both else 1)
    if chance(r, 0.5):
        d.then(f"x = {m}(x)[0]", shape=(d.shape[0], out))
    else:
        d.then(f"x = {m}(x)[0][:, -1]", shape=(out,))


@LAYERS(0.5)
def recurrent_cell(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) == 2 and d.shape[-1] <= 4)
    m = d.module(f"nn.{r.choice(['GRUCell', 'RNNCell'])}({d.shape[1]}, 2)")
    d.then("h = None", "for part in x.unbind(1):", f"    h = {m}(part, h)", "x = h", shape=(2,))


@LAYERS(1.5)
def attention(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) == 2 and d.shape[-1] <= 4)
    n = d.shape[-1]
    option = r.choice(["", "", ", bias=False", ", add_bias_kv=True", ", add_zero_attn=True"])
    m = d.module(f"nn.MultiheadAttention({n}, {r.choice([1, n])}, batch_first=True{option})")
    d.then(f"x = {r.choice(['', 'x + '])}{m}(x, x, x, need_weights={chance(r, 0.5)})[0]")


@LAYERS()
def encoder_layer(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) == 2 and 2 <= d.shape[-1] <= 4)
    n = d.shape[-1]
    m = d.module(
        f"nn.TransformerEncoderLayer({n}, 1, {r.randint(1, 4)}, dropout={r.choice([0.0, 0.1])}, "
        f"activation={r.choice(['relu', 'gelu'])!r}, batch_first=True, norm_first={chance(r, 0.5)})"
    )
    d.then(f"x = {m}(x)")


@LAYERS(0.5)
def own_attention(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) == 2 and d.shape[-1] <= 5)
    n = d.shape[-1]
    m = d.module(f"nn.Linear({n}, {3 * n})")
    d.then(
        f"q, k, v = {m}(x).chunk(3, dim=-1)",
        r.choice(
            [
                "x = F.scaled_dot_product_attention(q, k, v)",
                f"x = (q @ k.transpose(1, 2) / {n}).softmax(-1) @ v",
            ]
        ),
    )


# Without parameters --------------------------------------------------------------------------------------------------


@LAYERS(5)
def activation(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    smooth = ["Tanh()", "Sigmoid()", "GELU()", "GELU('tanh')", "SiLU()", "Softplus()", "ELU()", "SELU()", "CELU(0.5)"]
    kinked = [
        "ReLU()",
        "LeakyReLU(0.3)",
        "ReLU6()",
        "Hardswish()",
        "Hardtanh()",
        "Mish()",
        "Softsign()",
        "LogSigmoid()",
    ]
    rare = ["Softshrink(0.1)", "Hardshrink(0.1)", "Tanhshrink()", "Threshold(0.1, 0.2)", "RReLU()", "Hardsigmoid()"]
    in_place = ["ReLU(inplace=True)", "LeakyReLU(0.1, inplace=True)", "ELU(inplace=True)", "SiLU(inplace=True)"]
    chosen = r.choice(r.choice([smooth, kinked, rare, in_place if d.fresh else smooth]))
    m = d.module(f"nn.{chosen}")
    d.then(f"x = {m}(x)")


@LAYERS()
def functional(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    d.then(
        r.choice(["x = F.relu(x)", "x = x * torch.sigmoid(x)", "x = x.square().add(1).sqrt()", "x = x.exp().log1p()"])
    )


@LAYERS()
def softmax(d: Draft, r: Random) -> None:
    require_fit(not d.whole and d.shape[-1] > 1)
    m = d.module(f"nn.{r.choice(['Softmax', 'LogSoftmax', 'Softmin'])}(dim=-1)")
    d.then(f"x = {m}(x)")


@LAYERS(0.5)
def glu(d: Draft, r: Random) -> None:
    require_fit(not d.whole and d.shape[-1] % 2 == 0)
    m = d.module("nn.GLU()")
    d.then(f"x = {m}(x)", shape=(*d.shape[:-1], d.shape[-1] // 2))


@LAYERS(1.5)
def prelu(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    m = d.module(f"nn.PReLU({r.choice([1, d.shape[0]])})")
    d.then(f"x = {m}(x)")


@LAYERS(1.5)
def pooling(d: Draft, r: Random) -> None:
    require_fit(not d.whole and 2 <= len(d.shape) <= 4)
    dims, size = len(d.shape) - 1, r.randint(1, 2)
    if chance(r, 0.5):
        m = d.module(f"nn.Adaptive{r.choice(['Avg', 'Max'])}Pool{dims}d({size})")
        d.then(f"x = {m}(x)", shape=(d.shape[0], *[size] * dims))
    else:
        require_fit(min(d.shape[1:]) >= 2)
        kind = r.choice(
            ["AvgPool{}d(2)", "MaxPool{}d(2)", "AvgPool{}d(2, stride=1)"] + ["LPPool{}d(2, 2)"] * (dims < 3)
        )
        m = d.module(f"nn.{kind.format(dims)}")
        shape = [n - 1 if "stride" in kind else n // 2 for n in d.shape[1:]]
        d.then(f"x = {m}(x)", shape=(d.shape[0], *shape))


@LAYERS()
def reshaping(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) > 1)
    order = list(range(1, len(d.shape) + 1))
    r.shuffle(order)
    swapped = tuple(d.shape[i - 1] for i in order)
    line, shape = r.choice(
        [
            (f"x = {d.module('nn.Flatten()')}(x)", (prod(d.shape),)),
            (f"x = x.permute(0, {', '.join(map(str, order))})", swapped),
            (f"x = x.permute(0, {', '.join(map(str, order))}).contiguous()", swapped),
            ("x = x.mean(dim=1)", d.shape[1:]),
            ("x = x[:, 0]", d.shape[1:]),
            ("x = torch.stack(x.unbind(1), dim=-1)", (*d.shape[1:], d.shape[0])),
        ]
    )
    d.then(line, shape=shape)


@LAYERS()
def unflatten(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) < 3)
    parts = r.choice([n for n in (1, 2, 3) if d.shape[0] % n == 0])
    m = d.module(f"nn.Unflatten(1, ({parts}, {d.shape[0] // parts}))")
    d.then(f"x = {m}(x)", shape=(parts, d.shape[0] // parts, *d.shape[1:]))


@LAYERS(0.5)
def pixels(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) == 3)
    c, h, w = d.shape
    choices = [("Upsample(scale_factor=2, mode='bilinear')", (c, 2 * h, 2 * w))] if h * w <= 6 else []
    choices += [("ChannelShuffle(2)", d.shape), ("PixelShuffle(2)", (c // 4, 2 * h, 2 * w))] if c % 4 == 0 else []
    choices += [("PixelUnshuffle(2)", (4 * c, h // 2, w // 2))] if h % 2 == w % 2 == 0 else []
    choices += [("ReplicationPad2d((0, 1, 1, 0))", (c, h + 1, w + 1)), ("ZeroPad2d((1, 0, 0, 0))", (c, h, w + 1))]
    expression, shape = r.choice(choices)
    m = d.module(f"nn.{expression}")
    d.then(f"x = {m}(x)", shape=shape)


@LAYERS()
def dropout_in_eval(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    m = d.module(f"nn.{r.choice(['Dropout(0.5)', 'AlphaDropout(0.5)', 'Identity()'])}")
    d.then(f"x = {m}(x)")


@LAYERS(0.5)
def memory_format(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) == 3)
    if chance(r, 0.5):
        d.then("x = x.contiguous(memory_format=torch.channels_last)")
    else:
        d.after.append("model.to(memory_format=torch.channels_last)")
        d.then("x = x")


@LAYERS(0.5)
def nhwc(d: Draft, r: Random) -> None:
    """A Linear layer on channels-last inputs, followed by a convolution, as in ConvNeXt."""
    require_fit(not d.whole and len(d.shape) == 3)
    m, c = d.module(f"nn.Linear({d.shape[0]}, 2)"), d.module("nn.Conv2d(2, 2, 1)")
    d.then(f"x = {c}({m}(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))", shape=(2, *d.shape[1:]))


@LAYERS(0.5)
def fourier(d: Draft, r: Random) -> None:
    require_fit(not d.whole and d.shape[-1] > 1)
    n = d.shape[-1]
    if chance(r, 0.5):
        d.then("x = torch.fft.rfft(x).abs().add(1).log()", shape=(*d.shape[:-1], n // 2 + 1))
    else:
        m = d.attribute(f"nn.Parameter(torch.randn({n // 2 + 1}, 2))")
        d.then(f"x = torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex({m}), n={n})")


# Bare parameters -----------------------------------------------------------------------------------------------------


@LAYERS(2)
def bare_parameter(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    n = d.shape[-1]
    line, shape = r.choice(
        [
            (f"x = x * {d.attribute(f'nn.Parameter(torch.randn({n}))')}", d.shape),
            (f"x = x + {d.attribute(f'nn.Parameter(torch.randn({n}))')}", d.shape),
            (f"x = x * {d.attribute('nn.Parameter(torch.tensor(1.5))')}", d.shape),
            (f"x = x @ {d.attribute(f'nn.Parameter(torch.randn({n}, 3))')}", (*d.shape[:-1], 3)),
            (f"x = x + {d.attribute(f'nn.ParameterList([torch.randn({n})])')}[0]", d.shape),
            (f"x = x * {d.attribute(f'nn.Parameter(torch.randn({n}, 1))')}.squeeze(1).tanh()", d.shape),
        ]
    )
    d.then(line, shape=shape)


@LAYERS()
def learned_tokens(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) == 2)
    m = d.attribute(f"nn.Parameter(torch.randn(1, 1, {d.shape[1]}))")
    d.then(f"x = torch.cat([{m}.expand(len(x), -1, -1), x], dim=1)", shape=(d.shape[0] + 1, d.shape[1]))


@LAYERS()
def made_weight(d: Draft, r: Random) -> None:
    """A computed weight: normalised, or of low rank."""
    require_fit(not d.whole)
    n = d.shape[-1]
    if chance(r, 0.5):
        m = d.module(f"nn.Linear({n}, 2)", called=False)
        d.then(f"x = F.linear(x, F.normalize({m}.weight), {m}.bias)", shape=(*d.shape[:-1], 2))
    else:
        a, b = d.attribute("nn.Parameter(torch.randn(3, 1))"), d.attribute(f"nn.Parameter(torch.randn(1, {n}))")
        d.then(f"x = F.linear(x, {a} @ {b})", shape=(*d.shape[:-1], 3))


@LAYERS(0.5)
def unused(d: Draft, r: Random) -> None:
    if chance(r, 0.5):
        d.attribute("nn.Parameter(torch.randn(2))")
    else:
        d.module("nn.Linear(1, 2)", called=False)


@LAYERS()
def side_call(d: Draft, r: Random) -> None:
    """A module that is called, but does not affect the gradients of the outputs."""
    require_fit(not d.whole)
    m = d.module(f"nn.Linear({d.shape[-1]}, 2)", called=False)
    d.then(
        r.choice(
            [
                f"{m}(x)",
                f"{m}(x.detach()).sum()",
                f"x = x + {m}(x).detach().mean(-1, keepdim=True)",
                f"x = x + 0 * {m}(x).sum(-1, keepdim=True)",
            ]
        )
    )


# Views and in-place operations ---------------------------------------------------------------------------------------


@LAYERS(2)
def in_place(d: Draft, r: Random) -> None:
    require_fit(d.fresh)
    column = "x[..., 0]"
    d.then(
        r.choice(
            [
                "x += 0.5",
                "x = x.relu_()",
                "x.mul_(1.5)",
                f"{column}.mul_(3)",
                "x[:, 0].mul_(3)",
                "x.view(-1).mul_(2)",
                "x = F.leaky_relu(x, 0.2, inplace=True)",
                "x.flatten(1)[:, 0].add_(1)",
                "x.clamp_(-1, 1)",
                "x[:, :1] = 0.5",
                "x.transpose(0, -1).mul_(2)",
            ]
        )
    )


@LAYERS()
def residual(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    n = d.shape[-1]
    m = d.module(f"nn.Linear({n}, {n})")
    d.then(
        *r.choice(
            [
                (f"x = x + {m}(x).tanh()",),
                (f"y = {m}(x)", "y += x", "x = y"),
                (f"x = x + {m}(F.relu(x))",),
                (f"x = torch.add({m}(x), x, alpha=0.5)",),
            ]
        )
    )


@LAYERS()
def concatenation(d: Draft, r: Random) -> None:
    require_fit(not d.whole and d.shape[-1] <= 4)
    n = d.shape[-1]
    m = d.module(f"nn.Linear({n}, 2)")
    d.then(f"x = torch.cat([x, {m}(x)], dim=-1)", shape=(*d.shape[:-1], n + 2))


@LAYERS()
def split_output(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    m = d.module(f"nn.Linear({d.shape[-1]}, 4)")
    lines = r.choice(
        [
            (f"a, b = {m}(x).chunk(2, dim=-1)", "x = a * b.sigmoid()"),
            (f"y = {m}(x)", "y[..., :2].tanh_()" if chance(r, 0.1) else "y[..., :2].mul_(0.5)", "x = y[..., 1:3]"),
        ]
    )
    d.then(*lines, shape=(*d.shape[:-1], 2))


# Reuse ---------------------------------------------------------------------------------------------------------------


@LAYERS(2)
def reuse(d: Draft, r: Random) -> None:
    require_fit(not d.whole and d.shape[-1] <= 5)
    n = d.shape[-1]
    m = d.module(f"nn.Linear({n}, {n}, bias={chance(r, 0.7)})", called=chance(r, 0.5))
    lines = r.choice(
        [
            (f"x = {m}({m}(x).tanh())",),
            (f"x = {m}(x) + F.linear(x.sin(), {m}.weight)",),
            (f"x = ({m}(x)).tanh() @ {m}.weight",),
            (f"w = {m}.weight.t()", "x = (x @ w).tanh() @ w"),
            (f"x = {m}(x).tanh() @ {m}.weight.t()",),
            (f"x = x @ {m}.weight.t()",),
            (f"x = {m}(x) + {m}.weight.mean()",),
            (f"x = {m}(x) * {m}.weight.square().sum().sqrt()",),
            (f"x = torch.cat([{m}(x), {m}(x.sin())], dim=-1)[..., {n // 2}:{n // 2 + n}]",),
        ]
    )
    d.then(*lines)


@LAYERS()
def tied(d: Draft, r: Random) -> None:
    require_fit(not d.whole and d.shape[-1] <= 5)
    n = d.shape[-1]
    a, b = d.module(f"nn.Linear({n}, {n})"), d.module(f"nn.Linear({n}, {n})")
    d.init.append(r.choice([f"{b}.weight = {a}.weight", f"{b}.bias = {a}.bias", f"{b} = {a}"]))
    d.then(f"x = {b}({a}(x).tanh())")


@LAYERS(1.5)
def branch(d: Draft, r: Random) -> None:
    """A layer that only some samples use, or a weight that some samples use a second time."""
    require_fit(not d.whole and d.shape[-1] <= 5)
    n, ones = d.shape[-1], ", 1" * len(d.shape)
    bound = r.choice([0.0, 0.5, 1.0])
    m = d.module(f"nn.Linear({n}, {n})", called=False)
    rows = f"rows = x.flatten(1)[:, 0] > {bound}"
    lines = r.choice(
        [
            (rows, f"x = torch.where(rows.view(-1{ones}), {m}(x), x)"),
            (rows, f"y = {m}(x).tanh()", f"x = torch.where(rows.view(-1{ones}), {m}(y), y)"),
            (rows, f"y = {m}(x)", f"x = torch.where(rows.view(-1{ones}), y * {m}.weight.sum(), y)"),
            (rows, "if rows.any():", f"    x = x.index_put((rows,), {m}(x[rows]))"),
            (
                rows,
                f"y = {m}(x).tanh()",
                "if rows.any():",
                f"    y = y + rows.view(-1{ones}) * F.linear(x, {m}.weight)",
                "x = y",
            ),
        ]
    )
    d.then(*lines)


# Derivatives inside the forward pass ---------------------------------------------------------------------------------


@LAYERS(1.5)
def inner_derivative(d: Draft, r: Random) -> None:
    require_fit(not d.whole and d.shape[-1] <= 4)
    n = d.shape[-1]
    a, b = d.module(f"nn.Linear({n}, 3)"), d.module("nn.Linear(3, 1)")
    smooth = r.choice(["tanh", "sin", "square"])
    d.then(
        "with torch.enable_grad():",
        "    at = x if x.requires_grad else x.detach().requires_grad_()",
        f"    energy = {b}({a}(at).{smooth}())",
        "    slope, = torch.autograd.grad(energy.sum(), at, create_graph=True)",
        r.choice(["x = -slope", "x = x + slope", "x = slope + energy", "x = slope - at.square()"]),
    )


@LAYERS(0.5)
def functional_derivative(d: Draft, r: Random) -> None:
    require_fit(not d.whole and d.shape[-1] <= 4)
    n = d.shape[-1]
    m = d.module(f"nn.Linear({n}, {n})")
    d.then(
        r.choice(
            [
                f"x = x + torch.func.jvp(lambda v: {m}(v).tanh(), (x,), (torch.ones_like(x),))[1]",
                f"x = x + torch.func.vmap(torch.func.grad(lambda v: {m}(v).tanh().sum()))(x)",
                f"x = torch.func.vmap({m})(x)",
            ]
        )
    )


@LAYERS(0.5)
def checkpointed(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    m = d.module(f"nn.Linear({d.shape[-1]}, 3)")
    d.then(
        f"x = torch.utils.checkpoint.checkpoint(lambda v: {m}(v).tanh(), x, use_reentrant={chance(r, 0.3)})",
        shape=(*d.shape[:-1], 3),
    )


@LAYERS(0.5)
def own_function(d: Draft, r: Random) -> None:
    """A function with its own backward pass, such as a straight-through estimator."""
    require_fit(not d.whole)
    m = d.module(f"nn.Linear({d.shape[-1]}, 3)")
    d.then(f"x = Through.apply({m}(x))", shape=(*d.shape[:-1], 3))


@LAYERS(0.5)
def counted(d: Draft, r: Random) -> None:
    """A buffer or an attribute that every forward pass changes."""
    require_fit(not d.whole)
    if chance(r, 0.5):
        name = f"calls{d._position}"
        d.init.append(f"self.register_buffer({name!r}, torch.zeros(1))")
        d.then(f"self.{name} += 1", "x = x * 1.5")
    else:
        d.init.append("self.seen = None")
        d.then("self.seen = x.detach()", "x = x * 1.5")


@LAYERS(0.3)
def lazy(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    m = d.module("nn.LazyLinear(2)")
    d.after.insert(0, "model.eval()(inputs(2))")
    d.then(f"x = {m}(x)", shape=(*d.shape[:-1], 2))


@LAYERS(0.3)
def scripted(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    m = d.attribute(f"torch.jit.script(nn.Linear({d.shape[-1]}, 2))")
    d.then(f"x = {m}(x)", shape=(*d.shape[:-1], 2))


# Operations that must be refused -------------------------------------------------------------------------------------


@ODD()
def random(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    d.refusal = "it is random"
    ones = ", 1" * len(d.shape)
    line = r.choice(
        [
            "x = F.dropout(x, 0.05)",
            f"x = x + (torch.rand(len(x){ones}) > 0.05).to(x) * x.sin()",
            "x = x + 0.1 * torch.randn_like(x)",
            "x = F.rrelu(x, training=True)",
            f"x = x * torch.bernoulli(torch.full((len(x){ones}), 0.95)).to(x)",
            "MODULE",
        ]
    )
    if line == "MODULE":
        m = d.module(f"torchvision.ops.StochasticDepth(0.05, {r.choice(['row', 'batch'])!r})")
        d.after.append(f"model.{m.removeprefix('self.')}.train()")
        line = f"x = x + {m}(x.sin())"
    d.then(line)


@ODD(0.5)
def random_attention(d: Draft, r: Random) -> None:
    require_fit(not d.whole and len(d.shape) == 2 and d.shape[-1] <= 4)
    d.refusal = "it is random"
    m = d.module(f"nn.MultiheadAttention({d.shape[-1]}, 1, dropout=0.05, batch_first=True)")
    d.after.append(f"model.{m.removeprefix('self.')}.train()")
    d.then(f"x = {m}(x, x, x, need_weights=False)[0]")


@ODD(0.7)
def mixing(d: Draft, r: Random) -> None:
    require_fit(not d.whole)
    d.refusal = "it mixes samples"
    d.then(r.choice(["x = x - x.mean(0)", "x = x.softmax(0)", "x = x.cumsum(0)", "x = x / x.norm()"]))
