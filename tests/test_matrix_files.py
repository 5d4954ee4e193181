"""Files of matrices: changed, damaged and foreign ones, and paths that are no files."""

import json
import os
import pickle
import random
import stat
import struct
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Any

import pytest
import test_matrices as made
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_matrices import INFO

from curvlab.errors import CurvlabError
from curvlab.files import make_writable_folder, write_whole
from curvlab.matrices import Composite, CurvatureMatrix, Diagonal, Info, load
from curvlab.parameters import ParameterSpace

SPACE = ParameterSpace(("w",), ((2,),))
SMALL = Diagonal(torch.ones(2), SPACE, INFO)


def same(a: CurvatureMatrix, b: CurvatureMatrix) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return (type(a), a.space, a.info, ours.keys()) == (type(b), b.space, b.info, theirs.keys()) and all(
        t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]) for name, t in ours.items()
    )


def refused_or_right(file: Path, content: bytes, matrix: CurvatureMatrix) -> bool:
    """Whether it is refused, in one line; else it has to be the matrix."""
    file.write_bytes(content)
    try:
        assert same(load(file), matrix)
    except CurvlabError as error:
        return "\n" not in str(error)
    return False


def test_a_flipped_bit_anywhere(tmp_path: Path) -> None:
    """Every byte of a small file, header and all, and samples of one with parts."""
    rng = random.Random(0)
    for matrix, share in ((SMALL, 1.0), (made.TestComposite().make()[0], 0.1)):
        file = tmp_path / "m.safetensors"
        matrix.save(file)
        whole = file.read_bytes()
        assert not refused_or_right(file, whole, matrix)
        places = [i for i in range(len(whole)) if rng.random() < share]
        refused = 0
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            refused += refused_or_right(file, bytes(damaged), matrix)
        assert refused > 0.99 * len(places)
        for length in rng.sample(range(len(whole)), 30):
            assert refused_or_right(file, whole[:length], matrix)
        assert refused_or_right(file, whole + b"\0", matrix)


@pytest.mark.parametrize("name", [n for n in vars(made) if n.startswith("Test") and hasattr(getattr(made, n), "make")])
def test_changed_entries_are_refused(name: str, tmp_path: Path) -> None:
    """By any program that knows the format: one entry, or two tensors exchanged, under the old header."""
    matrix = getattr(made, name)().make()[0]
    if name == "TestImplicit":
        return
    file = tmp_path / "m.safetensors"
    matrix.save(file)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = {key: t.contiguous() for key, t in matrix.tensors().items()}
    for key in tensors:
        changed = {k: t.clone() for k, t in tensors.items()}
        changed[key].view(-1)[0] += 1e-12
        save_file(changed, file, metadata=header)
        with pytest.raises(CurvlabError, match="checksum differs"):
            load(file)
    save_file({key: t.float() for key, t in tensors.items()}, file, metadata=header)
    with pytest.raises(CurvlabError, match="checksum differs"):
        load(file)


