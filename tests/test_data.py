import gzip
import hashlib
import os
import pickle
import socket
import tarfile
import threading
import urllib.error
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

from curvlab import CurvlabError, data

RNG = np.random.default_rng(0)


def arrays(**changes):
    good = {
        "x_train": RNG.normal(size=(12, 5)),
        "y_train": np.arange(12) % 3,
        "x_test": RNG.normal(size=(6, 5)),
        "y_test": np.arange(6) % 3,
    }
    return good | changes


def save(path: Path, **changes) -> Path:
    np.savez(path, **arrays(**changes))
    return path


@pytest.fixture
def no_network(monkeypatch):
    """Fail the test if the network is used."""

    def fail(*args, **kwargs):
        pytest.fail("the network was asked for")

    monkeypatch.setattr("urllib.request.urlopen", fail)


def one_sentence(error: pytest.ExceptionInfo[CurvlabError], *parts: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text


# Digits


def test_digits_are_a_fixed_stratified_partition():
    digits = data.load("digits")
    assert digits.x_train.shape == (1437, 1, 8, 8)
    assert digits.x_test.shape == (360, 1, 8, 8)
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 1)
    assert digits.classes == tuple("0123456789")
    counts = torch.bincount(digits.y_train) + torch.bincount(digits.y_test)
    assert ((torch.bincount(digits.y_test) - counts / 5).abs() < 1).all()
    together = torch.cat([digits.x_train, digits.x_test]).flatten(1).numpy()
    original = load_digits().data / 16
    assert np.array_equal(np.unique(together, axis=0), np.unique(original, axis=0))
    assert len(np.unique(together, axis=0)) == len(together)  # so no image is in both parts
    assert digits.fingerprint() == data.load("digits").fingerprint()
    assert digits.fingerprint()[:16] == "350893dce354ca7f"


# Archives


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 1), (7, 9, 3)])
def test_byte_images_become_channels_first_in_the_unit_interval(tmp_path, shape):
    x = RNG.integers(0, 256, (12, *shape), dtype=np.uint8)
    x[0, 0, 0] = 255
    loaded = data.load(save(tmp_path / "a.npz", x_train=x, x_test=x[:6]))
    channels = shape[2] if len(shape) == 3 else 1
    assert loaded.sample_shape == (channels, 7, 9)
    assert loaded.x_train.dtype == torch.float32
    assert loaded.x_train.max() == 1
    expected = x.reshape(12, 7, 9, channels)[3, 2, 4, channels - 1] / 255
    assert loaded.x_train[3, channels - 1, 2, 4].item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_floating_inputs_are_taken_as_they_are(tmp_path, dtype):
    x = (4 * RNG.normal(size=(12, 2, 3))).astype(dtype)
    loaded = data.load(save(tmp_path / "a.npz", x_train=x, x_test=x[:6], y_train=np.arange(12, dtype=np.uint8) % 3))
    assert loaded.x_train.dtype == torch.float32
    assert loaded.y_train.dtype == torch.int64
    assert np.array_equal(loaded.x_train.numpy(), x.astype(np.float32))
    assert loaded.classes == ("0", "1", "2")


