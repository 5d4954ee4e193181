"""Grids on a Dask cluster: the same bits as on this machine, also if workers die, and requirements on workers."""

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
from runs_under_test import NAME

from curvlab.errors import CurvlabError
from curvlab.grid import processes, read_store, run
from curvlab.grid.code import fingerprints

pytest.importorskip("distributed")

from distributed import Client, LocalCluster, Status, Worker
from distributed.utils import LoopRunner
from test_grid import allow, attempts, contents, grid_of, light_server, rows, specs, store_is_whole, until

from curvlab import data
from curvlab.grid import cluster as cluster_module
from curvlab.software import describe_software

__all__ = ["light_server"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_server", "light_server")


@pytest.fixture(scope="module")
def cluster():
    """Three workers in their own processes; a killed worker is not restarted."""
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        for nanny in cluster.workers.values():
            nanny.auto_restart = False
        client.run(_light)
        yield cluster


def _light():
    processes._PRELOADED = ("curvlab.grid.run_process",)
    processes.close_idle = lambda: None  # the next sweep has the same code


@pytest.fixture
def here(monkeypatch):
    """A cluster in this process, with one worker."""
    monkeypatch.setattr(processes, "close_idle", lambda: None)
    quiet = {"silence_logs": 60, "dashboard_address": ":0"}
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", **quiet
    ) as cluster:
        yield cluster


@pytest.fixture
def file(tmp_path):
    return tmp_path / "s.sqlite"


# Workers that die ----------------------------------------------------------------------------------------------------


def test_a_cluster_gives_the_same_bits_also_if_a_worker_is_killed(cluster, tmp_path, monkeypatch):
    kill_one_worker(cluster, tmp_path, monkeypatch, 9)


@pytest.mark.slow
def test_a_killed_worker_costs_none_of_200_runs(cluster, tmp_path, monkeypatch):
    kill_one_worker(cluster, tmp_path, monkeypatch, 200)


def kill_one_worker(cluster, tmp_path, monkeypatch, number):
    """Kill a worker during a sweep, and require the results of a sweep on this machine."""
    monkeypatch.chdir(tmp_path)
    allow(tmp_path, number // 3)
    work = grid_of("gated", seed=list(range(number)))
    victim = next(iter(cluster.workers.values()))

    def kill():
        until(lambda: len(list(tmp_path.glob("there.sqlite.runs/*/begun"))) > number // 3)
        os.kill(victim.process.pid, signal.SIGKILL)
        allow(tmp_path, number)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert run(work, tmp_path / "there.sqlite", scheduler=cluster.scheduler_address)["done"] == number
    killer.join()
    run(work, tmp_path / "here.sqlite", jobs=4)
    assert contents(tmp_path / "there.sqlite") == contents(tmp_path / "here.sqlite")
    assert attempts(tmp_path / "there.sqlite") == [1] * number
    assert store_is_whole(tmp_path / "there.sqlite")


def test_a_run_that_kills_every_worker_has_failed_and_the_rest_continues(cluster, file):
    work = specs("kills_its_worker", *({"seed": seed} for seed in range(4)))
    allowed, cluster.scheduler.allowed_failures = cluster.scheduler.allowed_failures, 0
    try:
        tally = run(work, file, scheduler=cluster.scheduler_address)
    finally:
        cluster.scheduler.allowed_failures = allowed
    assert tally["done"] + tally["failed"] == 4
    with read_store(file) as store:
        failed = {failure["seed"]: failure for failure in store.failed_runs()}
    assert failed[1]["kind"] == "killed"
    assert "every worker that executed it has died" in failed[1]["error"]


# Addresses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def service():
    """Return a function that starts a service, which sends a message and stays connected, and returns its address."""
    opened = []

    def service(says):
        listening = socket.create_server(("127.0.0.1", 0))
        opened.append(listening)

        def serve():
            with suppress(OSError):  # closed
                while True:
                    caller, _ = listening.accept()
                    opened.append(caller)
                    caller.sendall(says)

        threading.Thread(target=serve, daemon=True).start()
        return f"tcp://127.0.0.1:{listening.getsockname()[1]}"

    yield service
    for each in opened:
        each.close()


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (b"", "no answer in 0.5 seconds"),  # like a web server, which waits for a request
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "another service answers"),  # read as the length of a message of 2.8 EiB
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9, "another service answers"),
        (
            b"\x01" + b"\0" * 7 + b"\x10" + b"\0" * 7 + b"\xc1" * 16,
            "another service answers",
        ),  # a message that cannot be decoded
    ],
)
def test_another_service_is_not_a_scheduler(file, monkeypatch, service, says, reason):
    monkeypatch.setattr(cluster_module, "_CONNECT", 0.5)
    address = service(says)
    with pytest.raises(CurvlabError, match=rf"cannot reach a Dask scheduler at {address} \(.*{reason}\); start one"):
        run(grid_of("plain", a=[1]), file, scheduler=address)


