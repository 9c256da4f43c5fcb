"""Signals while images are read, hashed and written: answered at once and in a line, with nothing left by halves."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from seqjepa.loaders.images.beton import has_ffcv

needs_ffcv = pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed")

# runs a command, and says on stdout when it has decoded a few images
TELLS = """
import sys
from seqjepa.loaders.images import files
from {module} import main

def telling(images, path, decode=files.ImageFiles._decode, paths=[]):
    paths.append(path)
    if len(paths) == 4:
        print("decoding", flush=True)
    return decode(images, path)

files.ImageFiles._decode = telling
sys.exit(main())
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of 4 GB of pixels, by links to one image, which take many seconds to decode."""
    root = tmp_path_factory.mktemp("many")
    for split in ("train", "test"):
        (root / split / "a").mkdir(parents=True)
        Image.fromarray(np.zeros((4000, 4000, 3), np.uint8)).save(root / split / "a" / "0.png")
        for number in range(1, 40):
            os.link(root / split / "a" / "0.png", root / split / "a" / f"{number}.png")
    return root


@pytest.fixture
def interrupt(tmp_path):
    """Run the main function of a module, and send a signal while it decodes: its exit code and what it said."""

    def run(module, words, number, launch=()):
        (tmp_path / "run.py").write_text(TELLS.format(module=module))
        command = [sys.executable, *launch, str(tmp_path / "run.py"), *map(str, words)]
        said = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                while (line := process.stdout.readline()) != "decoding\n":
                    assert line, said
                    said.append(line)
                process.send_signal(number)
                rest = process.communicate(timeout=60)[0]  # it ends with the last process that holds the pipe
            finally:
                process.kill()
        return process.returncode, "".join(said) + rest

    return run


@needs_ffcv
def test_while_betons_are_written(many, tmp_path, interrupt):
    out = tmp_path / "betons"
    code, said = interrupt("seqjepa.loaders.write", [many, out], signal.SIGTERM)
    assert code == 143
    assert said.splitlines()[-1] == "interrupted by SIGTERM: finished betons are kept, and no beton is half-written"
    assert "Traceback" not in said
    assert list(out.iterdir()) == []


FOLDER = ("data.dataset=imagefolder", "data.train_subset=4", "data.val_subset=4", "data.batch_size=2")


def test_while_a_sheet_is_drawn(many, tmp_path, interrupt):
    words = ["configs/smoke.yaml", *FOLDER, f"data.root={many}", "--out", tmp_path / "sheet.png"]
    code, said = interrupt("seqjepa.loaders.show", words, signal.SIGINT)
    assert code == 130
    assert said.splitlines()[-1] == "interrupted by SIGINT: nothing was drawn"
    assert not (tmp_path / "sheet.png").exists()


LAUNCHER = ("-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no")
LAUNCHER += ("--dynamo_backend", "no", "--num_processes", "1")


@pytest.mark.parametrize(("number", "launch"), [(signal.SIGINT, ()), (signal.SIGTERM, LAUNCHER)])
def test_before_training(many, tiny, folder_of, interrupt, number, launch):
    """`accelerate launch` dies of a SIGTERM without telling its child."""
    words = tiny(*FOLDER, f"data.root={many}")
    code, said = interrupt("seqjepa.engine.train", words, number, launch)
    assert code == (-number if launch else 128 + number)
    assert said.splitlines()[-1] == f"interrupted by {number.name}: nothing new was trained"
    assert "Traceback" not in said
    assert not folder_of(words).exists()
