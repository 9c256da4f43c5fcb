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

LAST_COPY_SECONDS = 600.0  # seconds that the end of a run waits for its last copy
WAITS = (5.0, 15.0, 30.0, 70.0)  # seconds after which a first or a last contact that failed is tried again
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
        protocols = self.files.protocol
        self._protocols = {protocols} if isinstance(protocols, str) else set(protocols)
        self._in_folder = "file" in self._protocols
        self._orders: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()
        self._failing = self._unread = False
        self._deadline = 0.0  # until which the last copies are tried again
        self._thread: threading.Thread | None = None

    # -- from the run's folder to the mirror

    def copy(self) -> None:
        """Ask for a copy of the newest and the best checkpoint, and of the records; returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()
        self._orders.put(None)

    def finish(self, seconds: float) -> None:
        """Wait until everything is copied, also if it is tried several times; after so many seconds the run ends."""
        if self._thread is None:
            return
        done = threading.Event()
        self._deadline = time.monotonic() + seconds
        self._orders.put(done)
        if not done.wait(seconds + 1) or self._failing:
            self.lines.append(f"{self.address}: not everything is copied")
        self._thread = None

    def _work(self) -> None:
        ends: list[threading.Event] = []
        while not ends:
            orders = [self._orders.get()]
            while not self._orders.empty():
                orders.append(self._orders.get())
            ends = [order for order in orders if order is not None]
            waits = list(WAITS) if ends else []
            while not self._copied() and waits and time.monotonic() + waits[0] < self._deadline:
                time.sleep(waits.pop(0))
        for done in ends:
            done.set()

    def _copied(self) -> bool:
        """Copy what is not there yet; whether that went well."""
        checkpoints = Checkpoints(self.path / "checkpoints", 1)
        newest = checkpoints.newest()
        try:
            if self._behind(newest):
                return True
            self._copy_records()
            if newest is not None:
                self._copy_checkpoints(newest, checkpoints)
        except Exception as error:  # whatever a provider's library raises, training goes on
            if newest != checkpoints.newest():
                return self._copied()  # a newer one has taken its place
            if not self._failing:
                self.lines.append(f"{self.address} is not written ({first_line(error)}); the run goes on")
            self._failing = True
            return False
        if self._failing:
            self.lines.append(f"{self.address} is written again")
        self._failing = False
        return True

    def _behind(self, newest: Path | None) -> bool:
        """Whether the mirror, which could not be read at the start, has a later checkpoint than this disk."""
        if not self._unread:
            return False
        later = self._names()[-1:]
        behind = bool(later) and (newest is None or later[0] > newest.name)
        if behind and not self._failing:
            self.lines.append(f"{self.address} has {later[0]}; nothing is copied before the run is past it")
        self._failing = self._unread = behind
        return behind

    def _copy_records(self) -> None:
        figures = sorted((self.path / "figures").glob("*.png"))
        for file in [*(self.path / name for name in RECORDS), *figures]:
            if file.is_file():
                self._put(file, f"{self.root}/{file.relative_to(self.path).as_posix()}")

    def _copy_checkpoints(self, newest: Path, checkpoints: Checkpoints) -> None:
        link = checkpoints.folder / "best"
        best = checkpoints.folder / os.readlink(link) if link.is_symlink() else newest
        for checkpoint in {best, newest}:
            self._copy_checkpoint(checkpoint)
        if link.is_symlink():
            self.files.pipe_file(f"{self.root}/checkpoints/best", best.name.encode())
        kept = {path.name for path in checkpoints.all()}
        for name in self._names():  # a later one is of a run that this one does not know: it stays
            if name not in kept and name < newest.name:
                self.files.rm(f"{self.root}/checkpoints/{name}", recursive=True)

    def _copy_checkpoint(self, checkpoint: Path) -> None:
        there = f"{self.root}/checkpoints/{checkpoint.name}"
        sealed = f"{there}/{MANIFEST}"
        if self.files.exists(sealed) and self.files.cat_file(sealed) == (checkpoint / MANIFEST).read_bytes():
            return
        if self.files.exists(there):
            self.files.rm(there, recursive=True)
        for file in sorted(checkpoint.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
            self._put(file, f"{there}/{file.name}")

    def _put(self, file: Path, place: str) -> None:
        size = file.stat().st_size
        self._make_folder(place.rpartition("/")[0])
        written_to = f"{place}.new" if self._in_folder else place  # a store replaces an object as a whole
        with file.open("rb") as source, self.files.open(written_to, "wb") as target:
            shutil.copyfileobj(source, target, 2**22)
        self.files.invalidate_cache(place.rpartition("/")[0])
        if (written := self.files.info(written_to)["size"]) < size:  # a record may have grown since
            raise OSError(f"{place} has {written} of {size} bytes")
        if self._in_folder:
            os.replace(written_to, place)

    def _make_folder(self, place: str) -> None:
        if not BUCKETS & self._protocols:
            self.files.makedirs(place, exist_ok=True)

    def _names(self) -> list[str]:
        """Names of the checkpoints there, oldest first."""
        return sorted(name for name in self._listed(f"{self.root}/checkpoints") if NAME.fullmatch(name))

    def _listed(self, place: str) -> list[str]:
        """Names in a folder; none if it is not there. `exists` would take an error of the network for a no."""
        try:
            self.files.invalidate_cache(place)
            return [path.rstrip("/").rpartition("/")[2] for path in self.files.ls(place, detail=False)]
        except FileNotFoundError:
            return []

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
            whole = (name for name in reversed(names) if MANIFEST in self._listed(f"{self.root}/checkpoints/{name}"))
            newest = next(whole, None)
        except Exception as error:  # whatever a provider's library raises
            raise InputError(f"{self.address} cannot be used ({first_line(error)})", "run.mirror") from None
        if read != word:
            raise InputError(f"{self.address} does not give back what was written", "run.mirror")
        return newest

    # -- from the mirror to an empty disk

    def fetch(self, say: Callable[[str], None]) -> None:
        """Bring the newest whole checkpoint, the best one and the records into the run's folder, which has none.

        A mirror that cannot be read is tried again for two minutes; then the run goes on without it.
        """
        started = time.monotonic()
        for wait in (*WAITS, None):
            try:
                newest = self._fetch(say)
            except InputError:
                raise
            except Exception as error:  # whatever a provider's library raises
                if wait is not None:
                    time.sleep(wait)
                    continue
                self._unread = True
                say(f"{self.address} cannot be read ({first_line(error)}); what is on this disk is used")
                return
            if newest is not None:
                say(f"{newest} fetched from {self.address} in {time.monotonic() - started:.0f} s")
            return

    def _fetch(self, say: Callable[[str], None]) -> str | None:
        """The name of the newest whole checkpoint, which appears in the run's folder last of all."""
        names = self._names()
        newest = next((name for name in reversed(names) if self._download(name, say)), None)
        if newest is None:
            return None
        there = self._listed(self.root)
        if "best" in self._listed(f"{self.root}/checkpoints"):
            best = self.files.cat_file(f"{self.root}/checkpoints/best").decode()
            if best != newest and best in names and self._download(best, say):
                self._publish(best)
        for record in ("metrics.jsonl", "steps.jsonl", "tracker-id"):
            if record in there:
                (self.path / record).write_bytes(self.files.cat_file(f"{self.root}/{record}"))
        self._publish(newest)
        return newest

    def _download(self, name: str, say: Callable[[str], None]) -> bool:
        """Whether this checkpoint is whole, and beside its place in the run's folder now."""
        partial, there = self._partial(name), f"{self.root}/checkpoints/{name}"
        files = self._listed(there)
        if MANIFEST not in files:
            return False
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in files:
            self.files.get_file(f"{there}/{file}", str(partial / file))
            os.utime(partial / file, (0, 0))  # by which launch files know those that this start has published
        try:
            check(partial)
        except Damaged as problem:
            say(f"damaged checkpoint passed over: {self.address}/checkpoints/{name} ({problem})")
            shutil.rmtree(partial)
            return False
        return True

    def _partial(self, name: str) -> Path:
        return self.path / "checkpoints" / f".partial-{name}"

    def _publish(self, name: str) -> None:
        os.replace(self._partial(name), self.path / "checkpoints" / name)
