"""Copies of a run at a second place, such as a bucket, from which it goes on when its disk is gone.

ADDRESS/<name>/checkpoints/epoch-0007/   as in the run's folder; manifest.json is written last, so that a checkpoint
                                         without it is not whole
ADDRESS/<name>/checkpoints/best          name of the best checkpoint
ADDRESS/<name>/metrics.jsonl, steps.jsonl, summary.json, config.yaml, tracker-id, figures/
"""

import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ...configs.errors import InputError, first_line
from .checkpoints import NAME, Checkpoints
from .checksums import MANIFEST, Damaged
from .tensors import check

PATIENCE = 600.0  # seconds that the end of a run waits for its last copy
# stores without folders, in which makedirs would make a bucket of a name that was mistyped
BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az", "oss", "hf"})
RECORDS = ("metrics.jsonl", "steps.jsonl", "summary.json", "config.yaml", "tracker-id")


class Mirror:
    """The copies of one run. A thread makes them, so that no training step waits; a failure is one line.

    Args:
        address: a folder, or an address of fsspec such as s3://BUCKET/runs or hf://buckets/USER/runs.
        path: folder of the run; its name is appended to the address.

    Raises:
        InputError: the package that reaches such an address is not installed, or there is no such kind of address.
    """

    def __init__(self, address: str, path: Path):
        try:
            import fsspec

            self.files, root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise InputError(f"{address}: {first_line(error)}", "run.mirror") from None
        self.root = f"{root.rstrip('/')}/{path.name}"
        self.address = f"{address.rstrip('/')}/{path.name}"
        self.path = path
        self.lines: list[str] = []  # what the thread has to say, for the main thread
        self._orders: queue.SimpleQueue[Path | threading.Event] = queue.SimpleQueue()
        self._failing = False
        self._thread: threading.Thread | None = None

    # -- from the run's folder to the mirror

    def copy(self, checkpoint: Path) -> None:
        """Ask for a copy of a published checkpoint and of the records; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()
        self._orders.put(checkpoint)

    def finish(self, patience: float = PATIENCE) -> None:
        """Copy the records once more, and wait for all that was asked for; after `patience` seconds the run ends."""
        if self._thread is None:
            return
        done = threading.Event()
        self._orders.put(done)
        if not done.wait(patience):
            self.lines.append(f"{self.address}: not everything is copied after {patience:.0f} s")
        self._thread = None

    def _work(self) -> None:
        done = None
        while done is None:
            orders = [self._orders.get()]
            while not self._orders.empty():
                orders.append(self._orders.get())
            checkpoints = [order for order in orders if isinstance(order, Path)]
            done = next((order for order in orders if isinstance(order, threading.Event)), None)
            try:
                self._copy_records()
                for checkpoint in checkpoints[-1:]:
                    self._copy_checkpoint(checkpoint)
            except Exception as error:  # whatever a provider's library raises, training goes on
                if checkpoints and not checkpoints[-1].exists():
                    continue  # a newer one has taken its place, and is copied next
                if not self._failing:
                    self.lines.append(f"{self.address} is not written ({first_line(error)}); the run goes on")
                self._failing = True
            else:
                if self._failing:
                    self.lines.append(f"{self.address} is written again")
                self._failing = False
        done.set()

    def _copy_records(self) -> None:
        figures = sorted((self.path / "figures").glob("*.png"))
        for file in [*(self.path / name for name in RECORDS), *figures]:
            if file.is_file():
                self._put(file, f"{self.root}/{file.relative_to(self.path).as_posix()}")

    def _copy_checkpoint(self, checkpoint: Path) -> None:
        there = f"{self.root}/checkpoints/{checkpoint.name}"
        manifest = checkpoint / MANIFEST
        sealed = f"{there}/{MANIFEST}"
        if not (self.files.exists(sealed) and self.files.cat_file(sealed) == manifest.read_bytes()):
            if self.files.exists(there):
                self.files.rm(there, recursive=True)
            for file in sorted(checkpoint.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
                self._put(file, f"{there}/{file.name}")
        best = self.path / "checkpoints" / "best"
        if best.is_symlink():
            self.files.pipe_file(f"{self.root}/checkpoints/best", os.readlink(best).encode())
        kept = {path.name for path in Checkpoints(self.path / "checkpoints", 1).all()}
        for name in self._names():  # a later one is of a run that this one does not know: it stays
            if name not in kept and name < checkpoint.name:
                self.files.rm(f"{self.root}/checkpoints/{name}", recursive=True)

    def _put(self, file: Path, place: str) -> None:
        size = file.stat().st_size
        self._make_folder(place.rpartition("/")[0])
        with file.open("rb") as source, self.files.open(place, "wb") as target:
            shutil.copyfileobj(source, target, 2**22)
        self.files.invalidate_cache(place.rpartition("/")[0])
        if (written := self.files.info(place)["size"]) < size:  # a record may have grown since
            raise OSError(f"{place} has {written} of {size} bytes")

    def _make_folder(self, place: str) -> None:
        protocols = self.files.protocol
        if not BUCKETS & set([protocols] if isinstance(protocols, str) else protocols):
            self.files.makedirs(place, exist_ok=True)

    def _names(self) -> list[str]:
        """Names of the checkpoints there, oldest first."""
        try:
            found = self.files.ls(f"{self.root}/checkpoints", detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for path in found if NAME.fullmatch(name := path.rstrip("/").rpartition("/")[2]))

    def try_out(self) -> str | None:
        """Write, read and delete a small file.

        Returns:
            The name of the newest whole checkpoint of this run there; None if there is none.

        Raises:
            InputError: one of these fails.
        """
        place, word = f"{self.root}/.tried-{secrets.token_hex(4)}", secrets.token_bytes(16)
        try:
            self._make_folder(self.root)
            self.files.pipe_file(place, word)
            self.files.invalidate_cache(self.root)
            read = self.files.cat_file(place)
            self.files.rm(place)
            names = self._names()
            newest = next(
                (n for n in reversed(names) if self.files.exists(f"{self.root}/checkpoints/{n}/{MANIFEST}")), None
            )
        except Exception as error:  # whatever a provider's library raises
            raise InputError(f"{self.address} cannot be used ({first_line(error)})", "run.mirror") from None
        if read != word:
            raise InputError(f"{self.address} does not give back what was written", "run.mirror")
        return newest

    # -- from the mirror to an empty disk

    def fetch(self, say: Callable[[str], None]) -> None:
        """Bring the newest whole checkpoint, the best one and the records into the run's folder, which has none."""
        started = time.monotonic()
        try:
            names = self._names()
            newest = next((name for name in reversed(names) if self._fetch(name, say)), None)
            if newest is None:
                return
            best = f"{self.root}/checkpoints/best"
            name = self.files.cat_file(best).decode() if self.files.exists(best) else newest
            if name != newest and name in names:
                self._fetch(name, say)
            for record in ("metrics.jsonl", "steps.jsonl", "tracker-id"):
                if self.files.exists(f"{self.root}/{record}"):
                    (self.path / record).write_bytes(self.files.cat_file(f"{self.root}/{record}"))
            say(f"{newest} fetched from {self.address} in {time.monotonic() - started:.0f} s")
        except InputError:
            raise
        except Exception as error:  # whatever a provider's library raises
            say(f"{self.address} cannot be read ({first_line(error)}); what is on this disk is used")

    def _fetch(self, name: str, say: Callable[[str], None]) -> bool:
        """Whether this checkpoint is whole, and in the run's folder now."""
        folder = self.path / "checkpoints"
        partial, there = folder / f".partial-{name}", f"{self.root}/checkpoints/{name}"
        if not self.files.exists(f"{there}/{MANIFEST}"):
            return False
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for place in self.files.ls(there, detail=False):
            self.files.get_file(place, str(partial / place.rpartition("/")[2]))
        try:
            check(partial)
        except Damaged as problem:
            say(f"damaged checkpoint passed over: {self.address}/checkpoints/{name} ({problem})")
            shutil.rmtree(partial)
            return False
        os.replace(partial, folder / name)
        return True
