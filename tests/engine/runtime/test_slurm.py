"""configs/launch/slurm.sh under a real SLURM, both of whose nodes are this machine."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from seqjepa.engine.runs.checkpoints import find_checkpoint
from seqjepa.engine.runs.metrics_file import read_rows

pytestmark = pytest.mark.soak

ROOT = Path(__file__).resolve().parents[3]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
# nodes are named by addresses, which every machine can look up
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:1
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[2]} CPUs=2 Gres=gpu:1
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


class Slurm:
    """A SLURM in a folder.

    Args:
        folder: of its configuration, key, state and logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        host = socket.gethostname().partition(".")[0]
        first = random.randrange(1, 10_000)  # decides the port: another SLURM here would use that of its own job 1
        config = CONFIG.format(folder=folder, host=host, ports=free_ports(3), first=first)
        (folder / "slurm.conf").write_text(config)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # something that is there
        (folder / "key").touch(0o600)
        (folder / "key").write_bytes(os.urandom(64))
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        names = {"socket": "munge.socket", "key-file": "key", "pid-file": "munge.pid", "seed-file": "seed"}
        options = [f"--{option}={self.folder / name}" for option, name in names.items()]
        self._daemon("munged", "--foreground", "--force", *options)  # a folder that only root can enter needs force
        wait_until((self.folder / "munge.socket").exists, 60)
        self._daemon("slurmctld", "-D")
        for node in (1, 2):
            self._daemon("slurmd", "-D", "-N", f"127.0.0.{node}")
        wait_until(lambda: self.ask("sinfo", "--noheader", "--states=idle", "--format=%D", check=False) == "2\n", 60)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}-{len(self.daemons)}.log").open("w") as log:
            bound = ["setpriv", "--pdeathsig", "KILL", *command]  # it must not outlive a test that is killed
            self.daemons.append(subprocess.Popen(bound, env=self.environment, stdout=log, stderr=subprocess.STDOUT))

    def stop(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.ask("scancel", "--user=root", check=False)
            wait_until(lambda: not self.ask("squeue", "--noheader", check=False), 60)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(30)
        for process in psutil.process_iter():  # daemons that do not end, and what they have left behind
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()
        for daemon in self.daemons:
            daemon.wait(30)

    def ask(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a command of SLURM's prints."""
        given = {"cwd": ROOT, "env": self.environment | environment, "timeout": 300, "check": check}
        return subprocess.run(command, capture_output=True, text=True, **given).stdout

    def submit(self, words: list[str], **environment: str) -> str:
        """Submit the script, with one process on each node, and return the job's number."""
        fitting = (f"--output={self.folder}/%j.out", "--gpus-per-node=1", "--cpus-per-task=1")
        return self.ask("sbatch", "--parsable", *fitting, "configs/launch/slurm.sh", *words, **environment).strip()

    def printed(self, job: str) -> str:
        return (self.folder / f"{job}.out").read_text()

    def job(self, job: str) -> dict[str, str]:
        words = self.ask("scontrol", "show", "job", "--oneliner", job).split()
        return {name: value for name, equals, value in (word.partition("=") for word in words) if equals}

    def wait(self, job: str, state: str) -> dict[str, str]:
        """Wait until a job is in this state, and return what SLURM then says of it."""
        wait_until(lambda: self.job(job)["JobState"] == state or self._over(job))
        now = self.job(job)
        assert now["JobState"] == state, self.printed(job)
        return now

    def wait_for_epochs(self, job: str, run: Path, more: int) -> None:
        """Wait until a job has trained so many more epochs."""

        def epochs() -> int:
            metrics = run / "metrics.jsonl"
            return len(metrics.read_text().splitlines()) if metrics.exists() else 0

        before = epochs()
        wait_until(lambda: epochs() >= before + more or self._over(job))
        assert self.job(job)["JobState"] == "RUNNING", self.printed(job)

    def _over(self, job: str) -> bool:
        return self.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_a_disturbed_job_ends_as_if_undisturbed(slurm, tiny, tmp_path, ranks, record_property):
    """Queued again by hand, preempted without and with time to save in, and on a node that is lost."""
    fixed = tiny("run.epochs=60", "eval.every=20", "run.log_every=1000", "run.overwrite=false", run="cut")

    def requeue() -> None:
        slurm.ask("scontrol", "requeue", job)

    def preempt() -> None:
        slurm.ask(
            "sbatch", "--wait", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=:"
        )

    def preempt_with_grace() -> None:
        slurm.ask("scontrol", "update", "PartitionName=usual", "GraceTime=60")
        preempt()

    def lose_node() -> None:
        slurm.ask("scontrol", "update", "NodeName=127.0.0.2", "State=DOWN", "Reason=lost")
        slurm.wait(job, "PENDING")
        slurm.ask("scontrol", "update", "NodeName=127.0.0.2", "State=RESUME")

    run, disturbances = tmp_path / "cut", (requeue, preempt, preempt_with_grace, lose_node)
    record_property("faults", len(disturbances))
    job = slurm.submit(fixed)
    for restarts, disturb in enumerate(disturbances, 1):
        slurm.wait_for_epochs(job, run, 3)
        disturb()
        assert slurm.wait(job, "PENDING")["Restarts"] == str(restarts)
        slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would wait for two minutes
        slurm.wait(job, "RUNNING")
    end = slurm.wait(job, "COMPLETED")
    assert (end["ExitCode"], end["Restarts"]) == ("0:0", str(len(disturbances)))
    printed = slurm.printed(job)
    assert printed.count("interrupted by SIGTERM: saved ") >= len(disturbances) - 1
    assert printed.count("resumed from") == len(disturbances)
    assert "2 process(es)" in printed

    undisturbed = ranks(2, "engine/train.py", *fixed, f"run.dir={tmp_path / 'whole'}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    cut, whole = (find_checkpoint(path) / "model.safetensors" for path in (run, tmp_path / "whole"))
    assert cut.read_bytes() == whole.read_bytes()
    ours, theirs = (read_rows(path / "metrics.jsonl") for path in (run, tmp_path / "whole"))
    assert [row["epoch"] for row in ours] == list(range(1, 61))
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() - {"timing", "z_grad_norm_prediction"}:  # an epoch that was cut is summed in two parts
            # what is not measured in every epoch is None
            assert one[name] == other[name] or one[name] == pytest.approx(other[name], rel=1e-6), name


SLOW_DISK = """
import os, time
replace = os.replace

def slow(source, target):
    if "-step-" in str(target):
        time.sleep(5)
    replace(source, target)

os.replace = slow
"""


def test_a_job_that_runs_out_of_time_saves(slurm, tiny, tmp_path):
    """A minute before its end, as the script says; submitted again it goes on, and saves when it is cancelled.

    The other process leaves seconds before the first one has given the checkpoint its name.
    """
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    words = tiny("run.epochs=20000", "eval.every=20000", "checkpoint.every=20000", "run.overwrite=false")
    first = slurm.submit(words, PYTHONPATH=str(tmp_path))
    slurm.wait_for_epochs(first, tmp_path / "run", 3)
    hours, minutes, _ = slurm.job(first)["RunTime"].split(":")
    limit = 60 * int(hours) + int(minutes) + 2
    slurm.ask("scontrol", "update", f"JobId={first}", f"TimeLimit={limit}")
    end = slurm.wait(first, "FAILED")
    assert (end["ExitCode"], end["Restarts"]) == ("1:0", "0")
    printed = slurm.printed(first)
    assert printed.count("interrupted by SIGTERM: saved ") == 1, printed
    assert "-step-" in printed.split("interrupted by SIGTERM: saved ")[1].split(";")[0]

    second = slurm.submit(words, PYTHONPATH=str(tmp_path))
    slurm.wait_for_epochs(second, tmp_path / "run", 3)
    slurm.ask("scancel", second)
    slurm.wait(second, "CANCELLED")
    wait_until(lambda: not slurm.ask("squeue", "--noheader"))
    printed = slurm.printed(second)
    assert printed.count("resumed from") == printed.count("interrupted by SIGTERM: saved ") == 1, printed
    epochs = [row["epoch"] for row in read_rows(tmp_path / "run/metrics.jsonl")]
    assert epochs == list(range(1, len(epochs) + 1))


def test_a_process_that_dies_ends_the_job(slurm, tiny, tmp_path):
    """Which is not queued again, and has freed its nodes soon after."""
    job = slurm.submit(tiny("run.epochs=20000", "eval.every=20000"))
    slurm.wait_for_epochs(job, tmp_path / "run", 3)
    (second,) = (process for process in psutil.process_iter() if is_rank(process, job, "1"))
    second.kill()
    end = slurm.wait(job, "FAILED")
    assert (end["Reason"], end["ExitCode"], end["Restarts"]) == ("NonZeroExitCode", "1:0", "0")
    assert "SIGKILL" in slurm.printed(job)


def is_rank(process: psutil.Process, job: str, rank: str) -> bool:
    with contextlib.suppress(psutil.Error):
        environment = process.environ()
        return (environment.get("SLURM_JOB_ID"), environment.get("RANK")) == (job, rank)
    return False


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("run.epochs=1", "gates.enforce=true"), 1, "gate_pass: False"),
        (("optim.lr=fast",), 2, "error: override optim.lr=fast: optim.lr = 'fast': must be a number >= 0"),
    ],
    ids=["a gate", "bad input"],
)
def test_a_job_that_fails_is_not_queued_again(slurm, tiny, words, code, line):
    job = slurm.submit(tiny(*words))
    end = slurm.wait(job, "FAILED")
    # the launcher turns every code into 1, and prints what it was
    assert (end["Reason"], end["ExitCode"], end["Restarts"]) == ("NonZeroExitCode", "1:0", "0")
    printed = slurm.printed(job)
    assert line in printed
    assert f"exitcode  : {code} " in printed.split("Root Cause")[1]
