"""Every kind that a config can choose is trained, saved, resumed, evaluated and described."""

import json
import math

import pytest

from seqjepa.configs.help import help_page
from seqjepa.configs.section import Built, by_kind, kinds_of
from seqjepa.engine.config import Config
from seqjepa.engine.evaluate import main as evaluate
from seqjepa.engine.objectives.config import ReadingConfig, ScaleConfig, ScopeConfig, TermConfig
from seqjepa.engine.train import USAGE, main
from seqjepa.loaders.config import CurriculumConfig

PROJECTED = ("model.projector.kind=mlp", "model.projector.dim=8", "model.projector.hidden=16")
STREAM = ("stream.tasks=2", "stream.steps=2", "optim.schedule=constant", "eval.every=1")
GRIDS = ("sequence.kind=program", "data.dataset=object_grids", "actions.normalization=none")
OBJECTS = (*GRIDS, "model.encoder.kind=grid_objects", "model.encoder.dim=16", "model.encoder.num_layers=1")
# what goes with a choice: what it needs to train a network in a second, and others that the same run trains
NEEDS = {
    "model.projector.kind=mlp": (*PROJECTED, "target.kind=shared"),
    "model.encoder.kind=resnet18": ("data.train_subset=32", "data.batch_size=16", "data.val_subset=16"),
    "sequence.kind=rotation": ("objective.prediction.kind=infonce",),
    "sequence.kind=augment": ("model.inverse.kind=mlp", "model.inverse.hidden=16", "objective.inverse.weight=0.1"),
    "target.kind=stop_gradient": ("objective.reading.kind=windows",),
    "model.aggregator.kind=mean": ("objective.reading.kind=both",),
    "model.aggregator.kind=tost": ("objective.reading.kind=prefixes",),
    "model.encoder.kind=timm": ("model.encoder.name=test_resnet", "model.encoder.input_size=24"),
    "target.sharpening.kind=softmax": ("target.sharpening.center_momentum=0.5",),
    "objective.prediction.kind=cross_entropy": ("target.sharpening.kind=softmax",),
    "objective.rate.scale.kind=eps": ("objective.rate.weight=0.1",),
    "objective.rate.scope.kind=nearest": (
        *("objective.rate.weight=0.1", "objective.rate.scope.count=5", "objective.rate.scale.kind=eps"),
    ),
    "objective.rate.scope.kind=images": (
        *("objective.rate.weight=0.1", "objective.rate.features=z"),
        *("objective.prediction.kind=cross_entropy", "target.sharpening.kind=softmax"),
    ),
    "objective.sigreg.weight=0.1": (*PROJECTED, "target.kind=shared", "objective.sigreg.num_slices=8"),
    "objective.variance.weight=0.1": (*PROJECTED, "target.kind=shared"),
    "objective.covariance.weight=0.1": (*PROJECTED, "target.kind=shared"),
    "objective.invariance.weight=0.1": (*PROJECTED, "target.kind=shared"),
    "objective.inverse.weight=0.1": ("model.inverse.kind=mlp", "model.inverse.hidden=16"),
    "model.inverse.kind=mlp": ("model.inverse.hidden=16", "objective.inverse.weight=0.1"),
    "model.encoder.kind=crate": (
        *("model.encoder.dim=32", "model.encoder.num_layers=1", "model.encoder.side=24"),
        *("model.aggregator.kind=crate", "model.predictor.kind=crate"),
    ),
    "sequence.kind=program": (*GRIDS[1:], "model.encoder.kind=grid_convnet", "model.encoder.width=4"),
    **{
        f"model.encoder.kind=grid_{kind}": (*GRIDS, f"model.encoder.{width}", *more)
        for kind, width, *more in (
            ("objects", "dim=16", "model.encoder.num_layers=1"),
            ("convnet", "width=4"),
            ("cells", "dim=16", "model.encoder.num_layers=1"),
        )
    },
    **{
        f"model.encoder.quantiser.kind={kind}": (*OBJECTS, *more)
        for kind, *more in (
            ("none",),
            ("ema", "model.encoder.quantiser.codes=8"),
            ("fsq", "model.encoder.quantiser.levels=[3,2]", "objective.commitment.weight=0.1"),
            ("gumbel", "model.encoder.quantiser.size=8", "objective.commitment.weight=0.1"),
        )
    },
    "objective.commitment.weight=0.1": (
        *OBJECTS,
        "model.encoder.quantiser.kind=ema",
        "model.encoder.quantiser.place=path",
    ),
    "objective.usage.weight=0.1": (
        *OBJECTS,
        "model.encoder.quantiser.kind=gumbel",
        "model.encoder.quantiser.place=path",
    ),
    **{f"objective.{term}.weight=0.1": OBJECTS for term in ("relational", "recoloured", "shifted", "mirrored")},
    "data.curriculum.kind=phases": (
        *(*OBJECTS, "data.fixed_views=true", "data.curriculum.until=[1]", "objective.recoloured.weight=0.1"),
        *("model.encoder.quantiser.kind=ema", "model.encoder.quantiser.codes=8"),
    ),
    "data.curriculum.kind=competence": (
        *(*OBJECTS, "data.fixed_views=true", "data.curriculum.start=0.5", "objective.usage.weight=0.1"),
        *("model.encoder.quantiser.kind=gumbel", "model.encoder.quantiser.place=path"),
    ),
    "objective.balance.kind=gradnorm": (
        *(*PROJECTED, "target.kind=shared", "objective.variance.weight=0.1", "objective.covariance.weight=0.1"),
        *("objective.invariance.weight=0.1", "objective.sigreg.weight=0.1", "objective.sigreg.num_slices=8"),
        *("objective.balance.every=1", "objective.balance.first=2"),
    ),
    "model.subspaces.kind=group": ("objective.equivariance.weight=0.1",),
    "objective.equivariance.weight=0.1": ("model.subspaces.kind=group", "model.neck.kind=linear", "model.neck.dim=16"),
    "stream.kind=classes": STREAM,
    "stream.kind=factors": ("stream.factors=[[rotation],[scale]]", *STREAM[1:]),
    **{
        f"stream.buffer.kind={kind}": ("stream.kind=classes", *STREAM, *more)
        for kind, more in {
            "none": (),
            "reservoir": ("stream.buffer.size=20",),
            "balanced": ("stream.buffer.size=20",),
            "coreset": ("stream.buffer.size=20",),
        }.items()
    },
    "objective.distillation.weight=0.1": ("model.memory.kind=encoder", "stream.kind=classes", *STREAM),
    "model.memory.kind=encoder": ("objective.distillation.weight=0.1", "stream.kind=classes", *STREAM),
    "model.local.kind=blocks": ("target.kind=shared", "objective.prediction.kind=mse", "objective.variance.weight=1"),
    "objective.rest.weight=0.1": (
        *("model.subspaces.kind=group", "model.neck.kind=linear", "model.neck.dim=16"),
        "objective.equivariance.weight=0.1",
    ),
}


