"""A Slurm and a Ray cluster on this machine alone, started for a test and ended by it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ADDRESS = "127.0.0.1"
START_SECONDS = 120

SLURM = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ReturnToService=2
KillWait=60
MessageTimeout=60
NodeName={host} NodeAddr={address} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str:
    """Why Slurm cannot be started here; empty where it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "scontrol") if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client"
    return "" if os.geteuid() == 0 else "slurmd needs root"


@contextlib.contextmanager
def slurm(folder: Path, cpus: int = 2) -> Iterator[None]:
    """slurmctld and slurmd in the foreground, without munge and accounting; SLURM_CONF names their file meanwhile."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    settings = SLURM.format(host=host, address=ADDRESS, ports=_free_ports(2), folder=folder, cpus=cpus)
    (folder / "slurm.conf").write_text(settings)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            daemons.append(subprocess.Popen([name, "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        until(lambda: "idle" in said("sinfo", "-h", "-o", "%t"), "Slurm's node is idle", START_SECONDS)
        yield
    finally:
        said("scancel", "--signal=KILL", "--full", "-u", "root")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)


@contextlib.contextmanager
def ray_nodes(cpus: int = 1) -> Iterator[tuple[str, Callable[[], None]]]:
    """Two nodes of Ray on this machine; gives the address, and what kills the second one with all its processes."""
    (port,) = _free_ports(1)  # below those that Ray's workers take
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # pytest's is too long for the paths of sockets
    words = [str(Path(sys.executable).with_name("ray")), "start", f"--node-ip-address={ADDRESS}", "--block",
             f"--num-cpus={cpus}", "--disable-usage-stats", "--object-store-memory=80000000"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_TMPDIR": folder}
    address, nodes = f"{ADDRESS}:{port}", []

    def start(*more: str) -> subprocess.Popen:
        return subprocess.Popen([*words, *more], env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    def kill(node: subprocess.Popen) -> None:
        for number in descendants(node.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        node.kill()
        node.wait()

    try:
        nodes.append(start("--head", f"--port={port}", "--include-dashboard=false"))
        until(lambda: _answers(port), "Ray's head answers", START_SECONDS)
        nodes.append(start(f"--address={address}"))
        until(lambda: _alive(address, environment) == 2, "Ray has two nodes", START_SECONDS)
        yield address, lambda: kill(nodes[1])
    finally:
        for node in reversed(nodes):
            kill(node)
        shutil.rmtree(folder, ignore_errors=True)


def descendants(process: int) -> list[int]:
    """All processes below one, the deepest first."""
    listed = said("ps", "-o", "pid=", "--ppid", str(process)).split()
    return [number for child in map(int, listed) for number in (*descendants(child), child)]


def until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Waits for something; fails by what it was."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"in {seconds:.0f} s not: {what}"
        time.sleep(0.3)


def said(*words: str) -> str:
    """What a command prints; its errors are not ours."""
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def _free_ports(count: int) -> list[int]:
    """Ports outside 10002 to 19999, where Ray's workers listen, and the range that systems hand out by themselves."""
    found = []
    for port in range(7100, 9000):
        with socket.socket() as probe:
            if probe.connect_ex((ADDRESS, port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free port")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((ADDRESS, port)) == 0


def _alive(address: str, environment: dict[str, str]) -> int:
    code = (
        f"import ray; ray.init(address='{address}', _node_ip_address='{ADDRESS}', log_to_driver=False); "
        "print(sum(node['Alive'] for node in ray.nodes()))"
    )
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return int(told.stdout.split()[-1]) if told.returncode == 0 and told.stdout.split() else 0