def test_the_same_bytes_in_another_dtype(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    half = SMALL.to(dtype=torch.float16)
    half.save(file)
    assert same(load(file), half)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file({"entries": half.entries.view(torch.bfloat16)}, file, metadata=header)
    with pytest.raises(CurvlabError, match="checksum differs"):
        load(file)


def description(**changes: Any) -> dict[str, Any]:
    """Of a file of format 1, which has no checksum."""
    return {"format": 1, "kind": "diag", "names": ["w"], "shapes": [[2]], "info": dict(vars(INFO))} | changes


def info(**changes: Any) -> dict[str, Any]:
    return {"info": vars(INFO) | changes}


def write(file: Path, text: str, **tensors: torch.Tensor) -> None:
    save_file(tensors or {"entries": torch.ones(2)}, file, metadata={"curvlab": text})


def nested(depth: int) -> dict[str, Any]:
    inner = description(kind="composite", parts=[])
    for _ in range(depth):
        inner = description(kind="composite", parts=[inner])
    return inner


def test_files_of_format_1_are_read(tmp_path: Path) -> None:
    write(tmp_path / "old", json.dumps(description()))
    assert same(load(tmp_path / "old"), SMALL)


@pytest.mark.parametrize(
    "changed",
    [
        {"format": None},
        {"format": "1"},
        {"format": True},
        {"format": 0},
        {"format": -1},
        {"format": 1.0},
        {"format": 2},  # without its checksum
        {"kind": None},
        {"kind": ["diag"]},
        {"kind": "composite"},
        {"kind": "composite", "parts": 3},
        {"kind": "composite", "parts": ["diag"]},
        {"kind": "composite", "parts": {}},
        {"kind": "implicit"},
        {"kind": "dense"},
        {"parts": []},
        {"more": 1},
        {"names": "w"},
        {"names": [1]},
        {"names": [None]},
        {"names": ["w", "w"], "shapes": [[1], [1]]},
        {"names": []},
        {"shapes": [2]},
        {"shapes": [[2.0]]},
        {"shapes": [[True, 2]]},
        {"shapes": [["2"]]},
        {"shapes": [[-1, -2]]},
        {"shapes": [[10**30]]},
        {"shapes": [[2], [2]]},
        {"shapes": None},
        {"info": []},
        {"info": {}},
        info(quantity=None),
        info(quantity=3),
        info(backend=["torch"]),
        info(num_samples="10"),
        info(num_samples=True),
        info(num_samples=-1),
        info(num_samples=2.5),
        info(samples=2.5),
        info(seed="0"),
        info(batch_size=[5]),
        info(seconds="1"),
        info(seconds=float("nan")),
        info(seconds=float("inf")),
        info(seconds=10**400),
        info(other=1),
    ],
    ids=str,
)
def test_a_header_of_other_types(changed: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "odd", json.dumps(description(**changed)))
    with pytest.raises(CurvlabError, match=r"content of .*odd is not a valid matrix \("):
        load(tmp_path / "odd")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"diag"',
        "[" * 100_000,
        '{"format": 1' + "0" * 5_000 + "}",
        pytest.param(json.dumps(description()).replace('"diag"', '"d\\ud800"'), id="surrogate"),
    ],
    ids=lambda text: text[:20],
)
def test_a_header_that_is_no_description(text: str, tmp_path: Path) -> None:
    write(tmp_path / "odd", text)
    with pytest.raises(CurvlabError, match="odd") as refused:
        load(tmp_path / "odd")
    str(refused.value).encode()  # can be printed