def choices(section=Config, prefix=""):
    """Every kind of every field, and every term of the objective, as a word of the command line; and its section."""
    for name, field in section.model_fields.items():
        place = f"{prefix}{name}"
        for kind, chosen in by_kind(field.annotation).items():
            yield f"{place}.kind={kind}", chosen
        for inner in kinds_of(field.annotation):
            if issubclass(inner, TermConfig) and not by_kind(field.annotation):
                yield f"{place}.weight=0.1", inner
            yield from choices(inner, f"{place}.")


CHOICES = dict(choices())


def chosen_by_default(word):
    """Whether a run without settings has this kind."""
    place, _, kind = word.partition(".kind=")
    value = Config()
    for name in place.split("."):
        value = getattr(value, name, None)
    return getattr(value, "kind", None) == kind


def test_all_are_found():
    assert {word.partition("=")[0] for word in CHOICES} >= {
        *(f"model.{part}.kind" for part in ("encoder", "aggregator", "predictor", "projector", "inverse")),
        *(
            "objective.reading.kind",
            "sequence.kind",
            "target.kind",
            "target.sharpening.kind",
            "objective.prediction.kind",
        ),
        *(f"objective.{term}.weight" for term in ("invariance", "rate", "inverse", "sigreg", "variance", "covariance")),
    }


RARE = {f"model.encoder.kind={kind}" for kind in ("resnet18", "timm", "grid_cells", "grid_convnet")}
RARE |= {f"model.encoder.quantiser.kind={kind}" for kind in ("none", "fsq", "gumbel")}
RARE |= {"objective.commitment.weight=0.1", "objective.relational.weight=0.1", "model.aggregator.kind=weighted"}
RARE |= {"objective.shifted.weight=0.1", "objective.mirrored.weight=0.1"}
RARE |= {"stream.buffer.kind=reservoir", "stream.buffer.kind=balanced", "objective.distillation.weight=0.1"}

