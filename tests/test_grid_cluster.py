"""Grids on a Dask cluster: the same bits as here, also when workers die, and what workers must have."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from curvlab.errors import CurvlabError
from curvlab.grid import Cell, reading, run

pytest.importorskip("distributed")

from distributed import LocalCluster
from distributed.utils import LoopRunner
from test_grid import NAME as GRID
from test_grid import attempts, contents, grid_of, store_is_whole

from curvlab import data
from curvlab.grid import cluster as cluster_module
from curvlab.results.provenance import software

pytestmark = pytest.mark.usefixtures("one_server")

NAME = __name__


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def where(config, place):
    return [{"runner": parent(os.getppid())}]


def kills_its_worker(config, place):
    if config["seed"] == 1:
        os.kill(parent(os.getppid()), signal.SIGKILL)
        time.sleep(60)
    return [{"x": 1.0}]


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        yield cluster


@pytest.fixture
def file(tmp_path):
    return tmp_path / "s.sqlite"


def test_the_cluster_gives_the_same_bits(cluster, tmp_path):
    work = grid_of("drawn", seed=list(range(8)))
    run(work, tmp_path / "here.sqlite", jobs=2)
    run(work, tmp_path / "there.sqlite", scheduler=cluster.scheduler_address)
    here, there = contents(tmp_path / "here.sqlite"), contents(tmp_path / "there.sqlite")
    assert here == there


def one_killed(cluster, tmp_path, number):
    """Kill a worker in the middle of a sweep, and require what a sweep on this machine gives."""
    work = grid_of("slow", seed=list(range(number)))
    victim = next(iter(cluster.workers.values()))

    def kill():
        while len(list((tmp_path / "there.sqlite.cells").glob("*/begun"))) < number // 3:
            time.sleep(0.02)
        os.kill(victim.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    assert run(work, tmp_path / "there.sqlite", scheduler=cluster.scheduler_address)["done"] == number
    killer.join()
    run(work, tmp_path / "here.sqlite", jobs=4)
    assert contents(tmp_path / "there.sqlite") == contents(tmp_path / "here.sqlite")
    assert attempts(tmp_path / "there.sqlite") == [1] * number
    assert store_is_whole(tmp_path / "there.sqlite")


def test_a_worker_that_is_killed_costs_no_cell(cluster, tmp_path):
    one_killed(cluster, tmp_path, 20)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_no_cell_of_200(cluster, tmp_path):
    one_killed(cluster, tmp_path, 200)


def test_a_cell_that_kills_every_worker_is_given_up_and_the_rest_goes_on(cluster, file):
    work = [Cell(f"{NAME}:kills_its_worker", {"seed": seed}) for seed in range(6)]
    allowed, cluster.scheduler.allowed_failures = cluster.scheduler.allowed_failures, 0
    try:
        tally = run(work, file, scheduler=cluster.scheduler_address)
    finally:
        cluster.scheduler.allowed_failures = allowed
    assert tally["done"] + tally["failed"] == 6
    with reading(file) as store:
        failed = {cell["seed"]: cell for cell in store.failed()}
    assert failed[1]["kind"] == "killed"
    assert "every worker that ran it has died" in failed[1]["error"]


def test_a_scheduler_that_is_not_there(file, monkeypatch):
    monkeypatch.setattr(cluster_module, "_CONNECT", 1)
    with pytest.raises(CurvlabError, match=r"there is no Dask scheduler at tcp://127.0.0.1:9"):
        run(grid_of("plain", a=[1]), file, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(CurvlabError, match=r"there is no Dask scheduler at nonsense"):
        run(grid_of("plain", a=[1]), file, scheduler="nonsense://x")


def test_a_client_that_could_not_connect_is_collected_while_another_starts(file, monkeypatch):
    monkeypatch.setattr(cluster_module, "_CONNECT", 1)
    gc.disable()
    try:
        for address in ("tcp://127.0.0.1:9", "nonsense://x"):
            with pytest.raises(CurvlabError, match="there is no Dask scheduler"):
                run(grid_of("plain", a=[1]), file, scheduler=address)
        collector = threading.Thread(target=gc.collect, daemon=True)
        with LoopRunner._lock:  # as the client that starts holds it, waiting for a thread that may collect garbage
            collector.start()
            collector.join(5)
            assert not collector.is_alive()
    finally:
        gc.enable()


def test_two_sweeps_have_each_its_own_plugin(cluster, tmp_path, monkeypatch):
    names, register = [], cluster_module.Client.register_plugin

    def noted(self, plugin, name=None, **others):
        names.append(name)
        return register(self, plugin, name=name, **others)

    monkeypatch.setattr(cluster_module.Client, "register_plugin", noted)
    for stem in ("one", "two"):
        run(grid_of("plain", a=[1]), tmp_path / f"{stem}.sqlite", scheduler=cluster.scheduler_address)
    assert len(set(names)) == 2


def test_a_client_that_is_not_connected_goes_without_a_word():
    cluster_module._Client.__new__(cluster_module._Client).__del__()


def test_a_scheduler_without_workers_with_a_single_thread_and_one_that_goes_away(file, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_module, "_CONNECT", 1)
    address = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    module = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--port", "0"]
    scheduler = subprocess.Popen([*module, "--host", "127.0.0.1", "--scheduler-file", str(address)], **quiet)
    worker = None
    try:
        while not address.exists() or not address.read_text():
            time.sleep(0.1)
        tcp = json.loads(address.read_text())["address"]
        work = grid_of("slow", seed=list(range(100)))
        with pytest.raises(CurvlabError, match="has no worker: start some"):
            run(work, file, scheduler=tcp)
        command = [sys.executable, "-m", "distributed.cli.dask_worker", tcp, "--nthreads", "1", "--no-nanny"]
        worker = subprocess.Popen([*command, "--no-dashboard"], cwd=tmp_path, env=environment, **quiet)
        monkeypatch.setattr(cluster_module, "_CONNECT", 10)
        single = tmp_path / "single.sqlite"
        run([Cell(f"{NAME}:where", {})], single, scheduler=tcp)
        with reading(single) as store:
            assert store.records() == [{"runner": worker.pid}]  # joblib alone would have run it here

        def kill():
            while len(list(file.parent.glob("*/*/begun"))) < 6:
                time.sleep(0.02)
            scheduler.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(CurvlabError, match="has gone; what is finished is in the store"):
            run(work, file, scheduler=tcp)
        killer.join()
    finally:
        scheduler.kill()
        scheduler.wait()
        if worker is not None:
            worker.kill()
            worker.wait()
    with reading(file) as store:
        assert 0 < store.tally()["done"] < 100
        assert store.tally()["failed"] == 0


def test_a_worker_of_another_version_is_refused(cluster, file, monkeypatch):
    other = software()
    other["versions"]["torch"] = "1.0"
    monkeypatch.setattr(cluster_module, "software", lambda: other)
    with pytest.raises(CurvlabError, match=r"worker .* has torch .*, and 1.0 is needed: start the workers from"):
        run(grid_of("plain", a=[1]), file, scheduler=cluster.scheduler_address)
    monkeypatch.undo()
    assert run(grid_of("plain", a=[1]), file, scheduler=cluster.scheduler_address)["done"] == 1


REQUIRED = {"functions": [f"{GRID}:plain"], "data": {}, "data_root": None, "offline": True}
WORKER = SimpleNamespace(address="tcp://a:1", name="w")


def test_what_a_worker_must_have():
    digits = data.load("digits").fingerprint()
    cluster_module.Requirements(software(), **REQUIRED | {"data": {"digits": digits}}).setup(WORKER)
    commit = {**software(), "git": {"commit": "abc", "dirty": False}}
    for ours, others, fragment in (
        (software(), {"functions": ["no_such:f"]}, "there is no module 'no_such'"),
        (software(), {"data": {"digits": "other"}}, "other data under 'digits'"),
        (software(), {"data": {"mnist": "any"}, "data_root": "/no/such"}, "mnist"),
        (commit, {}, "and abc is needed") if software()["git"] else (software(), {"functions": ["x"]}, "module:name"),
    ):
        with pytest.raises(CurvlabError, match=rf"worker tcp://a:1 on w.*{fragment}"):
            cluster_module.Requirements(ours, **REQUIRED | others).setup(WORKER)


def test_without_dask(file, monkeypatch):
    monkeypatch.delitem(sys.modules, "curvlab.grid.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CurvlabError, match=r"--scheduler needs Dask.*pip install 'curvlab\[cluster\]'"):
        run(grid_of("plain", a=[1]), file, scheduler="tcp://127.0.0.1:9")
