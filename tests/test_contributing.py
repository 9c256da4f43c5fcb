"""The diffs of CONTRIBUTING.md, applied: each adds a part, and all of them train together."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
PARTS = ["encoders", "aggregators", "predictors", "targets", "objectives", "sequences", "images", "metrics"]

TRAIN = """
import json, sys
from seqjepa.configs.help import help_page
from seqjepa.engine.config import Config
from seqjepa.engine.evaluate import main as evaluate
from seqjepa.engine.train import USAGE, main

words, own, run = sys.argv[1].split(), sys.argv[2].split(), sys.argv[3]
page = help_page(USAGE, Config)
for word in own:
    assert f"  {word.partition('=')[0]} = " in page, word
assert main([*words, *own, "run.epochs=1"]) == 0
assert main([*words, *own, "run.epochs=2", "run.resume=auto"]) == 0
assert main([*words, *own, "run.epochs=3", "run.resume=auto", "objective.sparsity.power=3.0"]) == 2
assert evaluate([run, "eval.lengths=[1,2]", "eval.batch_size=16", "eval.renderings=1", "eval.neighbours=5"]) == 0
rows = [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
assert len(rows) == 2
assert all(row["pred_distance_test"] > 0 and row["loss_sparsity"] > 0 and "agg_gain" not in row for row in rows)
assert {"online_r2_flip_test"} < rows[0].keys()
"""


def test_each_part_has_its_diff():
    assert len(DIFFS) == len(PARTS)
    for part, diff in zip(PARTS, DIFFS, strict=True):
        assert f"/{part}" in diff


def test_the_parts_train_together(tmp_path, tiny):
    packages = tmp_path / "with_parts"
    for package in ("configs", "engine", "kernels", "loaders"):
        shutil.copytree(ROOT / package, packages / "seqjepa" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:  # git reads them in any folder
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=packages / "seqjepa", check=True)
    own = [
        *("model.encoder.kind=pooled", "model.encoder.width=16", "model.aggregator.kind=maximum"),
        *("model.predictor.kind=linear", "model.predictor.bias=false", "target.kind=initial"),
        *("objective.sparsity.weight=0.1", "objective.sparsity.power=2.0"),
        *("sequence.kind=flip", "sequence.probability=0.25", "data.dataset=noise"),
    ]
    places = ("model.encoder.", "model.aggregator.", "model.predictor.")
    words = [word for word in tiny("control.enabled=false") if not word.startswith(places)]
    arguments = [" ".join(words), " ".join(own), str(tmp_path / "run")]
    environment = {"PYTHONPATH": str(packages), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", TRAIN, *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
