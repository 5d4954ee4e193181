"""Networks and data of the user's own functions on the command line: ``--model`` and ``--data module:function``."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import yaml
from torch.nn import functional as F

import curvlab
from curvlab.analyze.__main__ import main
from curvlab.analyze.dlcft import eigenvalues_training
from curvlab.analyze.frame.functions import make_network, seeded
from curvlab.doctor import probe
from curvlab.estimators import BACKENDS
from curvlab.grid.functions import names_function
from curvlab.sweep.__main__ import main as sweep

pytestmark = pytest.mark.usefixtures("one_server", "runs_here", "no_figures")

SOURCE = """
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import curvlab

class Net(nn.Module):
    def __init__(self, hidden=4):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(5, hidden), nn.Dropout(), nn.Linear(hidden, 3)

    def forward(self, x):
        return self.last(self.drop(self.first(x).tanh()))

drawn = torch.randn(3)  # draws at the import

def make(): return Net().double()
def small(): return Net(2)
def other_inputs(): return nn.Linear(7, 3)
def no_value(): Net()
def class_itself(): return Net
def state(): return Net().state_dict()
def both(): return Net(), pair()
def number(): return 3
def fails():
    raise ValueError("not today\\nand more")
def fails_inside(): return nn.Linear("five", 3)
def quits():
    raise SystemExit(3)
def needs(hidden, depth=2): return Net(hidden)
def unseeded():
    net = Net()
    net.last.bias.data += torch.from_numpy(np.random.default_rng().normal(size=3)).float()
    return net
def prints():
    print("loading")
    return Net()
model = Net()

def pair(): return torch.randn(24, 5), torch.arange(24) % 3
def batches(): return [(x, y) for x, y in zip(pair()[0].split(7), pair()[1].split(7))]
def shuffled(): return DataLoader(TensorDataset(*pair()), batch_size=7, shuffle=True)
def data_set(): return TensorDataset(*pair())
def split():
    x, y = pair()
    return {"x_train": x, "y_train": y, "x_test": x[:9].numpy(), "y_test": y[:9]}
def split_of_four(): return split() | {"classes": ["a", "b", "c", "d"]}
def half_split(): return {"x_train": pair()[0], "y_train": pair()[1]}
def renamed(): return {"train": pair(), "test": pair()}
def regression(): return torch.randn(24, 5), torch.randn(24, 3)
def unseeded_pair(): return torch.from_numpy(np.random.default_rng().normal(size=(24, 5))), pair()[1]
def stream():
    yield pair()
def problem():
    return curvlab.Problem(
        Net(),
        "squared_error",
        {"a": torch.randn(24, 5), "b": torch.randn(24, 3)},
        forward=lambda model, batch: model(batch["a"]),
        targets=lambda batch: batch["b"],
    )
