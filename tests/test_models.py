import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from curvlab import CurvlabError
from curvlab.models import ResNet20, build, cnn, load_weights, mlp


def one_sentence(error: pytest.ExceptionInfo[CurvlabError], *parts: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text


def test_mlp_is_the_formula():
    model = mlp(6, (5, 4), 3)
    assert [name for name, _ in model.named_parameters()] == [
        f"fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")
    ]
    p = dict(model.named_parameters())
    x = torch.randn(7, 1, 2, 3)
    h = x.reshape(7, 6)
    for i in (1, 2):
        h = (h @ p[f"fc{i}.weight"].T + p[f"fc{i}.bias"]).clamp(min=0)
    torch.testing.assert_close(model(x), h @ p["fc3.weight"].T + p["fc3.bias"])
    assert len(list(mlp(6, (), 3).parameters())) == 2
    with pytest.raises(CurvlabError, match="6-0-3"):
        mlp(6, (0,), 3)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 30, 7), (1, 4, 5)])
def test_cnn_takes_images(shape):
    model = build("cnn", shape, 4)
    assert model(torch.randn(2, *shape)).shape == (2, 4)
    assert [name for name, _ in model.named_parameters()][::2] == ["conv1.weight", "conv2.weight", "fc.weight"]


@pytest.mark.parametrize("shape", [(64,), (1, 3, 8)])
def test_cnn_refuses_other_samples(shape):
    with pytest.raises(CurvlabError) as error:
        cnn(shape, 4)
    one_sentence(error, "cnn", shape)


