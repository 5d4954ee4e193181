"""What the frame does for every analysis: options, a run, the same again, failures, a search, files, kept results."""

import functools
import json
import math
import shlex
import shutil
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import Field

from curvlab.analyze import ANALYSES, ROOMS, Entry, load_analysis
from curvlab.analyze.__main__ import main
from curvlab.analyze.frame import driver, results
from curvlab.analyze.frame.analysis import Analysis, Preset, Report, Table
from curvlab.analyze.frame.pages import render_index, render_readme
from curvlab.analyze.frame.results import find_preset, keep_result, read_results
from curvlab.analyze.frame.search import Search, find_boundary_values
from curvlab.analyze.frame.subject import SubjectConfig, load_dataset, take
from curvlab.commandline.options import RunOptions
from curvlab.commandline.parser import Parser, option_name, select_fields, validate
from curvlab.errors import CurvlabError
from curvlab.grid import Place
from curvlab.results import Claim, Column, Identity

pytestmark = pytest.mark.usefixtures("no_figures", "runs_here")

ROOT = Path(driver.__file__).parents[3]

#: Options that make a run of every analysis small.
SMALL = {
    "agreement": "--hidden 4 --steps 3 --samples 20 --quantities fisher:samples=1 --structures diag "
    "--backends hooks torch",
    "fim_diagonality": "--hidden 4 --steps 3 --samples 40",
    "ewc_grid": "--nets 4-3 --steps 3 --every 2 --samples 40 --train-samples 700 --test-samples 200 --rates 0.001 "
    "--strengths 100",
    "masq_vs_fim": "--hidden 4 --steps 3 --streams D5-5 --parts values masq fim --points 0 2 --batch-sizes 1 20 "
    "--partition-samples 40 --partitions 2 --samples 60 --masq-batch-size 20",
    "imm_masq": "--hidden 4 --steps 3 --streams D9-1 --samples 40 --train-samples 300 --test-samples 60 "
    "--alphas 0.5 0.9",
    "fisher_variants": "--hidden 4 --steps 3 --streams D9-1 --samples 40 --train-samples 300 --test-samples 60 "
    "--quantities fisher empirical_fisher --subsets 10 --strengths 1 100",
    "fisher_histogram": "--hidden 6 --steps 3 --samples 30",
    "empirical_fisher_field": "--samples 20 --steps 30",
    "natural_gradient": "--hidden 3 --steps 3 --every 3 --samples 60 --validation 20 --batch-size 30 "
    "--methods sgd diag --sgd-lrs 0.1 --natural-lrs 0.1 --dampings 0.1 "
    "--regression-samples 20 --regression-steps 3",
    "adam_preconditioner": "--hidden 3 --steps 4 --every 2 --samples 30 --batch-size 20",
    "kl_gaussians": "--starts 2 --hidden 2 --points 5",
    "ewc_modes": "--hidden 5 --epochs 1 --tasks 2 --task-samples 60 --validation 20 --samples 20 --methods naive l2 "
    "ewc_separate --ewc-strengths 10 --l2-strengths 0.1",
    "laplace_posterior": "--hidden 2 --models network --chunks 2 --chunk-samples 8 --draws 4 --warmup 2 --chains 2",
    "surrogate": "--hidden 4 --steps 3 --samples 20 --points 5",
    "clipped_fisher": "--hidden 6 --steps 3 --samples 30 --batches 2",
    "eigenvalues": "--hidden 4 --steps 6 --every 3 --samples 30 --batch-size 20 --ekfac-every none "
    "--lr-squared-error 0.003",
    "softmax_hessian": "--hidden 4 --steps 6 --points 3 --samples 30 --draws 4 --decades 3",
    "forgetting_bound": "--hidden 5 --epochs 1 --tasks 3 --task-samples 60 --samples 30 --regimes stable plastic",
    "training_regimes": "--hidden 3 --epochs 1 --tasks 3 --task-samples 40 --samples 20 --regimes stable plastic "
    "--streams rotated --tol 0.1",
    "forgetting_forecast": "--hidden 5 --epochs 1 --tasks 3 --task-samples 60 --samples 30 --methods naive ewc "
    "--streams rotated",
    "lr_schedules": "--hidden 5 --source-steps 3 --steps 4 --every 2 --validation 40 --samples 30 --lrs 0.01 0.1 "
    "--decays 0.5 --schedules constant step",
    "methods": "--hidden 5 --epochs 1 --tasks 2 --task-samples 60 --validation 20 --samples 20 --trials 1 "
    "--methods naive ewc stable",
    "dlcft": "--hidden 5 --steps 3 --source-steps 3 --stream-samples 120 --validation 30 "
    "--test-samples 60 --settings data class "
    "--data-tasks 2 --methods fine_tuning ewc dlcft_kfac --nonlinear-lrs 0.01 --linear-lrs 0.01 "
    "--ewc-strengths 1 --dlcft-strengths 1",
}