def test_classes_are_read_and_may_be_more_than_there_are_labels(tmp_path):
    loaded = data.load(save(tmp_path / "a.npz", classes=np.array(["a", "b", "c", "d"])))
    assert loaded.classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"y_train": np.arange(11) % 3}, ["x_train", "12", "y_train", "11"]),
        ({"x_test": np.zeros((6, 4))}, ["x_train", "(5,)", "x_test", "(4,)"]),
        ({"y_test": np.arange(6) / 2}, ["y_test", "float64"]),
        ({"y_test": np.zeros((6, 1), int)}, ["y_test", "(6, 1)"]),
        ({"y_test": np.array([0, 1, -2, 0, 1, 2])}, ["y_test", "-2"]),
        ({"classes": np.array(["a", "b"])}, ["y_train", "label 2", "2 classes"]),
        ({"classes": np.zeros(3)}, ["classes", "float64"]),
        ({"y_train": np.full(12, 10**9)}, ["y_train", "1000000000"]),
        ({"x_train": np.full((12, 5), np.nan)}, ["x_train", "60 NaN", "0 infinite"]),
        ({"x_test": np.full((6, 5), 1e300)}, ["x_test", "30 infinite"]),
        ({"x_train": np.zeros((0, 5)), "y_train": np.zeros(0, int)}, ["x_train", "no samples"]),
        ({"x_train": np.zeros((12, 5), complex)}, ["x_train", "complex128"]),
        ({"x_train": np.zeros((12, 5), np.uint8)}, ["x_train", "uint8", "(12, 5)"]),
        ({"x_train": np.zeros((12, 5), int)}, ["x_train", "int64"]),
        ({"x_train": np.array([None] * 12)}, ["x_train", "objects"]),
    ],
)
def test_wrong_arrays_are_named(tmp_path, changes, parts):
    path = save(tmp_path / "mine.npz", **changes)
    with pytest.raises(CurvlabError) as error:
        data.load(path)
    one_sentence(error, path, *parts)


def test_missing_keys_are_named_beside_those_there(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.zeros(3), y_train=np.zeros(3), y_test=np.zeros(3))
    with pytest.raises(CurvlabError) as error:
        data.load(str(tmp_path / "a.npz"))
    one_sentence(error, tmp_path / "a.npz", "no x_train, x_test", "only X, y_train, y_test")


def test_damaged_archives_are_named(tmp_path):
    whole = save(tmp_path / "whole.npz").read_bytes()
    broken = tmp_path / "broken.npz"
    for size in range(0, len(whole), 97):
        broken.write_bytes(whole[:size])
        with pytest.raises(CurvlabError) as error:
            data.load(broken)
        one_sentence(error, broken, "truncated")
    right, refused = data.load(tmp_path / "whole.npz").fingerprint(), 0
    for position in range(0, len(whole), 7):
        broken.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        outcome = fingerprint_or_refusal(broken)
        assert outcome == right or str(broken) in outcome, position
        refused += outcome != right
    assert refused > 100


def fingerprint_or_refusal(path: Path) -> str:
    try:
        return data.load(path).fingerprint()
    except CurvlabError as error:
        return str(error)


def test_a_plain_text_file_is_no_archive(tmp_path):
    (tmp_path / "data.csv").write_text("1,2,3\n")
    with pytest.raises(CurvlabError) as error:
        data.load(tmp_path / "data.csv")
    one_sentence(error, tmp_path / "data.csv", "not a complete .npz archive")


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(CurvlabError) as error:
        data.load("Fashion-MNST")
    one_sentence(error, "'Fashion-MNST'", "'fashion_mnist'", ", ".join(data.NAMES))
    with pytest.raises(CurvlabError) as error:
        data.load(tmp_path / "gone.npz")
    one_sentence(error, tmp_path / "gone.npz", "no such file")


# Folders of images


