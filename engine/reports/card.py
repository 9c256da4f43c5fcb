"""The model card of an exported encoder: what it was trained on, and what it reached beside its control."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import yaml

from ...configs.section import PATHS
from ..analysis.metrics import METRICS
from ..runs.checkpoints import find_checkpoint
from ..runs.checksums import Damaged
from ..runs.metrics_file import read_rows
from ..runs.tensors import check

FIGURES = ("curves.png", "terms.png")
RECIPE = "training.yaml"
CITATION = [
    "## Citation",
    "",
    "seq-JEPA: Autoregressive Predictive Learning of Invariant-Equivariant World Models, arXiv 2505.03176.",
    "",
]


def card(run: Path, encoder: Any, folder: Path, licence: str) -> str:
    """A model card in Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        run: the run or checkpoint that the encoder is from.
        encoder: the `Encoder`.
        folder: where the card will stand; the run's config and figures are copied there.
        licence: of the weights, as the Hub names it.
    """
    checkpoint = find_checkpoint(run)
    state = None
    if checkpoint is not None:
        with contextlib.suppress(Damaged):
            state = check(checkpoint)
    home = checkpoint.parent.parent if checkpoint and checkpoint.parent.name == "checkpoints" else run
    config: dict[str, Any] = state.config if state else {}
    name = config.get("run", {}).get("name", run.name)
    data = config.get("data", {})
    height, width = encoder.image_size
    lines = [
        *_beginning(name, encoder, licence, "seqjepa, a trainer of seq-JEPA (arXiv 2505.03176) and its relatives,"),
        "## Data",
        "",
        f"{data.get('name', 'unknown')}: {data.get('dataset', 'unknown')}, {width} x {height}, "
        f"{len(encoder.classes)} classes, which only probes saw. {_statistics(encoder)}",
        "",
    ]
    if state:
        command = f"seqjepa train {RECIPE}" + (" data.root=..." if data.get("root") else "")
        lines += [
            "## Recipe",
            "",
            f"{state.position.segment} of {config['run']['epochs']} epochs, seed {config['run']['seed']}, "
            f"code {state.commit or 'unknown'}. `{command}` repeats it.",
            "",
        ]
        recipe = yaml.safe_dump(without_paths(config), sort_keys=False, allow_unicode=True)
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    rules = config.get("gates", {}).get("rules", {}).get(data.get("name"), [])
    lines += _results(home, state.position.segment if state else 0, rules)
    for figure in FIGURES:
        if (home / "figures" / figure).is_file():
            shutil.copyfile(home / "figures" / figure, folder / figure)
            lines += [f"![{figure.removesuffix('.png')}]({figure})", ""]
    return "\n".join([*lines, *CITATION, "The seqjepa authors: seqjepa, with which the encoder was trained.", ""])


def card_of_reference(name: str, encoder: Any, licence: str | None) -> str:
    """A model card of an encoder that the authors' code trained.

    Args:
        name: of the file with its weights.
        encoder: the `Encoder`.
        licence: of the weights, as the Hub names it, if it is known.
    """
    height, width = encoder.image_size
    lines = _beginning(name, encoder, licence, "the code of seq-JEPA's authors (github.com/hafezgh/seq-jepa)")
    lines += ["## Data", "", f"Images of {width} x {height}. {_statistics(encoder)}", ""]
    return "\n".join([*lines, *CITATION])


def _beginning(name: str, encoder: Any, licence: str | None, trainer: str) -> list[str]:
    """What the Hub reads, what it is, and how it is used."""
    front = {
        "library_name": "seqjepa",
        "pipeline_tag": "image-feature-extraction",
        **({"license": licence} if licence else {}),
        "tags": ["self-supervised-learning", "seq-jepa", "jepa"],
    }
    features = f"[B, {encoder.num_features}]"
    if encoder.sees == "images":
        use = f"features = encoder(images)  # {features}; uint8, or floating-point from 0 to 1"
    else:
        use = f"features = encoder(grids)  # {features}; integers from 0 to 9, [B, H, W]"
    kind = encoder.description.model.encoder.kind
    return [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"An encoder ({kind}, {encoder.num_features} features) that was trained by {trainer} without labels.",
        "",
        "```python",
        "import seqjepa",
        "",
        'encoder = seqjepa.load_encoder("PATH OF THIS FOLDER, OR USER/NAME")',
        use,
        "```",
        "",
    ]


def _statistics(encoder: Any) -> str:
    pixels = encoder.description.pixels
    return f"Mean {_numbers(pixels.mean)}, std {_numbers(pixels.std)}."


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the files and folders of this machine, and without leave to replace a run."""
    kept = {name: value for name, value in config.items() if name not in (*PATHS, "overwrite")}
    return {name: without_paths(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _results(home: Path, epoch: int, rules: list[dict[str, Any]]) -> list[str]:
    """The metrics of a checkpoint's epoch beside the untrained control's; the gates' rules and their verdict."""
    try:
        summary = json.loads((home / "summary.json").read_text(encoding="utf-8"))
        untrained, verdict, reasons = summary["untrained"] or {}, summary["gate_pass"], summary["gate_reasons"]
        rows, last = read_rows(home / "metrics.jsonl"), summary["epochs"] == epoch
        found = summary["final"] if last else next(row for row in rows if row["epoch"] == epoch)
        if not last:  # a stream's control is of all tasks, not of those that the checkpoint has seen
            untrained = {name: value for name, value in untrained.items() if not name.startswith("stream_")}
        hardware = summary["timing"]["hardware"]
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return ["## Results", "", "The run has no metrics of this epoch beside those of its untrained control.", ""]
    names = [metric.name for metric in METRICS if metric.compared]
    names += [name for name in found if name.startswith("online_r2_") and name.endswith("_test") and "loss" not in name]
    cells = [(name, found.get(name), untrained.get(name)) for name in dict.fromkeys(names) if name in found]
    if (largest := summary.get("largest_class")) is not None:
        cells.append(("largest_class (always guessing it)", largest, largest))
    said = {True: "The gates passed.", False: "The gates failed:", None: "No gates apply to these data."}
    judged = [said[verdict], *(f"- {reason}" for reason in reasons)] if last else ["The gates judged a later epoch."]
    judged += ["", "Their rules, where a margin is one over the untrained network:", ""] if rules else []
    judged += [f"- {_rule(rule)}" for rule in rules]
    return [
        "## Results",
        "",
        f"Epoch {epoch}, beside the same probes on the untrained network; on {hardware}.",
        "",
        "| metric | trained | untrained |",
        "| --- | --- | --- |",
        *(f"| {name} | {_number(value)} | {_number(control)} |" for name, value, control in cells),
        "",
        *judged,
        "",
    ]


def _rule(rule: dict[str, Any]) -> str:
    """A rule as a config has it, without what it leaves open."""
    given = {name: value for name, value in rule.items() if value is not None and (name, value) != ("over", "epoch")}
    if given.get("last") == 1:
        del given["last"]
    return f"`{yaml.safe_dump(given, default_flow_style=True, sort_keys=False, width=math.inf).strip()}`"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