def test_a_header_that_is_nested_without_end(tmp_path: Path) -> None:
    write(tmp_path / "deep", json.dumps(nested(200)))
    with pytest.raises(CurvlabError, match="is not a valid matrix"):
        load(tmp_path / "deep")
    text = json.dumps(description(kind="composite", parts=["X"]))
    begin, end = text.split('"X"')
    write(tmp_path / "deep", begin * 50_000 + end * 50_000)
    with pytest.raises(CurvlabError, match="is not a valid matrix"):
        load(tmp_path / "deep")
    space = ParameterSpace(("w",), ((2,),))
    twice = Composite([Composite([SMALL], space, INFO)], space, INFO)
    twice.save(tmp_path / "twice")
    assert same(load(tmp_path / "twice"), twice)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"entries": torch.ones(2, dtype=torch.int64)}, "torch.int64"),
        ({"entries": torch.ones(2, dtype=torch.bool)}, "torch.bool"),
        ({"entries": torch.ones(2, dtype=torch.complex64)}, "torch.complex64"),
        ({"entries": torch.ones(2).to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn"),
        ({"entries": torch.tensor([1.0, float("nan")])}, "NaN or infinite"),
        ({"entries": torch.tensor([1.0, float("inf")])}, "NaN or infinite"),
        ({"entries": torch.ones(1, 2)}, "must have shape"),
        ({"entries": torch.ones(2), "more": torch.ones(2)}, "does not belong to the matrix"),
        ({"other": torch.ones(2)}, "entries"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_make_no_matrix(tensors: dict[str, torch.Tensor], told: str, tmp_path: Path) -> None:
    write(tmp_path / "odd", json.dumps(description()), **tensors)
    with pytest.raises(CurvlabError, match=f"is not a valid matrix .*{told}"):
        load(tmp_path / "odd")


def test_files_of_other_programs(tmp_path: Path) -> None:
    header = json.dumps({"entries": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    contents = {
        "empty": b"",
        "text": b"nothing of the kind, but longer than a header\n" * 10,
        "pickle": pickle.dumps({"entries": [1.0, 2.0]}),
        "zeros": bytes(1000),
        "endless": struct.pack("<Q", 1 << 62) + b"{}",
        "small floats": struct.pack("<Q", len(header)) + header + b"\0",
        "list": struct.pack("<Q", 2) + b"[]",
        "nothing": struct.pack("<Q", 2) + b"{}",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            CurvlabError, match=f"{name} is (not a complete safetensors file|a safetensors file, but not)"
        ):
            load(tmp_path / name)
    torch.save({"entries": torch.ones(2)}, tmp_path / "torch.pt")
    with pytest.raises(CurvlabError, match=r"torch\.pt is not a complete"):
        load(tmp_path / "torch.pt")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("absent", "there is no file"),
        ("absent/m.safetensors", "there is no file"),
        (".", "is a folder, a device or a pipe"),
        ("pipe", "is a folder, a device or a pipe"),
        ("x" * 300, "is not a complete safetensors file|there is no file"),
    ],
)
def test_paths_without_a_file_to_read(path: str, told: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CurvlabError, match=told):
        load(tmp_path / path)


@pytest.mark.parametrize("path", ["a\0b", "", b"m", None, 3, 1.5, "\ud800", ["m"]], ids=ascii)
def test_what_is_no_path(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for attempt in (lambda: SMALL.save(path), lambda: load(path), lambda: make_writable_folder(path)):
        with pytest.raises(CurvlabError, match="is not a path of a file"):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("pipe", "device, pipe or other special file"),
        ("socket", "device, pipe or other special file"),
        ("link to pipe", "device, pipe or other special file"),
        ("folder", "it is a folder"),
        ("link to folder", "it is a folder"),
        ("stream", "stream of a process|does not exist"),
        ("/dev/../dev/fd/STREAM", "stream of a process|does not exist"),
        ("absent/m", "the folder .*absent does not exist; create it first"),
        ("file/m", "the folder .*file does not exist"),
        ("loop", "form a loop"),
        ("x" * 300, "cannot write"),
    ],
)
def test_paths_that_are_no_place_for_a_file(path: str, told: str, tmp_path: Path) -> None:
    """Whoever runs it: what stands there stays. (Not of ``/dev``: were this to fail, it would take those devices.)"""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    file = tmp_path / "file"
    file.write_text("mine")
    with file.open() as opened, socket(AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        links = {"link to pipe": "pipe", "link to folder": "folder", "loop": "loop"}
        links["stream"] = f"/proc/self/fd/{opened.fileno()}"  # as /dev/stdout is of one that goes to a file
        for link, target in links.items():
            (tmp_path / link).symlink_to(target)
        before = {f.name: stat.S_IFMT(f.lstat().st_mode) for f in tmp_path.iterdir()}
        with pytest.raises(CurvlabError, match=told) as refused:
            SMALL.save(tmp_path / path.replace("STREAM", str(opened.fileno())))
    assert "\n" not in str(refused.value)
    assert {f.name: stat.S_IFMT(f.lstat().st_mode) for f in tmp_path.iterdir()} == before
    assert file.read_text() == "mine"


def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, second = tmp_path / "link", tmp_path / "second"
    link.symlink_to("folder/m.safetensors")
    second.symlink_to("link")
    for expected in (SMALL, 2.0 * SMALL):  # once while the file is not there
        expected.save(second)
        assert second.is_symlink()
        assert link.is_symlink()
        assert [f.name for f in (tmp_path / "folder").iterdir()] == ["m.safetensors"]
        assert same(load(tmp_path / "folder" / "m.safetensors"), expected)


def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    SMALL.save(file)
    file.chmod(0o640)
    SMALL.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_the_longest_name_that_a_folder_takes(tmp_path: Path) -> None:
    name = "m" * os.pathconf(tmp_path, "PC_NAME_MAX")
    write_whole(tmp_path / name, b"all")
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_what_a_file_could_not_give_back_is_not_written(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(CurvlabError, match="NaN or infinite"):
            Diagonal(torch.tensor([1.0, value]), SPACE, INFO).save(tmp_path / "m")
    for wrong in ({"seed": -1}, {"seconds": float("nan")}, {"quantity": None}, {"samples": 2.0}, {"num_samples": True}):
        with pytest.raises(CurvlabError, match=f"{next(iter(wrong))} of a matrix's info"):
            Info(**(vars(INFO) | wrong))
    assert not list(tmp_path.iterdir())