"""
FIM = "fim_diagonality --dtype float64"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run in a folder with the file ``mynet.py``, without the machine's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "no data"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    write(SOURCE)
    yield tmp_path
    forget()


def forget():
    for name in ("mynet", "mydata", "broken"):
        sys.modules.pop(name, None)


def write(source, name="mynet"):
    Path(f"{name}.py").write_text(dedent(source))
    forget()
    importlib.invalidate_caches()


@pytest.fixture
def call(capsys):
    def call(line):
        code = main(shlex.split(line))
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(call, folder):
    """Return a function that requires one sentence, exit code 2 and no file, and gives the sentence."""

    def refused(line):
        before = set(folder.rglob("*"))
        code, out, err = call(line)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert set(folder.rglob("*")) == before
        return err.removeprefix("error: ")

    return refused


def rows(run):
    return {record["parameter"]: record for record in json.loads(Path(run, "table.json").read_text())}


def expected_diagonal(net, x, y):
    """Return the sum of the diagonal of the empirical Fisher per parameter, by plain loops."""
    sums = {name: 0.0 for name, _ in net.named_parameters()}
    for one, label in zip(x, y, strict=True):
        net.zero_grad()
        F.cross_entropy(net(one[None]), label[None]).backward()
        for name, parameter in net.named_parameters():
            sums[name] += float((parameter.grad**2).sum()) / len(x)
    return sums


def returned(function, seed=0):
    with seeded(0):
        module = importlib.import_module("mynet")
    with seeded(seed):
        return getattr(module, function)()


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["pair", "batches", "shuffled", "data_set", "split"])
def test_the_network_and_the_data_are_those_of_the_functions(call, data):
    assert call(f"{FIM} --model mynet:make --data mynet:{data} --out run")[0] == 0
    x, y = returned("pair")
    sums = expected_diagonal(returned("make").eval(), x.double(), y)
    found = rows("run")
    assert found.keys() == sums.keys()
    for name, value in sums.items():
        assert found[name]["diag_sum"] == pytest.approx(value, rel=1e-9)
        assert (found[name]["samples"], found[name]["test_accuracy"], found[name]["seed"]) == (24, None, 0)


def test_a_problem_has_its_own_loss_and_data(call):
    code, out, _ = call(f"{FIM} --model mynet:problem --quantity fisher --samples 10 --out run")
    assert code == 0
    assert "Fisher of mynet:problem, 10 samples" in out
    assert "Claims" not in out  # the paper's are about tensors of an mlp
    problem = returned("problem")
    net, x = problem.model.double().eval(), problem.data["a"][:10].double()
    total = 0.0
    for one in x:  # the exact Fisher of squared error is the mean of J'J
        for row in torch.autograd.functional.jacobian(
            lambda w, one=one: F.linear(net.first(one).tanh(), w), net.last.weight
        ):
            total += float((row**2).sum()) / len(x)
    assert rows("run")["last.weight"]["diag_sum"] == pytest.approx(total, rel=1e-9)


def test_only_the_first_samples_of_own_data(call):
    assert call(f"{FIM} --model mynet:make --data mynet:batches --samples 9 --out run")[0] == 0
    x, y = returned("pair")
    sums = expected_diagonal(returned("make").eval(), x[:9].double(), y[:9])
    assert rows("run")["last.bias"]["diag_sum"] == pytest.approx(sums["last.bias"], rel=1e-9)


def test_seeds_are_those_of_the_calls(call):
    assert call(f"{FIM} --model mynet:make --data mynet:pair --seeds 0 5 --out run")[0] == 0
    x, y = returned("pair")
    found = {r["seed"]: r for r in json.loads(Path("run/table.json").read_text()) if r["parameter"] == "last.bias"}
    for seed in (0, 5):
        sums = expected_diagonal(returned("make", seed).eval(), x.double(), y)
        assert found[seed]["diag_sum"] == pytest.approx(sums["last.bias"], rel=1e-9)


def test_training_weights_and_fine_tuning(call):
    net = returned("small")
    torch.save(net.state_dict(), "w.pt")
    line = f"{FIM} --model mynet:small --data mynet:split"
    assert call(f"{line} --weights w.pt --out loaded")[0] == 0
    x, y = returned("pair")
    sums = expected_diagonal(net.double().eval(), x.double(), y)
    assert rows("loaded")["first.weight"]["diag_sum"] == pytest.approx(sums["first.weight"], rel=1e-6)
    assert call(f"{line} --weights w.pt --fine-tune --steps 2 --out tuned")[0] == 0
    assert rows("tuned")["first.weight"]["test_accuracy"] is not None


def test_agreement(call):
    line = "agreement --model mynet:problem --quantities fisher --structures diag kfac --backends hooks torch"
    assert call(f"{line} --dtype float64 --out run")[0] == 0
    found = json.loads(Path("run/differences.json").read_text())
    assert len(found) == 2
    assert all(record["difference"] < 1e-12 for record in found)


def test_eigenvalues(call, monkeypatch):
    trained = []
    fit = eigenvalues_training.fit
    monkeypatch.setattr(
        eigenvalues_training, "fit", lambda model, *a, **k: trained.append(model) or fit(model, *a, **k)
    )
    line = "eigenvalues --model mynet:small --data mynet:split --steps 2 --every 1 --validation 5 --seeds 0"
    assert call(f"{line} --quantities fisher --ekfac-every none --lr-squared-error 0.01 --out run")[0] == 0
    assert {type(model).__name__ for model in trained} == {"Net"}
    assert json.loads(Path("run/provenance.json").read_text())["subject"]["train"] == 19


def test_doctor(call, monkeypatch):
    few = {name: BACKENDS[name] for name in ("hooks", "torch")}
    for module in (sys.modules["curvlab.doctor"], probe):
        monkeypatch.setattr(module, "BACKENDS", few)
    monkeypatch.setattr(probe, "_PATIENCE", 0.0)
    code, out, _ = call("doctor --model mynet:make --data mynet:shuffled --quantities empirical_fisher --out run")
    assert code == 0
    assert out.startswith("Net of 39 parameters in float32, cross_entropy, 24 samples in batches of 7.")  # in eval mode
    functions = json.loads(Path("run/provenance.json").read_text())["functions"]
    assert functions["model"]["function"] == "mynet:make"


def test_every_call_is_with_the_same_random_state(call):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = [tensor.clone() for tensor in make_network("mynet:make", 1)[0].parameters()]
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first, make_network("mynet:make", 1)[0].parameters(), strict=True):
        assert torch.equal(one, other)


# Configuration, provenance and store ----------------------------------------------------------------------------------


def test_configuration_and_provenance(call, folder):
    assert call(f"{FIM} --model mynet:make --data mynet:pair --out run")[0] == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["model"], config["data"]) == ("mynet:make", "mynet:pair")
    # The defaults for networks of the package do not apply.
    assert (config["steps"], config["seeds"], config["classes"]) == (0, [0], "all")
    origin = json.loads(Path("run/provenance.json").read_text())
    for option, function in (("model", "mynet:make"), ("data", "mynet:pair")):
        found = origin["functions"][option]
        assert (found["function"], found["file"]) == (function, str(folder / "mynet.py"))
        assert len(found["source"]) == 32
    assert origin["functions"]["data"]["returned"] == origin["data_hash"]
    assert call("fim_diagonality --config run/config.yaml --out run")[0] == 0  # continues


@pytest.mark.parametrize("change", ["source", "import", "weights", "data"])
def test_a_store_is_not_continued_with_another_version(call, change):
    write("factor = 1.0\n", "mydata")
    torch.save(torch.ones(2), "saved.pt")
    source = SOURCE + dedent("""
    import mydata

    def loads():
        net = Net()
        net.last.bias.data *= torch.load("saved.pt")[0]
        return net

    def data():
        x, y = pair()
        return x * torch.load("saved.pt")[1], y
    """)
    write(source)
    line = f"{FIM} --model mynet:loads --data mynet:data --out run"
    assert call(line)[0] == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    if change == "source":
        write(source + "# another line\n")
    elif change == "import":
        write("factor = 2.0\n", "mydata")
    else:
        torch.save(torch.tensor([2.0, 1.0] if change == "weights" else [1.0, 2.0]), "saved.pt")
    code, out, err = call(line)
    assert (code, out) == (2, "")
    assert "run/sweep.sqlite have called another version of mynet:" in err
    assert "continues there" not in err
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    assert call(line.replace("--out run", "--out other"))[0] == 0


def test_an_analysis_in_a_sweep(capsys):
    Path("s.yaml").write_text(
        "analysis: fim_diagonality\nbase: {model: 'mynet:make', data: 'mynet:pair'}\ngrid: {quantity: [ggn, fisher]}\n"
    )
    assert sweep(["run", "s.yaml"]) == 0
    assert "2 runs: 2 done" in capsys.readouterr().out
    write(SOURCE + "# another line\n")
    assert sweep(["run", "s.yaml"]) == 2
    assert "have called another version of mynet:make" in capsys.readouterr().err


def test_the_current_folder_is_importable(folder):
    """Both programs find a file in it, and runs in processes of their own do as well."""
    root = str(Path(curvlab.__file__).parents[1])
    line = "fim_diagonality --model mynet:prints --data mynet:pair --per network --out run"
    script = (
        f"import sys; sys.path.remove(''); from curvlab.__main__ main; sys.exit(main({['analyze', *line.split()]}))"
    )
    script = script.replace("__main__ main", "__main__ import main")
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert ended.returncode == 0, ended.stderr
    assert "loading" not in ended.stdout
    assert "on mynet:pair, 24 samples" in ended.stdout


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mynt:make", "function mynt:make: cannot import 'mynt': no such module; did you mean 'mynet'?"),
        ("no_such.part:make", "function no_such.part:make: cannot import 'no_such': no such module"),
        ("mynet:mak", "mynet.py has no 'mak'; did you mean 'make'?"),
        ("mynet:", "a function must be named module:name, not 'mynet:'"),
        ("mynet.py:make", "'mynet.py' is not the name of a module: write mynet:make"),
        ("some/mynet.py:make", "write mynet:make, in the folder some"),
        ("mynet:model", "mynet:model is a Net, not a function: write one in mynet that returns the network"),
        ("mynet:drawn", "mynet:drawn is a torch.strided tensor of torch.float32 and shape (3,), not a function"),
        ("mynet:needs", "mynet:needs needs the arguments hidden, but is called without arguments"),
        ("mynet:fails", "mynet:fails raises ValueError: not today and more (mynet.py, line 27)"),
        ("mynet:fails_inside", "mynet:fails_inside raises TypeError: "),
        ("mynet:quits", "mynet:quits raises SystemExit: 3 (mynet.py, line 30)"),
        ("mynet:no_value", "mynet:no_value returns None: it must end with return and the network"),
        ("mynet:class_itself", "mynet:class_itself returns the class Net, not a network: return Net()"),
        ("mynet:state", "mynet:state returns a state dict: build the network, call its load_state_dict"),
        ("mynet:both", "mynet:both returns a tuple of 2 (Net, tuple): return the network alone"),
        ("mynet:number", "mynet:number returns 3, not a torch.nn.Module or a curvlab.Problem"),
        ("mynet:unseeded", "mynet:unseeded returns other weights at its second call"),
        ("mynet:problem", "mynet:problem returns a curvlab.Problem, which contains the data: leave out --data"),
        ("mynet:other_inputs", "Linear raises an error on the first samples of the data: RuntimeError: mat1 and mat2"),
        ("mlp", "mynet:pair returns data without a split, and mlp is built for the samples and classes"),
    ],
)
def test_a_network_that_is_none(refused, model, message):
    assert message in refused(f"fim_diagonality --model {model} --data mynet:pair")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("mynet:no_such", "mynet.py has no 'no_such'"),
        ("mynet:fails", "mynet:fails raises ValueError"),
        ("mynet:no_value", "mynet:no_value returns None: return a pair of tensors, a DataLoader, a data set, a list"),
        ("mynet:make", "mynet:make returns a Net: return a pair of tensors"),
        ("mynet:number", "mynet:number returns 3: return a pair of tensors"),
        ("mynet:stream", "mynet:stream returns a generator, which can be read only once: return a list"),
        (
            "mynet:problem",
            "mynet:problem returns a curvlab.Problem, which contains a network: name this function in --mo",
        ),
        ("mynet:renamed", "mynet:renamed returns a dict with train, test: name the parts of a split x_train, y_train"),
        ("mynet:half_split", "mynet:half_split returns a dict without x_test"),
        ("mynet:split_of_four", "mynet:make returns (2, 3) for 2 samples of mynet:split_of_four, which has 4 classes"),
        ("mynet:regression", "(for a loss other than cross_entropy, return a curvlab.Problem with this loss"),
        ("mynet:unseeded_pair", "mynet:unseeded_pair returns other samples at its second call"),
        ("digits", "mynet:make fails on samples of digits of shape (1, 8, 8): RuntimeError: mat1 and mat2"),
    ],
)
def test_data_that_are_none(refused, data, message):
    assert message in refused(f"fim_diagonality --model mynet:make --data {data}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fim_diagonality --model mynet:make", "mynet:make returns a Net, and there are no data: add --data"),
        ("doctor --data none", "data is none, which is for a function of your own in --model"),
        ("doctor --model mynet:make --data mynet:pair --hidden 3", "--hidden has no effect: it is for --model mlp"),
        ("agreement --model mynet:make --data mynet:pair --steps 5", "steps is 5, but the data of mynet:pair have no"),
        ("doctor --model mynet:make --data mynet:pair --classes 1", "classes is (1,), but it applies to data with a"),
        (
            "doctor --model mynet:make --data mynet:pair --samples 99",
            "the data of mynet:pair have only 24; choose fewer",
        ),
        ("doctor --model mynet:make --data mynet:pair --fine-tune", "fine_tune needs weights from a file"),
        ("eigenvalues --model mynet:make --data mynet:pair", "no split into training and test samples: return a dict"),
        ("eigenvalues --model mynet:problem", "return the network from it, and a dict with x_train"),
        ("ewc_grid --model mynet:make --data mynet:pair", "no split into training and test samples: return a dict"),
    ],
)
def test_options_that_do_not_fit(refused, line, message):
    assert message in refused(line)


def test_errors_at_the_import(refused):
    line = "doctor --model broken:make --data mynet:pair"
    write("import no_such_library\n", "broken")
    assert "cannot import 'no_such_library': no such module (broken.py, line 1)" in refused(line)
    write("def make():\n    return (\n", "broken")
    assert "function broken:make: SyntaxError: " in refused(line)
    write("x = 1\nx.y\n", "broken")
    assert "AttributeError: 'int' object has no attribute 'y' (broken.py, line 2)" in refused(line)


def test_the_traceback_is_shown_on_request(call):
    code, _, err = call("doctor --model mynet:fails --data mynet:pair --debug")
    assert code == 2
    assert "Traceback" in err
    assert 'raise ValueError("not today' in err


def test_names_of_functions():
    assert names_function("a.b:c")
    Path("odd:name.npz").touch()
    assert not any(map(names_function, ("odd:name.npz", "torchvision:resnet18", "mlp", "C:\\x.npz")))
