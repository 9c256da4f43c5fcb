"""Shared fixtures: a tiny run that trains in a second, and real data where it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

# torch keeps compiled graphs on disk under an operation's name, and would run one of before the operation changed
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, threads of OpenMP would wait for each other by spinning
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# a job in the background ignores SIGINT, one under nohup SIGHUP, and so would all that the tests start
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long first, so that no worker is left alone with one: those of many tests, then of few.

    Modules of few tests start processes or compile; what is left for the end are quick ones.
    """
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (0, -counts[item.path]) if counts[item.path] > 100 else (1, counts[item.path]))


ROOT = Path(__file__).resolve().parent.parent
TINY = [
    str(ROOT / "tests/small.yaml"),
    "run.epochs=2",
    "run.deterministic=true",
    "run.threads=1",
    "run.device=cpu",
    "data.train_subset=160",
    "data.val_subset=70",
    "model.encoder.width=4",
    "model.action_dim=8",
    "model.aggregator.num_layers=1",
    "model.predictor.hidden=16",
    "probes.hidden=16",
    "eval.every=1",
    "checkpoint.every=1",
    "control.max_epochs=1",
    "diagnostics.every=0",
    "gates.enforce=false",
    "tracking.wandb=disabled",
]


def pytest_terminal_summary(terminalreporter, config):
    """For `make soak`: how many faults were caused, and how many of them a run survived."""
    if config.option.markexpr != "soak":
        return
    counts = {
        outcome: sum(
            dict(report.user_properties).get("faults", 1)
            for report in terminalreporter.getreports(outcome)
            if report.when == "call"
        )
        for outcome in ("passed", "failed")
    }
    terminalreporter.section("soak")
    tried = sum(counts.values())
    terminalreporter.line(f"faults tried {tried:,}, survived {counts['passed']:,}, lost {counts['failed']:,}")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # workers run side by side
    yield
    torch.use_deterministic_algorithms(False)


def tiny_in(folder: Path):
    """Words of a command line that trains a tiny network on 160 digits in a second; further words may follow.

    Words in `other` may choose other kinds of parts; then the settings of the usual kinds are left out.
    """

    def words(*more: str, run: str = "run", other: tuple[str, ...] = ()) -> list[str]:
        parts = tuple(f"{name[:-5]}." for name in (word.partition("=")[0] for word in other) if name.endswith(".kind"))
        usual = [word for word in TINY if not word.startswith(parts)]
        return [*usual, f"run.dir={folder / run}", f"control.cache={folder / 'untrained'}", *more, *other]

    return words


@pytest.fixture
def tiny(tmp_path: Path):
    return tiny_in(tmp_path)


@pytest.fixture(scope="module")
def tiny_for_module(tmp_path_factory: pytest.TempPathFactory):
    return tiny_in(tmp_path_factory.mktemp("module"))


@pytest.fixture(scope="session")
def folder_of():
    """The folder that a command line trains in."""

    def find(words: list[str]) -> Path:
        (folder,) = [word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")]
        return Path(folder)

    return find


@pytest.fixture
def refused(capsys):
    """Check that a command line of train.py ends with 2 and one line, which holds these parts."""
    from seqjepa.engine.train import main

    def check(words, *parts):
        capsys.readouterr()  # what came before
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        for part in parts:
            assert part in error

    return check


@pytest.fixture
def blank_figures():
    """Figures are small and empty, because drawing takes half of the time of a tiny run; `undo()` ends that."""
    from matplotlib.figure import Figure

    save = Figure.savefig

    def save_blank(figure, path, **_):
        figure.clear()
        save(figure, path, dpi=10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_blank)
        yield patch


@pytest.fixture
def powerless():
    """A context in which permissions count, also where the tests run as root.

    Another user may not search the folders above pytest's: name what is in them relative to the working folder.
    """

    @contextmanager
    def without_rights():
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            yield
        finally:
            os.seteuid(user)

    return without_rights


@pytest.fixture
def interrupt_at(monkeypatch):
    """Send this process a signal in the midst of an optimiser step."""

    def arm(step, number=signal.SIGTERM):
        from seqjepa.engine.training.step import TrainingStep

        original = TrainingStep.step

        def interrupted(self, batch, at):
            if at == step and self.train_model:
                os.kill(os.getpid(), number)
            return original(self, batch, at)

        monkeypatch.setattr(TrainingStep, "step", interrupted)

    return arm


@pytest.fixture
def run_process():
    """Run a command from the repository's root and return its result with text output."""

    def run(*command: str, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture(scope="session")
def ranks():
    """Run a script by so many gloo processes of one torchrun."""

    def run(number: int, *command: str, **environment: str) -> subprocess.CompletedProcess:
        launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}")
        environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"} | environment
        return subprocess.run(
            [*launch, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )

    return run


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with MNIST/ and cifar10/, real images."""
    root = os.environ.get("SEQJEPA_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("real data: set SEQJEPA_DATA to a folder with MNIST/raw and cifar10/{train,test}")
    return Path(root)


@pytest.fixture(scope="session")
def python() -> str:
    return sys.executable