def write_images(root: Path, modes=("L", "L"), size=(6, 4)) -> Path:
    for split in ("train", "test"):
        for label, (name, mode) in enumerate(zip(("cat", "dog"), modes, strict=True)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("L", size, 100 * label + 10 * index).convert(mode).save(folder / f"{index}.png")
    return root


def test_grey_folders_have_one_channel_and_coloured_three(tmp_path):
    grey = data.load(write_images(tmp_path / "grey"))
    assert grey.x_train.shape == (4, 1, 4, 6)
    assert grey.classes == ("cat", "dog")
    assert grey.y_test.tolist() == [0, 0, 1, 1]
    assert torch.allclose(grey.x_train[:, 0, 0, 0] * 255, torch.tensor([0.0, 10, 100, 110]))
    mixed = data.load(str(write_images(tmp_path / "mixed", modes=("L", "RGB"))))
    assert mixed.x_train.shape == (4, 3, 4, 6)
    assert torch.equal(mixed.x_train, grey.x_train.expand(-1, 3, -1, -1))


def test_wrong_folders_name_the_file(tmp_path):
    def refused(root, *parts):
        with pytest.raises(CurvlabError) as error:
            data.load(root)
        one_sentence(error, root, *parts)

    root = write_images(tmp_path / "size")
    Image.new("L", (5, 4)).save(root / "test/dog/1.png")
    refused(root, "test/dog/1.png", "5x4", "6x4")

    root = write_images(tmp_path / "truncated")
    file = root / "train/dog/0.png"
    file.write_bytes(file.read_bytes()[:40])
    refused(root, "train/dog/0.png", "truncated")

    root = write_images(tmp_path / "deep")
    Image.fromarray(np.full((4, 6), 60000, np.uint16)).save(root / "train/cat/0.png")
    refused(root, "train/cat/0.png", "8 bits")

    root = write_images(tmp_path / "classes")
    (root / "test/dog").rename(root / "test/wolf")
    refused(root, "dog, wolf")

    root = write_images(tmp_path / "empty")
    for file in (root / "train/cat").iterdir():
        file.unlink()
    refused(root, "train", "cat")

    root = write_images(tmp_path / "split")
    (root / "test").rename(root / "val")
    refused(root, "'test'")


# Torchvision's sets, in miniature: the same files and checks with a few samples


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def tiny_mnist(monkeypatch):
    """Return the four files of a small MNIST by name, and set their checksums in torchvision."""

    def idx(array):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        return header + array.tobytes()

    rng = np.random.default_rng(1)
    files = {}
    for split, count in (("train", 20), ("t10k", 10)):
        files[f"{split}-images-idx3-ubyte.gz"] = idx(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{split}-labels-idx1-ubyte.gz"] = idx(np.arange(count, dtype=np.uint8) % 10)
    packed = {name: gzip.compress(content) for name, content in files.items()}
    monkeypatch.setattr(MNIST, "resources", [(name, md5(content)) for name, content in packed.items()])
    return packed


def put_mnist(root: Path, packed: dict[str, bytes], unpack: bool = False) -> Path:
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, content in packed.items():
        file = raw / (name.removesuffix(".gz") if unpack else name)
        file.write_bytes(gzip.decompress(content) if unpack else content)
    return raw


@pytest.mark.usefixtures("no_network")
def test_mnist_is_read_offline_packed_or_not(tmp_path, tiny_mnist, monkeypatch):
    put_mnist(tmp_path / "packed", tiny_mnist)
    put_mnist(tmp_path / "plain", tiny_mnist, unpack=True)
    packed = data.load("mnist", root=tmp_path / "packed", offline=True)
    plain = data.load("mnist", root=tmp_path / "plain")
    assert packed.x_train.shape == (20, 1, 28, 28)
    assert packed.classes == tuple("0123456789")
    assert packed.fingerprint() == plain.fingerprint()
    theirs = MNIST(tmp_path / "plain", train=False)
    assert torch.equal(packed.x_test[:, 0], theirs.data / 255)
    assert torch.equal(packed.y_test, theirs.targets)
    monkeypatch.setenv("CURVLAB_DATA", str(tmp_path / "packed"))
    assert data.load("mnist").fingerprint() == packed.fingerprint()
    monkeypatch.setenv("CURVLAB_DATA", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / ".cache/curvlab").mkdir(parents=True)
    (tmp_path / "plain").rename(tmp_path / ".cache/curvlab/data")
    assert data.load("mnist").fingerprint() == packed.fingerprint()


@pytest.mark.usefixtures("no_network")
def test_damaged_mnist_files_are_named(tmp_path, tiny_mnist):
    name = "t10k-images-idx3-ubyte"
    raw = put_mnist(tmp_path / "packed", tiny_mnist)
    (raw / f"{name}.gz").write_bytes(tiny_mnist[f"{name}.gz"][:-9])
    with pytest.raises(CurvlabError) as error:
        data.load("mnist", root=tmp_path / "packed", offline=True)
    one_sentence(error, raw / f"{name}.gz", "checksum", "offline")

    # A complete packed file is enough; without one, the truncated file is an error.
    raw = put_mnist(tmp_path / "plain", tiny_mnist, unpack=True)
    for size in (0, 3, 9, 400):
        (raw / name).write_bytes((raw / name).read_bytes()[:size] or b"")
        with pytest.raises(CurvlabError) as error:
            data.load("mnist", root=tmp_path / "plain", offline=True)
        one_sentence(error, raw / name, "truncated")
    (raw / f"{name}.gz").write_bytes(tiny_mnist[f"{name}.gz"])
    assert len(data.load("mnist", root=tmp_path / "plain", offline=True).x_test) == 10


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", data.NAMES[1:])
def test_offline_never_asks_for_the_network_and_writes_nothing(tmp_path, name):
    with pytest.raises(CurvlabError) as error:
        data.load(name, root=tmp_path / "root", offline=True)
    one_sentence(error, name, tmp_path / "root", "is missing", "offline", f"{name}.npz")
    assert not (tmp_path / "root").exists()


@pytest.mark.usefixtures("no_network")
def test_an_archive_under_the_root_is_used_in_place_of_the_original_files(tmp_path):
    save(tmp_path / "cifar100.npz")
    loaded = data.load("cifar100", root=tmp_path)
    assert loaded.name == "cifar100"
    assert loaded.x_train.shape == (12, 5)
    (tmp_path / "cifar100.npz").write_bytes(b"PK")
    with pytest.raises(CurvlabError) as error:
        data.load("cifar100", root=tmp_path)
    one_sentence(error, tmp_path / "cifar100.npz", "truncated")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_failed_download_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys, name):
    waits = []

    def unreachable(*args, **kwargs):
        waits.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(CurvlabError) as error:
        data.load(name, root=tmp_path / "a/b")
    one_sentence(error, name, "download failed (Name or service not known)", "connect to the network")
    assert waits
    assert None not in waits
    assert socket.getdefaulttimeout() is None
    assert not (tmp_path / "a").exists()
    assert capsys.readouterr() == ("", "")


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_missing_files_are_downloaded_from_the_mirror_that_works(tmp_path, monkeypatch, capsys, tiny_mnist):
    served = tmp_path / "served"
    served.mkdir()
    for name, content in tiny_mnist.items():
        (served / name).write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SilentHandler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(MNIST, "mirrors", [f"{here}gone/", here])
    try:
        (tmp_path / "root/MNIST/raw").mkdir(parents=True)
        (tmp_path / "root/MNIST/raw/train-images-idx3-ubyte.gz").write_bytes(b"half")
        assert len(data.load("mnist", root=tmp_path / "root").x_train) == 20
        assert capsys.readouterr() == ("", "")
        (served / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
        with pytest.raises(CurvlabError) as error:
            data.load("mnist", root=tmp_path / "other")
        one_sentence(error, "mnist", "download failed", "corrupted")
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tiny_cifar10(tmp_path, monkeypatch):
    """Make the packed file of a small CIFAR-10 under ``tmp_path/root`` and tell torchvision its checksums."""
    rng = np.random.default_rng(2)
    folder = tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    contents = {
        file: {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        for file, _ in [*CIFAR10.train_list, *CIFAR10.test_list]
    }
    contents["batches.meta"] = {"label_names": ["plane", "car", "bird", "cat"]}
    sums = {}
    for file, content in contents.items():
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = md5((folder / file).read_bytes())
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((root / CIFAR10.filename).read_bytes()))
    monkeypatch.setattr(CIFAR10, "train_list", [[file, sums[file]] for file, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[file, sums[file]] for file, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return root, contents


@pytest.mark.usefixtures("no_network")
def test_cifar_is_unpacked_offline_and_a_damaged_batch_is_named(tiny_cifar10):
    root, contents = tiny_cifar10
    loaded = data.load("cifar10", root=root, offline=True)
    assert loaded.x_train.shape == (20, 3, 32, 32)
    assert loaded.classes == ("plane", "car", "bird", "cat")
    first = contents["data_batch_1"]["data"][1].reshape(3, 32, 32)
    assert np.allclose(loaded.x_train[1].numpy() * 255, first)

    batch = root / CIFAR10.base_folder / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-20])
    assert data.load("cifar10", root=root, offline=True).fingerprint() == loaded.fingerprint()  # unpacked again

    batch.write_bytes(batch.read_bytes()[:-20])
    (root / CIFAR10.filename).unlink()
    with pytest.raises(CurvlabError) as error:
        data.load("cifar10", root=root, offline=True)
    one_sentence(error, batch, "checksum")


def test_cifar100_takes_its_own_files(tmp_path):
    with pytest.raises(CurvlabError) as error:
        data.load("cifar100", root=tmp_path, offline=True)
    one_sentence(error, CIFAR100.base_folder)


@pytest.mark.usefixtures("no_network")
def test_the_real_mnist_where_it_is_on_disk():
    root = os.environ.get("CURVLAB_DATA")
    if root is None or not (Path(root) / "MNIST/raw").is_dir():
        pytest.skip("no MNIST under CURVLAB_DATA")
    mnist = data.load("mnist", offline=True)
    assert mnist.x_train.shape == (60000, 1, 28, 28)
    assert len(mnist.select(range(5)).x_train) == 30596
    assert mnist.x_train.mean().item() == pytest.approx(0.1307, abs=1e-4)


# Dataset


def tiny() -> data.Dataset:
    x = torch.arange(12.0).reshape(6, 2)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    return data.Dataset("tiny", x, y, x[:3], torch.tensor([0, 1, 0]), classes=("a", "b", "c"))


def test_select_keeps_labels_order_and_width():
    selected = tiny().select([1, 0])
    assert selected.y_train.tolist() == [0, 1, 0, 1]
    assert selected.x_train[:, 0].tolist() == [0, 2, 6, 8]
    assert selected.y_test.tolist() == [0, 1, 0]
    assert selected.num_classes == 3


@pytest.mark.parametrize(
    ("classes", "parts"),
    [
        ([], ["no class is selected", "0 to 2"]),
        ([0, 3], ["no class 3", "0 to 2"]),
        ([-1], ["no class -1"]),
        ([1, 0, 1], ["class 1", "more than once"]),
        ([2], ["no test sample", "[2]"]),
    ],
)
def test_wrong_selections_are_refused(classes, parts):
    with pytest.raises(CurvlabError) as error:
        tiny().select(classes)
    one_sentence(error, *parts)


def test_hold_out_takes_the_first_samples():
    rest, (x, y) = tiny().hold_out(2)
    assert y.tolist() == [0, 1]
    assert torch.equal(torch.cat([x, rest.x_train]), tiny().x_train)
    assert rest.y_train.tolist() == [2, 0, 1, 2]
    assert len(rest.x_test) == 3
    for n in (0, 6, -1):
        with pytest.raises(CurvlabError, match=f"hold out {n} of the 6"):
            tiny().hold_out(n)


def test_fingerprint_sees_values_and_shapes():
    same, other = tiny(), tiny()
    other.x_test[0, 0] += 1e-6
    reshaped = data.Dataset(
        "tiny", same.x_train[:, None], same.y_train, same.x_test[:, None], same.y_test, same.classes
    )
    assert same.fingerprint() == tiny().fingerprint()
    assert len({same.fingerprint(), other.fingerprint(), reshaped.fingerprint()}) == 3
    assert tiny().select([0, 1, 2]).fingerprint() == same.fingerprint()


def test_a_dataset_made_by_hand_is_checked_too():
    good = tiny()
    with pytest.raises(CurvlabError, match="x_train must be float32"):
        data.Dataset("bad", good.x_train.double(), good.y_train, good.x_test, good.y_test, good.classes)


def test_labels_that_start_at_one_are_refused(tmp_path):
    x, y = np.zeros((4, 3), dtype=np.float32), np.array([1, 2, 1, 2])
    np.savez(tmp_path / "one.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(CurvlabError, match="no sample has the label 0; number the classes from 0, or name all of them"):
        data.load(tmp_path / "one.npz")
    np.savez(tmp_path / "named.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array(["a", "b", "c"]))
    assert data.load(tmp_path / "named.npz").num_classes == 3