def test_an_unreachable_scheduler(file, monkeypatch):
    monkeypatch.setattr(cluster_module, "_CONNECT", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense://x", "tcp://127.0.0.1", "tcp://127.0.0.1:abc", "tls://127.0.0.1:9"):
        with pytest.raises(CurvlabError, match=rf"cannot reach a Dask scheduler at {address} \("):
            run(grid_of("plain", a=[1]), file, scheduler=address)


def test_a_worker_is_not_a_scheduler(file, here):
    (worker,) = here.workers.values()
    with pytest.raises(CurvlabError, match="is the address of a Worker of Dask; give the address"):
        run(grid_of("plain", a=[1]), file, scheduler=worker.address)


def test_a_client_that_could_not_connect_is_collected_while_another_starts(file, monkeypatch):
    monkeypatch.setattr(cluster_module, "_CONNECT", 0.5)
    monkeypatch.setattr(cluster_module, "_require_scheduler", lambda address: None)
    gc.disable()
    try:
        for address in ("tcp://127.0.0.1:9", "nonsense://x"):
            with pytest.raises(CurvlabError, match="cannot reach a Dask scheduler"):
                run(grid_of("plain", a=[1]), file, scheduler=address)
        collector = threading.Thread(target=gc.collect, daemon=True)
        with LoopRunner._lock:  # held by a client that starts, while it waits for a thread that may collect garbage
            collector.start()
            collector.join(60)
            assert not collector.is_alive()
    finally:
        gc.enable()


def test_a_client_without_connection_is_deleted_without_an_error():
    cluster_module._Client.__new__(cluster_module._Client).__del__()


def test_a_scheduler_without_workers_with_a_single_thread_and_one_that_goes_away(file, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "close_idle", lambda: None)
    monkeypatch.chdir(tmp_path)
    allow(tmp_path, 3)
    address = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--port", "0"]
    command += ["--host", "127.0.0.1", "--scheduler-file", str(address)]
    scheduler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        until(lambda: address.exists() and address.read_text())
        tcp = json.loads(address.read_text())["address"]
        work = grid_of("gated", seed=list(range(9)))
        with monkeypatch.context() as impatient:
            wait = Client.wait_for_workers
            impatient.setattr(Client, "wait_for_workers", lambda client, number, timeout: wait(client, number, 0.01))
            with pytest.raises(CurvlabError, match="has no workers: start some"):
                run(work, file, scheduler=tcp)
        worker = asyncio.run_coroutine_threadsafe(_worker(tcp), loop).result()
        single = tmp_path / "single.sqlite"
        assert run(specs("plain", {"a": 1}), single, scheduler=tcp)["done"] == 1

        def kill():
            until(lambda: len(rows(file)) == 3)
            scheduler.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with pytest.raises(CurvlabError, match="was lost; finished runs are in the store"):
            run(work, file, scheduler=tcp)
        killer.join()
        until(lambda: worker.status in (Status.closed, Status.failed))  # it has lost its scheduler
    finally:
        scheduler.kill()
        scheduler.wait()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
    with read_store(file) as store:
        assert store.tally() == {"done": 3, "failed": 0, "absent": 6, "earlier": 0}


async def _worker(address):
    worker = await Worker(address, nthreads=1, dashboard=False, silence_logs=60)
    worker.close = partial(worker.close, timeout=0.1)  # half a minute otherwise, for a scheduler that is gone
    return worker


# Requirements on workers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["version", "package", "module"])
def test_an_unfit_worker_that_joins_late_gets_no_run(here, file, tmp_path, monkeypatch, caplog, what):
    monkeypatch.chdir(tmp_path)
    allow(tmp_path, 0)
    ran = []
    on_fit = cluster_module.supervise_on_worker

    def noted(task):
        ran.append(cluster_module.get_worker().address)
        return on_fit(task)

    monkeypatch.setattr(cluster_module, "supervise_on_worker", noted)
    (fit,) = here.workers.values()

    with ThreadPoolExecutor(1) as pool:
        sweep = pool.submit(run, grid_of("gated", seed=list(range(5))), file, scheduler=here.scheduler_address)
        try:
            until(lambda: list(tmp_path.glob("*/*/begun")))
            if what == "version":
                other = describe_software() | {"versions": {**describe_software()["versions"], "curvlab": "0.0"}}
                monkeypatch.setattr(cluster_module, "describe_software", lambda: other)
            else:
                name = "curvlab" if what == "package" else NAME
                monkeypatch.setattr(
                    cluster_module, "fingerprints", lambda given: {**fingerprints(given), name: "other"}
                )
            here.scale(2)
            until(lambda: "it gets no runs" in caplog.text)  # a run was sent to it
        finally:
            allow(tmp_path, 5)
        assert sweep.result()["done"] == 5
    assert len(here.workers) == 2
    assert set(ran) == {fit.address}
    lacks = "has curvlab 0.0, and" if what == "version" else "has other source files of"
    assert lacks in caplog.text
    assert caplog.text.count("it gets no runs") == 1


def test_a_worker_of_another_version_is_refused(here, file, monkeypatch):
    other = describe_software()
    other["versions"]["torch"] = "1.0"
    with monkeypatch.context() as patch:
        patch.setattr(cluster_module, "describe_software", lambda: other)
        patch.setattr(cluster_module.Requirements, "_require", _require_torch(cluster_module.Requirements._require))
        with pytest.raises(CurvlabError, match=r"worker .* has torch .*, and 1.0 is needed: start the workers in"):
            run(grid_of("plain", a=[1]), file, scheduler=here.scheduler_address)
    with monkeypatch.context() as patch:  # a worker without this check
        patch.setattr(cluster_module.Requirements, "setup", lambda self, worker: None)
        with pytest.raises(CurvlabError, match=r"worker .* has another version of curvlab: start the workers in"):
            run(grid_of("plain", a=[1]), file, scheduler=here.scheduler_address)
    assert run(grid_of("plain", a=[1]), file, scheduler=here.scheduler_address)["done"] == 1


def _require_torch(require):
    """Check like a worker, which has its own versions."""

    def check(requirements, worker):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster_module, "describe_software", describe_software)
            require(requirements, worker)

    return check


