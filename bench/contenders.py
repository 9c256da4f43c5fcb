"""The objectives among which `records.py` searches for a recipe, and the settings that it tries for each."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple


class Contender(NamedTuple):
    """An objective, and the values of its settings whose every combination is tried: eight for each contender.

    Attributes:
        title: its name in the figure.
        words: words of the command line that choose the objective.
        swept: values to try, by the name of the setting.
        views: number V of views of a sequence.
    """

    title: str
    words: tuple[str, ...]
    swept: dict[str, tuple[float, ...]]
    views: int = 4

    @property
    def trials(self) -> list[tuple[str, ...]]:
        """Words of each trial."""
        chosen = product(*self.swept.values())
        return [tuple(f"{name}={value:g}" for name, value in zip(self.swept, values, strict=True)) for values in chosen]


RATES = (1e-3, 3e-3)  # learning rates
WEIGHTS = (20, 60, 120, 240)  # of the inference of actions
PROJECTED = ("model.projector.kind=mlp", "model.projector.dim=128", "model.projector.hidden=512")
ONLINE = ("target.kind=stop_gradient", *PROJECTED)
# EMP-SSL's: half the coding rate of the unit projections at each view position, against collapse
SPREAD = ("objective.rate.features=projections", "objective.rate.normalize=unit", "objective.rate.scale.kind=eps")
SPREAD += ("objective.rate.scale.eps=0.04", "objective.rate.weight=0.5")
TOGETHER = (*SPREAD, "objective.invariance.weight=200")
UNPREDICTED = ("objective.prediction.weight=0",)
INFERRED = ("model.inverse.kind=mlp",)
ALL = (*ONLINE, *TOGETHER, "objective.prediction.weight=50", *INFERRED)

CONTENDERS = {
    "ema": Contender("EMA teacher (seq-JEPA)", (), {"optim.lr": (5e-4, *RATES, 6e-3), "target.decay": (0.99, 0.996)}),
    "ema_rate": Contender(
        "EMA teacher, rate of agg (Exp A)", (), {"optim.lr": RATES, "objective.rate.weight": (0.003, 0.01, 0.03, 0.1)}
    ),
    "vicreg": Contender(
        "VICReg",
        (*ONLINE, *UNPREDICTED, "objective.invariance.distance=mse", "objective.variance.weight=25"),
        {"optim.lr": RATES, "objective.invariance.weight": (10, 25), "objective.covariance.weight": (1, 4)},
    ),
    "sigreg": Contender(
        "SIGReg, invariance, prediction",
        (
            *(*ONLINE, "objective.prediction.kind=mse"),
            *("objective.invariance.distance=mse", "objective.invariance.weight=1"),
        ),
        {"optim.lr": RATES, "objective.sigreg.weight": (0.02, 0.05, 0.1, 0.2)},
    ),
    "action_vicreg": Contender(
        "VICReg of predicted next views",
        (
            *("target.kind=shared", *PROJECTED, "objective.prediction.kind=mse", "objective.variance.weight=25"),
            *("objective.reading.kind=windows", "objective.reading.length=1"),
        ),
        {"optim.lr": RATES, "objective.prediction.weight": (10, 25), "objective.covariance.weight": (1, 4)},
    ),
    "rate_prediction": Contender(
        "rate, prediction",
        ("target.kind=shared", *PROJECTED, *SPREAD),
        {"optim.lr": RATES, "objective.prediction.weight": (50, 100, 200, 400)},
    ),
    "rate_invariance": Contender(
        "rate, invariance",
        (*ONLINE, *SPREAD, *UNPREDICTED),
        {"optim.lr": RATES, "objective.invariance.weight": (50, 100, 200, 400)},
    ),
    "rate_invariance_prediction": Contender(
        "rate, invariance, prediction",
        (*ONLINE, *TOGETHER),
        {"optim.lr": RATES, "objective.prediction.weight": (10, 30, 100, 200)},
    ),
    "rate_invariance_inverse": Contender(
        "rate, invariance, action",
        (*ONLINE, *TOGETHER, *UNPREDICTED, *INFERRED),
        {"optim.lr": RATES, "objective.inverse.weight": WEIGHTS},
    ),
    "rate_invariance_inverse_8": Contender(
        "rate, invariance, action, 8 views",
        (*ONLINE, *TOGETHER, *UNPREDICTED, *INFERRED, "sequence.num_observed=7", "data.batch_size=64"),
        {"optim.lr": RATES, "objective.inverse.weight": WEIGHTS},
        views=8,
    ),
    "all_4": Contender(
        "rate, invariance, action, prediction", ALL, {"optim.lr": RATES, "objective.inverse.weight": WEIGHTS}
    ),
    "all_4_prefixes": Contender(
        "rate, invariance, action, prediction of each view\nfrom all before it",
        (*ALL, "objective.reading.kind=prefixes"),
        {"optim.lr": RATES, "objective.inverse.weight": WEIGHTS},
    ),
    "all_4_pairs": Contender(
        "rate, invariance, action, prediction of each view\nfrom the one before",
        (*ALL, "objective.reading.kind=windows", "objective.reading.length=1"),
        {"optim.lr": RATES, "objective.inverse.weight": WEIGHTS},
    ),
    "all_8": Contender(
        "rate, invariance, action, prediction, 8 views",
        (*ALL, "sequence.num_observed=7", "data.batch_size=64"),
        {"optim.lr": RATES, "objective.inverse.weight": WEIGHTS},
        views=8,
    ),
    "all_16": Contender(
        "rate, invariance, action, prediction, 16 views",
        (*ALL, "sequence.num_observed=15", "data.batch_size=64"),
        {"optim.lr": RATES, "objective.inverse.weight": WEIGHTS},
        views=16,
    ),
}