#: Those whose records have seconds.
TIMED = {"agreement", "masq_vs_fim", "forgetting_forecast", "methods", "dlcft", "eigenvalues", "natural_gradient"}

GRIDS = [name for name in ANALYSES if isinstance(load_analysis(name), Analysis)]

#: Those of toy problems, which have no options of data, network and device.
WITHOUT_DATA = [name for name in GRIDS if "data" not in load_analysis(name).config.model_fields]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "no data"))


@pytest.fixture
def call(capsys):
    """Return a function that runs a command and gives exit code, standard output and standard error."""

    def call(line):
        code = main(shlex.split(line))
        return (code, *capsys.readouterr())

    return call


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# Every analysis ------------------------------------------------------------------------------------------------------


def test_every_analysis_has_small_options_here():
    assert set(SMALL) == set(GRIDS)


@pytest.mark.parametrize("name", ANALYSES)
def test_help_and_configuration(call, name):
    code, out, _ = call(f"{name} --help")
    assert code == 0
    assert out.startswith(f"usage: python -m curvlab.analyze {name} [OPTIONS]")
    analysis = load_analysis(name)
    text = " ".join(out.split())
    for field in analysis.config.model_fields:
        assert f"--{field.replace('_', '-')} " in text
    for preset in analysis.presets:
        first = call(f"{name} --preset {preset} --print-config")[1]
        assert yaml.safe_load(first)
        Path("c.yaml").write_text(first)
        assert call(f"{name} --config c.yaml --print-config") == (0, first, "")


@pytest.mark.parametrize("name", ANALYSES)
@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--sedes 1", "unknown option --sedes"),
        ("--preset defalt", "unknown preset 'defalt'; did you mean 'default'?"),
        ("stray", "unexpected argument 'stray'"),
        ("--config none.yaml", "cannot read none.yaml"),
        ("--out ''", "--out has an empty value"),
    ],
)
def test_bad_words(call, name, line, fragment):
    code, out, err = call(f"{name} {line}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert fragment in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("--seeds", "seeds needs one or more different values"),
        ("--seeds 1 1", "seeds needs one or more different values"),
        ("--seeds -1", "--seeds should be greater than or equal to 0"),
        ("--data digts", "digts"),
        ("--data mnist --offline", "mnist is incomplete on disk"),
        ("--weights gone.pt", "weights file gone.pt not found, neither here nor in the data root"),
        ("--device cuda:99", "device 'cuda:99' is not available"),
        ("--samples 0", "--samples should be greater than or equal to"),
        ("--jobs 0", "--jobs should be greater than or equal to 1"),
        ("--scheduler tcp://127.0.0.1:x", "cannot reach a Dask scheduler at tcp://127.0.0.1:x"),
    ],
)
def test_bad_values(call, name, line, fragment):
    option = line.split()[0]
    if option.removeprefix("--") in {"data", "weights", "device", "samples"} - set(
        load_analysis(name).config.model_fields
    ):
        fragment = f"unknown option {option}"
    elif option.removeprefix("--") in load_analysis(name).config.unread and "samples" not in option:
        fragment = f"{option} has no effect here"
    code, out, err = call(f"{name} {SMALL[name]} {line} --out run")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert not Path("run").exists()


