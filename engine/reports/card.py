"""The model card of an exported encoder: what it was trained on, and what it reached beside its control."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from ...configs.section import PATHS
from ..analysis.metrics import METRICS
from ..runs.checkpoints import find_checkpoint
from ..runs.checksums import Damaged
from ..runs.tensors import check

FIGURES = ("curves.png", "terms.png")
RECIPE = "training.yaml"


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
        try:
            state = check(checkpoint)
        except Damaged:
            state = None
    home = checkpoint.parent.parent if checkpoint and checkpoint.parent.name == "checkpoints" else run
    config: dict[str, Any] = state.config if state else {}
    name = config.get("run", {}).get("name", run.name)
    data = config.get("data", {})
    height, width = encoder.image_size
    lines = [
        "---",
        "library_name: seqjepa",
        "pipeline_tag: image-feature-extraction",
        f"license: {licence}",
        "tags: [self-supervised-learning, seq-jepa, jepa]",
        "---",
        "",
        f"# {name}",
        "",
        f"An encoder ({encoder.description.model.encoder.kind}, {encoder.num_features} features) that was trained by"
        " seqjepa, a trainer of seq-JEPA (arXiv 2505.03176) and its relatives, without labels.",
        "",
        "```python",
        "import seqjepa",
        "",
        'encoder = seqjepa.load_encoder("PATH OF THIS FOLDER, OR USER/NAME")',
        f"features = encoder(images)  # [B, {encoder.num_features}]; uint8, or floating-point from 0 to 1"
        if encoder.sees == "images"
        else f"features = encoder(grids)  # [B, {encoder.num_features}]; integers from 0 to 9, [B, H, W]",
        "```",
        "",
        "## Data",
        "",
        f"{data.get('name', 'unknown')}: {data.get('dataset', 'unknown')}, {width} x {height}, "
        f"{len(encoder.classes)} classes, which only probes saw. "
        f"Mean {_numbers(encoder.description.pixels.mean)}, std {_numbers(encoder.description.pixels.std)}.",
        "",
    ]
    if state:
        lines += [
            "## Recipe",
            "",
            f"{state.position.segment} of {config['run']['epochs']} epochs, seed {config['run']['seed']}, "
            f"code {state.commit or 'unknown'}. `seqjepa train {RECIPE} data.root=...` repeats it.",
            "",
        ]
        recipe = yaml.safe_dump(_without_paths(config), sort_keys=False, allow_unicode=True)
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    lines += _results(home)
    for figure in FIGURES:
        if (home / "figures" / figure).is_file():
            shutil.copyfile(home / "figures" / figure, folder / figure)
            lines += [f"![{figure.removesuffix('.png')}]({figure})", ""]
    lines += [
        "## Citation",
        "",
        "seq-JEPA: Autoregressive Predictive Learning of Invariant-Equivariant World Models, arXiv 2505.03176.",
        "",
    ]
    return "\n".join(lines)


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the files and folders of this machine."""
    kept = {name: value for name, value in config.items() if name not in PATHS}
    return {name: _without_paths(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _results(home: Path) -> list[str]:
    """The metrics of the last epoch beside the untrained control's, and the verdict of the gates."""
    try:
        summary = json.loads((home / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["## Results", "", "The run has not ended.", ""]
    final, untrained = summary["final"], summary["untrained"] or {}
    chosen = [metric.name for metric in METRICS if metric.compared and metric.name in final]
    chosen += [
        name for name in final if name.startswith("online_r2_") and name.endswith("_test") and "loss" not in name
    ]
    rows = [f"| {name} | {_number(final[name])} | {_number(untrained.get(name))} |" for name in dict.fromkeys(chosen)]
    verdict = {True: "The gates passed.", False: "The gates failed:", None: "No gates apply to these data."}
    return [
        "## Results",
        "",
        f"Last epoch, beside the same probes on the untrained network; on {summary['timing']['hardware']}.",
        "",
        "| metric | trained | untrained |",
        "| --- | --- | --- |",
        *rows,
        "",
        verdict[summary["gate_pass"]],
        *[f"- {reason}" for reason in summary["gate_reasons"]],
        "",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