def resnet20_by_hand(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network from its state dict; option-A shortcuts as strided 1x1 convolutions with fixed kernels."""

    def conv_bn(x, conv, bn, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
        scale = state[f"{bn}.weight"] / (var + 1e-5).sqrt()
        return x * scale[:, None, None] + (state[f"{bn}.bias"] - mean * scale)[:, None, None]

    x = conv_bn(x, "conv1", "bn1").relu()
    for layer, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            name = f"layer{layer}.{block}"
            before, stride = x.shape[1], 2 if layer > 1 and block == 0 else 1
            kernel = torch.zeros(width, before, 1, 1, dtype=x.dtype)
            kernel[torch.arange(before) + (width - before) // 2, torch.arange(before)] = 1
            out = conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride).relu()
            out = conv_bn(out, f"{name}.conv2", f"{name}.bn2")
            x = (out + F.conv2d(x, kernel, stride=stride)).relu()
    return F.linear(F.avg_pool2d(x, 8).flatten(1), state["linear.weight"], state["linear.bias"])


def test_resnet20_is_the_cifar_network():
    model = build("resnet20", (3, 32, 32), 10).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), resnet20_by_hand(model.state_dict(), x))
    assert sum(p.numel() for p in model.parameters()) == 269_722  # He et al., table 6: 0.27 M
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]) == 20


def test_resnet20_changes_nothing_in_place():
    model = ResNet20().eval()
    seen = []

    def remember(_module, inputs, output):
        seen.extend((tensor, tensor.clone()) for tensor in (*inputs, output))

    for module in model.modules():
        module.register_forward_hook(remember)
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(now, then) for now, then in seen)


def test_build_is_seeded_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build("mlp", (1, 8, 8), 10, hidden=(16,), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.fc1.weight, other.fc1.weight)
    torch.manual_seed(1)
    assert torch.equal(first.fc1.weight, mlp(64, (16,), 10).fc1.weight)
    assert first.training


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:squeezenet1_1"])
def test_torchvision_models_by_name(name):
    model = build(name, (3, 32, 32), 7)
    assert all(not value.any() for key, value in model.named_buffers() if "running_mean" in key or "tracked" in key)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_models_with_auxiliary_heads_return_one_tensor_in_train_mode():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build("torchvision:googlenet", (3, 32, 32), 7)
    assert isinstance(model(torch.randn(2, 3, 32, 32)), torch.Tensor)


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "parts"),
    [
        ("mpl", (4,), 2, ["'mpl'", "'mlp'"]),
        ("resnet18", (3, 32, 32), 2, ["'resnet18'", "'torchvision:resnet18'"]),
        ("torchvision:resnet19", (3, 32, 32), 2, ["'torchvision:resnet19'", "'torchvision:resnet1"]),
        ("resnet20", (1, 1, 1), 2, ["resnet20", "(3, 32, 32)", "(1, 1, 1)"]),
        ("cnn", (64,), 2, ["cnn", "(64,)"]),
        ("torchvision:squeezenet1_1", (1, 8, 8), 2, ["squeezenet1_1", "(1, 8, 8)"]),
        ("mlp", (4,), 0, ["outputs is 0"]),
        ("mlp", (), 2, ["()"]),
    ],
)
def test_invalid_networks_are_refused_in_one_sentence(name, shape, outputs, parts):
    with pytest.raises(CurvlabError) as error:
        build(name, shape, outputs)
    one_sentence(error, *parts)


@pytest.fixture
def state():
    return build("mlp", (4,), 2, hidden=(3,), seed=7).state_dict()


@pytest.fixture
def target():
    return build("mlp", (4,), 2, hidden=(3,), seed=8)


def test_weights_load_from_every_form(tmp_path, state):
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": parallel}, tmp_path / "wrapped.th")
    torch.save({"model": state}, tmp_path / "model.pth")
    torch.save({key: value.double() for key, value in state.items()}, tmp_path / "double.pt")
    save_file(state, tmp_path / "safe.safetensors")
    for path in sorted(tmp_path.iterdir()):
        model = build("mlp", (4,), 2, hidden=(3,), seed=8, weights=path)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), path
        assert model.fc1.weight.dtype == torch.float32


def test_old_checkpoints_have_no_batch_counters(tmp_path):
    source = ResNet20()
    counters = [key for key in source.state_dict() if key.endswith("num_batches_tracked")]
    torch.save({k: v for k, v in source.state_dict().items() if k not in counters}, tmp_path / "old.th")
    model = ResNet20()
    load_weights(model, tmp_path / "old.th")
    assert torch.equal(model.linear.weight, source.linear.weight)
    assert counters


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_weights_are_named(tmp_path, state, target, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CurvlabError) as error:
            load_weights(target, path)
        one_sentence(error, path, "truncated")


def test_files_without_a_state_dict_are_refused(tmp_path, state, target):
    cases = {
        "tensor": torch.zeros(3),
        "empty": {},
        "numbers": {"fc1.weight": 3.0},
        "indexed": {0: torch.zeros(3)},
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        with pytest.raises(CurvlabError) as error:
            load_weights(target, path)
        one_sentence(error, path, "no state dict", "model.state_dict()")
    torch.save(target, tmp_path / "module.pt")
    with pytest.raises(CurvlabError) as error:
        load_weights(target, tmp_path / "module.pt")
    one_sentence(error, tmp_path / "module.pt", "other objects than tensors", "model.state_dict()")
    with pytest.raises(CurvlabError) as error:
        load_weights(target, tmp_path / "gone.pt")
    one_sentence(error, tmp_path / "gone.pt", "no such file")


def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path, state, target):
    before = {key: value.clone() for key, value in target.state_dict().items()}
    path = tmp_path / "w.pt"

    def refused(content, *parts):
        torch.save(content, path)
        with pytest.raises(CurvlabError) as error:
            load_weights(target, path)
        one_sentence(error, path, *parts)
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())

    without = {key: value for key, value in state.items() if key != "fc2.bias"}
    refused(without, "another architecture", "no fc2.bias")
    refused(state | {"fc3.bias": torch.zeros(1)}, "an unexpected fc3.bias")
    refused(state | {"fc2.weight": torch.zeros(5, 3)}, "fc2.weight of shape (5, 3) instead of (2, 3)")
    refused(state | {"fc2.weight": torch.zeros(2, 3, dtype=torch.uint8)}, "fc2.weight in torch.uint8")
    refused(ResNet20().state_dict(), "no fc1.weight", "more")
    refused(state | {"fc2.bias": torch.tensor([0.0, float("nan")])}, "fc2.bias", "NaN or infinite")
    refused(state | {"fc2.bias": torch.tensor([0.0, 1e300], dtype=torch.float64)}, "fc2.bias", "NaN or infinite")