def track_fields(config, monkeypatch):
    """Return the set of the fields of a config class that are read from now on."""
    read, get = set(), config.__getattribute__

    def getattribute(self, name):
        if name in config.__pydantic_fields__:
            read.add(name)
        return get(self, name)

    monkeypatch.setattr(config, "__getattribute__", getattribute)
    return read


@pytest.mark.parametrize("name", GRIDS)
def test_every_option_is_read_or_refused(name, tmp_path, monkeypatch):
    """A run reads each option, except those that are refused: for a value that they do not belong to, or any other."""
    analysis = load_analysis(name)
    parser = Parser(name)
    parser.add(default := analysis.presets["default"].config)
    given = parser.parse_options(shlex.split(f"{SMALL[name]} --seeds 0"), [default])
    config = validate(type(default), {**default.model_dump(), **select_fields(given, type(default))}, option_name)
    used = {field for field in type(config).model_fields if field not in config.unread}
    used = {field for field in used if config.find_readers(field) is None}
    # A search without a choice needs no seeds, and several fields of ewc_modes name its methods.
    used -= {"selection_seeds"}
    if name == "ewc_modes":
        used -= {"average_gamma", "online_gamma", "structure"}
        used -= {option for option in used if option.endswith("_strengths")}
    parts = [config] if analysis.parts is None or analysis.search else analysis.parts(config)
    specs = analysis.run_specs(parts)
    unchecked = replace(analysis, check=lambda *_: None)  # the check reads more than the run
    read = track_fields(type(config), monkeypatch)
    for number, spec in enumerate(specs):
        (folder := tmp_path / str(number)).mkdir()
        unchecked.execute(spec.config, Place(folder))
    assert used - read == set()


@pytest.mark.parametrize("name", GRIDS)
def test_options_of_a_value_name_fields_and_values(name):
    config = load_analysis(name).config
    for option, (other, values) in config.only_for.items():
        assert {option, other} <= set(config.model_fields)
        values = values() if callable(values) else values
        is_word = isinstance(config.model_fields[other].default, str)
        field = {other: values[0] if is_word or values == ((),) else values}
        assert config(**field).find_readers(option) is None
    assert set(config.unread) <= set(config.model_fields)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ewc_grid --hidden 8", "--hidden has no effect here (the networks are those of nets): leave it out"),
        ("laplace_posterior --dtype float32 --samples 9", "--samples has no effect here (there are chunks times"),
        ("ewc_grid --nets 8-", "--nets should be hidden sizes joined by hyphens, such as 200-200-100, not '8-'"),
        ("ewc_grid --nets 5 0-3", "--nets should be hidden sizes joined by hyphens, such as 200-200-100, not '0-3'"),
        ("laplace_posterior --model cnn", "--model has no effect here (the models are those of models and hidden)"),
        ("dlcft --fine-tune", "--fine-tune has no effect here (with weights, the last layer is always replaced)"),
        ("agreement --model cnn --hidden 4", "--hidden has no effect: it is for --model mlp; leave it out"),
        ("forgetting_forecast --methods naive --memory 5", "--memory has no effect: it is for --methods er;"),
        ("methods --methods naive ewc --per-class 2", "--per-class has no effect: it is for --methods agem or er;"),
        ("ewc_modes --methods naive --si-strengths 2", "--si-strengths has no effect: it is for --methods si; leave"),
        (
            "training_regimes --regimes stable --plastic-lr 1",
            "--plastic-lr has no effect: it is for --regimes plastic or",
        ),
        (
            "forgetting_forecast --methods stable --plastic-lr 1",
            "--plastic-lr has no effect: it is for --methods naive or ewc or er;",
        ),
        (
            "fim_diagonality --streams D5-5 --classes 1 2",
            "--classes has no effect: it is for runs without --streams; leave it out",
        ),
        (
            "natural_gradient --problems regression --sgd-lrs 0.1",
            "--sgd-lrs has no effect: it is for --problems network; leave it out",
        ),
    ],
)
def test_an_option_without_effect_or_form_is_refused(call, line, message):
    code, out, err = call(f"{line} --out run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")
    assert not Path("run").exists()