def test_every_sweep_has_its_own_plugin(here, tmp_path, monkeypatch):
    names, register = [], cluster_module.Client.register_plugin

    def noted(self, plugin, name=None, **others):
        names.append(name)
        return register(self, plugin, name=name, **others)

    monkeypatch.setattr(cluster_module.Client, "register_plugin", noted)
    for stem in ("one", "two"):
        run(grid_of("plain", a=[1]), tmp_path / f"{stem}.sqlite", scheduler=here.scheduler_address)
    assert len(set(names)) == 2
    assert not set(names) & set(here.scheduler.worker_plugins)  # nor does either stay


REQUIRED = {"functions": [f"{NAME}:plain"], "data": {}, "data_root": None, "offline": True}
WORKER = SimpleNamespace(address="tcp://a:1", name="w")


def required(**others):
    given = REQUIRED | others
    return {"software": describe_software(), "code": fingerprints(given["functions"])} | given


def test_requirements_on_a_worker():
    digits = data.load("digits").fingerprint()
    fit = cluster_module.Requirements(**required(data={"digits": digits}))
    assert not fit.fit
    fit.setup(WORKER)
    assert fit.fit
    code = fingerprints([f"{NAME}:plain"])
    for others, fragment in (
        ({"functions": ["no_such:f"]}, "cannot import 'no_such'"),
        ({"functions": ["x"]}, "module:name"),
        ({"data": {"digits": "other"}}, "other data for 'digits'"),
        ({"data": {"mnist": "any"}, "data_root": "/no/such"}, "mnist"),
        ({"code": code | {"curvlab": "other"}}, "has other source files of curvlab than the process of the sweep"),
        ({"code": code | {NAME: "other"}}, f"has other source files of {NAME} than the process of the sweep"),
        ({"code": {"curvlab": code["curvlab"]}}, f"has other source files of {NAME} than the process of the sweep"),
    ):
        unfit = cluster_module.Requirements(**required(**others))
        with pytest.raises(CurvlabError, match=rf"worker tcp://a:1 on w.*{fragment}"):
            unfit.setup(WORKER)
        assert not unfit.fit


def test_fingerprints_include_all_imports_of_a_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "runs_of_mine.py": "import json, torch\nimport helpers_of_mine\nfrom package_of_mine import sub\n",
        "helpers_of_mine.py": "x = 1\n",
        "package_of_mine/__init__.py": "",
        "package_of_mine/sub.py": "from .deep import y\n",
        "package_of_mine/deep.py": "y = 1\n",
        "package_of_mine/unused.py": "z = 1\n",
    }
    (tmp_path / "package_of_mine").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = fingerprints(["runs_of_mine:f", "curvlab.models:mlp", "torch:rand", "no_such:f"])
    assert list(before) == ["curvlab", "runs_of_mine"]
    for name, text in files.items():
        (tmp_path / name).write_text(text + "# other\n")
        changed = fingerprints(["runs_of_mine:f"])["runs_of_mine"] != before["runs_of_mine"]
        assert changed == (name != "package_of_mine/unused.py")
        (tmp_path / name).write_text(text)


def test_a_server_of_other_code_is_not_used(monkeypatch, file):
    """A server on a worker that still executes runs of an earlier sweep has imported their code."""
    run(specs("plain", {"a": 1}), file)
    (before,) = processes._servers.values()
    taken = []

    class Server:
        def __init__(self, *given):
            taken.append(given)
            raise CurvlabError("another one")

    monkeypatch.setattr(processes, "Server", Server)
    assert run(specs("plain", {"a": 2}), file)["done"] == 1
    monkeypatch.setattr("curvlab.grid.running.fingerprints", lambda functions: {"curvlab": "other"})
    with pytest.raises(CurvlabError, match="another one"):
        run(specs("plain", {"a": 3}), file)
    assert before in processes._servers.values()


def test_without_dask(file, monkeypatch):
    monkeypatch.delitem(sys.modules, "curvlab.grid.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CurvlabError, match=r"--scheduler needs Dask.*pip install 'curvlab\[cluster\]'"):
        run(grid_of("plain", a=[1]), file, scheduler="tcp://127.0.0.1:9")
