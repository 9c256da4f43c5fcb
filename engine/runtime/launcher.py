"""Several processes on this machine, by torch's elastic launcher, whose exit code is that of the first that failed."""

import logging
import os
import signal
import sys
import tempfile
import uuid

from ...configs.cli import DONE, ERRORS_IN, MACHINE_FAILED


def launch(processes: int, module: str, words: list[str]) -> int:
    """Run `python -m MODULE WORDS` in several processes, and wait for them.

    A signal reaches all of them, and they have half a minute to save. An error that several of them find is printed
    once.

    Returns:
        0, or the exit code of the process that failed first: 128 + signal if it was killed, or if this process was
        asked to stop.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as all launchers do; run.threads decides
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        max_restarts=0,
    )
    logging.disable(logging.CRITICAL)  # its reports of a page repeat what the processes have said themselves
    try:
        with tempfile.TemporaryDirectory() as os.environ[ERRORS_IN]:
            elastic_launch(config, sys.executable)("-m", module, *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"process {rank} was ended by {name}", file=sys.stderr)
            return MACHINE_FAILED if name in ("SIGKILL", "SIGBUS", "SIGSEGV") else 128 - failure.exitcode
        return failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    finally:
        os.environ.pop(ERRORS_IN, None)
        logging.disable(logging.NOTSET)
    return DONE
