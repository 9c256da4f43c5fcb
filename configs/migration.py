"""Migrates settings of versions 4 and 5 to current ones. Those of version 4 were flat."""

from collections.abc import Callable
from typing import Any

# old name: new name; `WRITTEN` and the functions below convert values whose form has changed too
NEW_NAMES = {
    "model.encoder": "model.encoder.kind",
    "model.width": "model.encoder.width",
    "model.num_layers": "model.aggregator.num_layers",
    "model.num_heads": "model.aggregator.num_heads",
    "model.dropout": "model.aggregator.dropout",
    "model.time_embedding": "model.aggregator.time_embedding",
    "model.predictor_hidden": "model.predictor.hidden",
    "model.projector_dim": "model.projector.dim",
    "model.projector_hidden": "model.projector.hidden",
    "model.projector_norm": "model.projector.unit",
    "target.sharpening": "target.sharpening.kind",
    "target.temperature": "target.sharpening.temperature",
    "target.center_momentum": "target.sharpening.center_momentum",
    "target.update": "optim.kind",
    "objective.prediction": "objective.prediction.kind",
    "objective.prediction_weight": "objective.prediction.weight",
    "objective.temperature": "objective.prediction.temperature",
    "rate.weight": "objective.rate.weight",
    "rate.target": "objective.rate.features",
    "rate.normalize": "objective.rate.normalize",
    "rate.alpha": "objective.rate.scale.alpha",
    "rate.eps": "objective.rate.scale.eps",
    "sigreg.weight": "objective.sigreg.weight",
    "sigreg.num_slices": "objective.sigreg.num_slices",
    "vicreg.variance": "objective.variance.weight",
    "vicreg.covariance": "objective.covariance.weight",
    "actions.full": "sequence.full_actions",
    "objective.symmetric": "objective.reading.kind",
}

# values that were written in another form
WRITTEN: dict[str, Callable[[Any], Any]] = {
    "model.projector_norm": lambda norm: norm == "unit",
    "target.sharpening": lambda sharpened: "softmax" if sharpened else "none",
    "objective.symmetric": lambda both: "both" if both else "forward",
}
# fields that a sequence of version 4 had besides those of its kind, and that had no effect then
OF_KIND = {
    "rotation": {"angles"},
    "affine": {"rotation", "translation", "scale", "padding"},
    "augment": {
        *("crop_area", "crop_ratio", "flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale"),
        *("blur", "blur_sigma", "solarize"),
    },
}


def migrated(config: dict[str, Any]) -> dict[str, Any]:
    """A config of version 4 or 5, or a part of one, under current names; a current config unchanged."""
    sections = {name: values for name, values in config.items() if isinstance(values, dict)}
    old = {f"{name}.{key}": value for name, values in sections.items() for key, value in values.items()}
    old = {name: value for name, value in old.items() if name in NEW_NAMES and not isinstance(value, dict)}
    if not old:
        return config
    new: dict[str, Any] = {
        name: {key: value for key, value in values.items() if f"{name}.{key}" not in old}
        for name, values in sections.items()
        if name not in ("rate", "sigreg", "vicreg")
    }
    new |= {name: value for name, value in config.items() if not isinstance(value, dict)}
    for name, value in old.items():
        if value is not None and name not in ("target.update", "rate.alpha", "rate.eps", "actions.full"):
            _put(new, NEW_NAMES[name], WRITTEN.get(name, lambda value: value)(value))
    if isinstance(new.get("target"), dict):  # null meant the default
        new["target"] = {name: value for name, value in new["target"].items() if value is not None}
    _migrate_model(new, old)
    _migrate_objective(new, old)
    _migrate_sequence(new, old)
    return new


def _put(config: dict[str, Any], field: str, value: Any) -> None:
    *sections, key = field.split(".")
    for section in sections:
        if not isinstance(config.get(section), dict):
            config[section] = {}
        config = config[section]
    config[key] = value


def _migrate_model(new: dict[str, Any], old: dict[str, Any]) -> None:
    """Drop what had no effect: the width of a ResNet, and a projector's settings without `projector_dim`."""
    if old.get("model.encoder") == "resnet18":
        new["model"]["encoder"].pop("width", None)
    if "model.projector_dim" in old:
        if old["model.projector_dim"] is None:
            new["model"]["projector"] = {"kind": "none"}
        else:
            new["model"]["projector"]["kind"] = "mlp"


def _migrate_objective(new: dict[str, Any], old: dict[str, Any]) -> None:
    """Write out what was implied: a prediction weight of 1 - SIGReg's, and eps = 0.5 for a rate of unit vectors."""
    weight = old.get("sigreg.weight")
    if weight and isinstance(weight, (int, float)) and old.get("objective.prediction_weight") is None:
        _put(new, "objective.prediction.weight", 1 - weight)
    scales = {kind: old.get(f"rate.{kind}") for kind in ("alpha", "eps")}
    if old.get("rate.normalize") == "unit" and scales["alpha"] is None:
        scales["eps"] = 0.5 if scales["eps"] is None else scales["eps"]
    for kind, value in scales.items():
        if value is not None:
            _put(new, "objective.rate.scale", {"kind": kind, kind: value})


def _migrate_sequence(new: dict[str, Any], old: dict[str, Any]) -> None:
    """Move `actions.full`, and drop fields of other kinds of sequences, which had no effect."""
    if old.get("actions.full"):
        _put(new, "sequence.full_actions", True)
    sequence = new.get("sequence")
    if isinstance(sequence, dict) and str(sequence.get("kind")) in OF_KIND:
        others = set().union(*(fields for kind, fields in OF_KIND.items() if kind != sequence["kind"]))
        new["sequence"] = {field: value for field, value in sequence.items() if field not in others}