# what every run of these tests has that does not choose another
USUAL = {word for word in CHOICES if chosen_by_default(word)} | {
    "model.encoder.kind=convnet",
    "stream.buffer.kind=none",
}

# by themselves in `make test-slow`: what is chosen already or beside another choice, and what is rare
LONG = USUAL - {"target.kind=ema"} | RARE | {also for word in CHOICES.keys() - RARE for also in NEEDS.get(word, ())}


def chosen_in(word):
    """The choices of a command line: this one, and those that go with it."""
    return [word, *(also for also in NEEDS.get(word, ()) if also in CHOICES)]


def test_all_but_what_is_rare_are_trained():
    trained = {also for word in CHOICES.keys() - LONG for also in chosen_in(word)}
    assert trained | USUAL | RARE == CHOICES.keys()


def trained_by(word, tiny):
    """A command line that trains a tiny network with this choice."""
    small = ("data.train_subset=64", "data.val_subset=16", "control.enabled=false", "gates.rules.digits_affine=[]")
    return tiny(*small, other=(word, *NEEDS.get(word, ())))


@pytest.mark.parametrize("word", [pytest.param(w, marks=[pytest.mark.slow] if w in LONG else []) for w in CHOICES])
def test_a_kind_is_chosen_trained_resumed_and_evaluated(word, tiny, tmp_path, refused, capsys, blank_figures):
    train = trained_by(word, tiny)
    assert main([*train, "run.epochs=1"]) == 0
    blank_figures.undo()
    assert main([*train, "run.epochs=2", "run.resume=auto"]) == 0
    assert "resumed from" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1]["val_loss"] is not None

    for choice in chosen_in(word):
        field, other = another(choice, train)
        refused([*train, "run.epochs=3", "run.resume=auto", f"{field}={other}"], f"{field}: is {other}")

    assert evaluate([str(tmp_path / "run"), "eval.lengths=[1,2]", "eval.batch_size=16", "eval.renderings=1"]) == 0
    segment = "epoch" if rows[-1].get("task_cosine_1") is None else "segment"
    assert (tmp_path / "run" / "eval" / f"{segment}-0002-fast" / "eval.json").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("word", CHOICES)
def test_gpu_a_kind_is_trained_resumed_and_evaluated(word, tiny, tmp_path):
    train = [*trained_by(word, tiny), "run.device=cuda", "run.precision=bf16", "run.deterministic=false"]
    assert main([*train, "run.epochs=1"]) == 0
    assert main([*train, "run.epochs=2", "run.resume=auto"]) == 0
    assert evaluate([str(tmp_path / "run"), "eval.lengths=[1,2]", "eval.batch_size=16", "eval.renderings=1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [math.isfinite(row["val_loss"]) for row in rows] == [True, True]


def another(choice, words):
    """A setting of a kind, and another value than its default; a setting of the probes where the kind has none.

    Those that the command line sets already, as it does others of the same section, are left alone.
    """
    place = choice.partition("=")[0].rpartition(".")[0]
    for name, field in CHOICES[choice].model_fields.items():
        if isinstance(field.default, float) and f"{place}.{name}=" not in " ".join(words):
            return f"{place}.{name}", field.default / 2 + 0.125
    return "probes.hidden", 8


@pytest.mark.parametrize("word", CHOICES)
def test_a_kind_is_described(word):
    page, (field, _, kind), section = help_page(USAGE, Config), word.partition("="), CHOICES[word]
    place = field.rpartition(".")[0]
    if field.endswith(".kind"):
        assert f"      {kind}: {section.__doc__.split()[0]}" in page
    for name in section.model_fields:
        assert f"  {place}.{name} = " in page or f"  {place}.{name}: " in page or f"{place}.{name}.kind = " in page


@pytest.mark.parametrize("word", CHOICES)
def test_a_kind_names_a_class_of_its_own_room(word):
    section = CHOICES[word]
    if "made_by" in vars(section) or hasattr(section, "made_by"):
        room = section.__module__.rpartition(".")[0]
        assert section.implementation().__module__.startswith(f"{room}.")
    else:
        assert issubclass(section, Built)
        assert "build" in vars(section) or issubclass(
            section, (ScaleConfig, ScopeConfig, ReadingConfig, CurriculumConfig)
        )
