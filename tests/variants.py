"""Objectives of different kinds, as words of a command line, for tests of a training step."""

OBJECTIVES = {
    "inferred": (
        *("objective.reading.kind=prefixes", "model.inverse.kind=mlp", "objective.inverse.weight=0.1"),
        *("target.kind=stop_gradient", "model.projector.kind=mlp", "objective.invariance.weight=1.0"),
        *("objective.rate.weight=0.1", "objective.rate.features=projections"),
    ),
    "symmetric": ("objective.reading.kind=both", "objective.rate.weight=0.1"),
    "sharpened": (
        "target.kind=stop_gradient",
        "target.sharpening.kind=softmax",
        "objective.prediction.kind=cross_entropy",
    ),
    "sigreg": (
        *("target.kind=shared", "objective.prediction.kind=mse", "model.projector.kind=mlp"),
        *("model.projector.dim=8", "model.projector.hidden=16"),
        *("objective.sigreg.weight=0.1", "objective.sigreg.num_slices=8"),
    ),
}