def test_a_file_may_have_the_options_of_other_values_but_none_that_is_never_read(call):
    Path("c.yaml").write_text("methods: [naive]\nmemory: 5\n")
    assert call("forgetting_forecast --config c.yaml --print-config")[0] == 0
    Path("c.yaml").write_text("hidden: [8]\n")
    code, _, err = call("ewc_grid --config c.yaml --print-config")
    assert (code, err) == (
        2,
        "error: c.yaml: hidden has no effect here (the networks are those of nets): leave it out\n",
    )


@pytest.mark.parametrize("name", [name for name in GRIDS if "weights" in load_analysis(name).config.model_fields])
def test_weights_of_another_network_are_refused_before_a_run(call, name):
    torch.save({"other.weight": torch.ones(2, 2)}, "other.pt")
    code, out, err = call(f"{name} {SMALL[name]} --weights other.pt --out run")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert not Path("run").exists()


@pytest.mark.parametrize("name", GRIDS)
def test_only_what_failed_is_repeated_then_nothing_and_the_report(call, name, tmp_path, monkeypatch):
    """A run leaves what its report needs; the same command prints the same, and changes no file."""
    analysis, done = load_analysis(name), []

    def fail_later(config, dataset, workspace):
        if done:
            raise CurvlabError("stopped")
        done.append(config)
        return list(analysis.measure(config, dataset, workspace))

    def count(config, dataset, workspace):
        done.append(config)
        return analysis.measure(config, dataset, workspace)

    def use(measure):
        measure.__module__ = analysis.module
        monkeypatch.setattr(sys.modules[analysis.module], "ANALYSIS", replace(analysis, measure=measure))

    line = f"{name} {SMALL[name]} --seeds 0 1 2 --jobs 1 --out run"
    use(fail_later)
    code, _, err = call(line)
    assert code == 1
    assert "runs done in run: 1; the same command with --out run --retry-failed continues there" in err
    done.clear()
    use(count)
    code, out, err = call(f"{line} --retry-failed")
    assert (code, err) == (0, "")
    total = json.loads(Path("run/provenance.json").read_text())["runs_by_status"]["done"]
    assert 0 < len(done) < total
    assert "\x1b" not in out
    assert "Saved in run: " in out
    before = contents("run")
    names = {"config.yaml", "claims.json", "provenance.json", *(f"table.{end}" for end in ("json", "csv", "md", "tex"))}
    assert names <= set(before)
    done.clear()
    assert call(line) == (0, out, "")
    assert contents("run") == before
    assert not done

    claims = json.loads(Path("run/claims.json").read_text())
    for claim in claims:  # on digits no number of a paper is tested
        assert claim["reason"] if claim["verdict"] == "not tested" else not claim["reason"]
    finished = driver.read_run(analysis, Path("run"))
    report = analysis.report(finished)
    assert [claim.verdict for claim in report.claims] == [claim["verdict"] for claim in claims]
    assert finished.subject.data == ("" if name in WITHOUT_DATA else "digits")
    assert (json.loads(Path("run/provenance.json").read_text())["data_hash"] is None) == (name in WITHOUT_DATA)
    assert {Path(file).stem for file in before if file.endswith(".png")} == set(report.figures)
    for table in report.tables or [report.summary]:
        assert len(table.records) > 0
    if ANALYSES[name].room in ROOMS:
        keep_result(Path("run"), tmp_path / "analyses")
        (kept,) = read_results(tmp_path / "analyses", ANALYSES[name].room)
        assert kept.report.claims == report.claims
        assert kept.report.summary == report.summary
        assert f"## {name}" in render_readme(tmp_path / "analyses", ANALYSES[name].room)

    if name not in TIMED:  # what was repeated is what a run without a failure gives
        monkeypatch.setattr(driver, "draw", lambda *_: [])
        line = f"{name} {SMALL[name]} --seeds 1 --jobs 1"
        assert call(f"{line} --out whole")[0] == 0
        Path("again").mkdir()
        shutil.copy("whole/config.yaml", "again")
        for left in Path("run").glob("sweep.sqlite*"):
            left.rename(Path("again", left.name))
        done.clear()
        assert call(f"{line} --out again")[0] == 0
        assert not done
        for file in ("table.json", "table.csv", "table.md", "table.tex", "claims.json"):
            assert Path("again", file).read_bytes() == Path("whole", file).read_bytes()


@pytest.mark.parametrize("name", GRIDS)
def test_presets_say_what_they_need(name):
    for preset in load_analysis(name).presets.values():
        data = {"mnist", "cifar100"} & {getattr(preset.config, "data", None)}
        assert data <= set(preset.needs)
    assert find_preset(load_analysis(name), load_analysis(name).presets["default"].config) == "default"


def test_the_committed_pages_are_what_the_records_give(monkeypatch):
    """If this fails: make papers."""
    if not (ROOT / "docs" / "papers").is_dir():
        pytest.skip("the results and the documentation are not installed with the package")
    monkeypatch.setattr(results, "_read", functools.cache(results._read))  # each report serves three pages
    folder = ROOT / "analyses"
    pages = {folder / room / "README.md": render_readme(folder, room) for room in ROOMS if (folder / room).is_dir()}
    pages[ROOT / "docs" / "papers" / "index.md"] = render_index(folder)
    for file, page in pages.items():
        assert file.read_text() == page


# An analysis of the test ---------------------------------------------------------------------------------------------


class ToyConfig(SubjectConfig):
    """Numbers."""

    rates: tuple[float, ...] = (1.0,)
    """Rates tried."""
    fails: tuple[int, ...] = ()
    """Seeds whose run fails."""
    evaluation: str = "test"
    """What is measured."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2))
    """Seeds."""


def measure(config, dataset, workspace):
    (seed,), (rate,) = config.seeds, config.rates
    if seed in config.fails:
        raise CurvlabError("it cannot be")
    if rate > 100:
        raise CurvlabError("the loss is nan")
    workspace.save("thing", {"seed": seed, "rate": rate})
    yield {"seed": seed, "rate": rate, "acc": rate / (1 + rate**2), "first": int(dataset.y_train[0])}
    yield {"seed": seed, "extra": 1}


def make_report(results):
    records = results.records["table"]
    return Report(
        Table(f"Toy; {results.spread}", [Column("seed", "seed"), Column("acc", "accuracy")], records),
        claims=[Claim.of("It is positive", "ours", [record["acc"] for record in records], lambda value: value > 0)],
        identities=[Identity("One is one", [1.0])],
        figures={"figure": lambda: __import__("matplotlib.figure").figure.Figure()},
        deviations=["nothing."],
        notes=[f"{len(results.records['extras'])} extras, {len(results.artifacts['thing'])} things"],
    )


def vary(config, group, rate, seed):
    return config.model_copy(update={"rates": (rate["rate"],), "seeds": (seed,), "evaluation": "validation"})


SEARCH = Search(
    candidates=lambda config: [({"method": "toy"}, [{"rate": rate} for rate in config.rates])],
    config=vary,
    runs=lambda config, chosen: [config.model_copy(update={"rates": (chosen[0].candidate["rate"],)})],
    seeds=lambda _: (100, 101),
    value="acc",
    advice="lower rates",
    limits={"rate": (1.0,)},
)

ANALYSIS = Analysis(
    ToyConfig,
    "A toy.",
    {"default": Preset(ToyConfig()), "other": Preset(ToyConfig(rates=(0.5, 2.0)), minutes=3, needs=("gpu",))},
    measure,
    make_report,
    search=SEARCH,
    kinds={"table": "acc", "extras": "extra"},
    artifacts=("thing",),
)


@pytest.fixture
def toy(monkeypatch, call):
    monkeypatch.setitem(ANALYSES, "test_frame", Entry("masq", "A toy."))
    monkeypatch.setitem(sys.modules, "curvlab.analyze.masq.test_frame", sys.modules[__name__])
    return lambda line: call(f"test_frame {line}")


def test_presets_and_their_cost_are_in_the_help(toy):
    assert "A toy. Presets: default, other (3 min, needs gpu)." in " ".join(toy("--help")[1].split())


def test_what_a_run_says_and_leaves(toy):
    code, out, err = toy("--out run")
    assert (code, err) == (0, "")
    for text in ("Toy; mean ± standard deviation over 3 seeds", "3 extras, 3 things", "- nothing.", "One is one"):
        assert text in " ".join(out.split())
    assert json.loads(Path("run/extras.json").read_text()) == [{"seed": seed, "extra": 1} for seed in range(3)]
    assert json.loads(Path("run/thing.json").read_text())[1] == {"seed": 1, "rate": 1.0}
    assert (
        "Saved in run: claims (.json), extras (.json), figure (.pdf .png), provenance (.json), selection (.json), "
        "table (.csv .json .md .tex), thing (.json), sweep.sqlite.\n" in out
    )


def test_runs_that_fail(toy):
    code, out, err = toy("--fails 1 --out run")
    assert code == 1
    assert err.splitlines()[0] == "error: 1 of 3 runs failed; the first (seed 1): it cannot be"
    assert err.splitlines()[1].startswith("runs done in run: 2; the same command with --out run --retry-failed")
    assert "over the seeds that did not fail" in " ".join(out.split())
    assert "Failed runs (not included above):" in out
    finished = driver.read_run(ANALYSIS, Path("run"))
    assert [one["seed"] for one in finished.failed] == [1]
    assert finished.total == 3
    with pytest.raises(CurvlabError, match="1 of 3 runs in run failed"):
        keep_result(Path("run"), Path("analyses"))
    code, out, err = toy("--fails 0 1 2 --out none")
    assert (code, out) == (1, "")
    assert err.startswith("error: 3 of 3 runs failed; the first (seed 0): it cannot be\n")
    assert not Path("none/table.json").exists()


def test_a_damaged_store_is_not_said_to_continue(toy):
    assert toy("--out run")[0] == 0
    with sqlite3.connect("run/sweep.sqlite") as store:
        store.execute("update entries set value = 7.0")
    code, _, err = toy("--out run")
    assert code == 2
    assert "damaged or not a store" in err
    assert "continues there" not in err


def test_the_best_candidate_is_taken(toy):
    code, out, _ = toy("--rates 0.5 1 3 1000 --out run")
    assert code == 0
    assert {record["rate"] for record in json.loads(Path("run/table.json").read_text())} == {1.0}
    selection = json.loads(Path("run/selection.json").read_text())
    assert [(row["rate"], row["chosen"], row["validation_acc"]) for row in selection] == [
        (0.5, False, pytest.approx(0.4)),
        (1.0, True, pytest.approx(0.5)),
        (3.0, False, pytest.approx(0.3)),
        (1000.0, False, None),
    ]
    assert selection[3]["note"] == "the loss is nan"
    assert "Hyper-parameters, chosen on held-out samples" in out
    assert "may lie outside the range" not in out
    assert "may lie outside the range" in toy("--rates 2 3 4 --out other")[1]


def test_two_values_are_named_without_a_star(toy):
    """One of two values is always at an end of the range: a star would say nothing of the search."""
    out = toy("--rates 2 3 --out run")[1]
    assert "may lie outside the range" not in out
    assert "Only two values were tried for rate" in out


def test_a_repetition_does_not_touch_the_store(toy):
    assert toy("--rates 0.5 1 3 --out run")[0] == 0
    store = Path("run/sweep.sqlite")
    before, changed = store.read_bytes(), store.stat().st_mtime_ns
    assert toy("--rates 0.5 1 3 --out run")[0] == 0
    assert (store.read_bytes(), store.stat().st_mtime_ns) == (before, changed)


def test_all_candidates_diverge(toy):
    code, _, err = toy("--rates 200 300 --out run")
    assert code == 2
    assert err.startswith("error: toy fails with all of its 2 candidates (the loss is nan); lower rates")


def test_a_limit_is_no_end():
    rows = [{"rate": rate} for rate in (0.1, 0.5, 1.0)]
    assert find_boundary_values(SEARCH, rows[0], rows, ["rate"]) == ["rate"]
    assert find_boundary_values(SEARCH, rows[2], rows, ["rate"]) == []


def test_kept_results(toy):
    assert toy("--preset other --out run")[0] == 0
    file, replaced = keep_result(Path("run"), Path("analyses"))
    assert not replaced
    assert keep_result(Path("run"), Path("analyses")) == (file, True)
    assert file == Path("analyses/masq/results/test_frame.other.json")
    (kept,) = read_results(Path("analyses"), "masq")
    assert kept.preset == "other"
    readme = render_readme(Path("analyses"), "masq")
    assert "`python -m curvlab.analyze test_frame --preset other`" in readme
    assert "| It is positive | ours | – | 0.4000 ± 0 | reproduced |" in readme
    assert "| Gepperth and Wiech (2019) | test_frame, other |" in render_index(Path("analyses"))
    old = json.loads(file.read_text()) | {"version": 7}
    file.write_text(json.dumps(old))
    with pytest.raises(
        CurvlabError, match=r"other\.json was created by version 7 of test_frame, and this is version 1"
    ):
        read_results(Path("analyses"), "masq")
    origin = json.loads(Path("run/provenance.json").read_text())
    Path("run/provenance.json").write_text(json.dumps(origin | {"version": 7}))
    with pytest.raises(CurvlabError, match="run was created by version 7 of test_frame"):
        keep_result(Path("run"), Path("analyses"))
    file.write_text("{}")
    with pytest.raises(CurvlabError, match=r"test_frame\.other\.json is not a kept result"):
        read_results(Path("analyses"), "masq")
    with pytest.raises(CurvlabError, match="is not a run directory"):
        keep_result(Path("analyses"), Path("analyses"))
    with pytest.raises(CurvlabError, match="run is a run of test_frame, not of fisher_histogram"):
        driver.read_run(load_analysis("fisher_histogram"), Path("run"))
    Path("half").mkdir()
    Path("half/config.yaml").write_bytes(Path("run/config.yaml").read_bytes())
    with pytest.raises(CurvlabError, match="half is not a finished run of test_frame"):
        keep_result(Path("half"), Path("analyses"))
    assert results.FOLDER == "results"


# Which samples -------------------------------------------------------------------------------------------------------


def test_samples_are_random_ones_the_same_for_every_analysis(tmp_path):
    """Files may have their samples class by class."""
    y = np.sort(np.arange(60) % 3)
    x = np.arange(60, dtype=np.float32)[:, None]
    np.savez("sorted.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    whole = load_dataset(SubjectConfig(data="sorted.npz"), RunOptions())
    assert set(whole.y_train[:12].tolist()) == {0, 1, 2}
    assert sorted(whole.x_train.flatten().tolist()) == x.flatten().tolist()
    again = load_dataset(SubjectConfig(data="sorted.npz", validation=12), RunOptions())
    assert again.x_train.flatten().tolist() == whole.x_train[12:].flatten().tolist()
    some = load_dataset(SubjectConfig(data="sorted.npz", classes=(2, 0)), RunOptions())
    assert some.x_train.flatten().tolist() == [v for v in whole.x_train.flatten().tolist() if not 20 <= v < 40]
    assert take(whole, train=5, test=4).x_train.flatten().tolist() == whole.x_train[:5].flatten().tolist()
    with pytest.raises(CurvlabError, match="61 training samples requested, but the data set has 60"):
        take(whole, train=61)
    assert math.isfinite(float(take(whole).x_test.sum()))


@pytest.mark.parametrize(
    "name", sorted(set(GRIDS) - {*WITHOUT_DATA, "dlcft", "methods", "training_regimes", "forgetting_bound"})
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_labels_that_are_all_the_same(call, name, with_figures):
    """The loss has no curvature: the tables say so, and the figures leave it out."""
    x = np.random.default_rng(0).random((60, 4), np.float32)
    y = np.zeros(60, int)
    np.savez("one.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    line = f"{name} {SMALL[name]} --data one.npz --classes all --validation 0 --seeds 0 --jobs 1 --out run"
    line += " --lr-squared-error 0.01" if name == "eigenvalues" else ""
    code, _, err = call(line)
    assert err.count("\n") <= 2
    assert code == 0 or err.startswith("error: ")
