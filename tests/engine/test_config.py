"""Composition, validation, and errors that fit on one line."""

import subprocess
import sys

import pytest
import yaml

from seqjepa.configs.compose import CONFIGS, dump, run_configs
from seqjepa.configs.errors import InputError
from seqjepa.configs.help import help_page
from seqjepa.configs.section import kinds_of
from seqjepa.engine.config import Config, compose
from seqjepa.engine.train import USAGE, main

RUN_CONFIGS = [CONFIGS.parent / name for name in run_configs()]


def test_layers_merge_left_to_right_then_overrides(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.1, betas: [0.5, 0.6]}\nrun: {epochs: 3}")
    (tmp_path / "b.yaml").write_text("optim: {lr: 0.2}\n")
    composed = compose(["run.epochs=7", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "optim.betas=[0.1,0.2]"])
    config = composed.config
    assert (config.optim.lr, config.run.epochs, config.optim.betas) == (0.2, 7, [0.1, 0.2])  # lists replace
    assert composed.origin("optim.lr") == str(tmp_path / "b.yaml")
    assert composed.origin("run.epochs") == "override run.epochs=7"
    assert composed.origin("run.seed") is None


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda p: p.stem)
def test_every_config_composes(path):
    grids = path.stem.startswith("jepa") or path.stem.startswith("arc_")
    base = [] if path.parent.name == "data" else [f"configs/data/{'arc_programs' if grids else 'cifar10_rot'}.yaml"]
    compose([*base, str(path)])


@pytest.mark.parametrize("tier", ["smoke", "quick", "lite"])
@pytest.mark.parametrize("variant", ["baseline", "stopgrad"])
def test_tiers_have_the_sizes_and_thresholds_of_the_reference_code(tier, variant):
    words = ["configs/data/cifar10_rot.yaml", f"configs/tier/{tier}.yaml", f"configs/variant/{variant}.yaml"]
    config = compose(words).config
    # epochs, batch, images to train and to test, least accuracy and R²
    sizes = {
        "smoke": (1, 16, 128, 64, 12.0, -0.3),
        "quick": (5, 64, 5000, 1000, 20.0, 0.0),
        "lite": (10, 128, 20_000, 2000, 30.0, 0.1),
    }
    floors = {
        rule.metric: rule.min for rule in reversed(config.active_rules) if rule.min is not None and not rule.minus
    }
    data = config.data
    assert sizes[tier] == (
        config.run.epochs,
        data.batch_size,
        data.train_subset,
        data.val_subset,
        floors["online_linacc_test"],
        floors["online_r2_test"],
    )
    assert (config.optim.lr, config.optim.schedule, config.optim.weight_decay) == (1e-3, "constant", 0.0)
    assert (config.target.kind, getattr(config.target, "decay", None)) == {
        "baseline": ("ema", 0.996),
        "stopgrad": ("stop_gradient", None),
    }[variant]


def test_a_printed_config_is_a_config(tmp_path, capsys):
    words = ["configs/smoke.yaml", "configs/variant/stopgrad.yaml", "optim.lr=1e-2"]
    assert main([*words, "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert compose([str(tmp_path / "again.yaml")]).config == compose(words).config
    assert yaml.safe_load(printed)["optim"]["lr"] == 0.01


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["optim.l=1"],
            ["override optim.l=1", "optim.l = 1", "unknown key, did you mean lr?", "weight_decay"],
        ),
        (["optm.lr=1"], ["optm = {'lr': 1}", "did you mean optim?"]),
        (["optim.lr=abc"], ["override optim.lr=abc", "optim.lr = 'abc'", "must be a number >= 0"]),
        (["optim.lr=-1"], ["optim.lr = -1", "must be a number >= 0"]),
        (["run.epochs=1.5"], ["run.epochs = 1.5", "must be a whole number >= 1"]),
        (["run.epochs=true"], ["run.epochs = True", "must be a whole number >= 1"]),
        (["run.seed=4294967296"], ["run.seed = 4294967296", "< 4294967296"]),
        (["run.deterministic=2"], ["run.deterministic = 2", "must be true or false"]),
        (["run.deterministic=true", "run.compile=default"], ["run.compile = 'default'", "turns compile off"]),
        (["run.threads=0"], ["override run.threads=0", "must be auto or 1 to 1024"]),
        (
            ["data.dataset=imagenet"],
            ["data.dataset = 'imagenet'", "must be digits|cifar10|cifar100|mnist|imagefolder"],
        ),
        (["target.kind=magic"], ["target.kind = 'magic'", "must be ema|stop_gradient"]),
        (
            ["target.kind=stop_gradient", "target.decay=0.9"],
            ["override target.decay=0.9", "only applies with target.kind=ema (it is stop_gradient)"],
        ),
        (
            ["sequence.kind=rotation", "sequence.angles=[0,45]"],
            ["sequence.angles = [0, 45]", "45 is not a multiple of 90"],
        ),
        (["rate.eps=0.5"], ["override rate.eps=0.5: rate.eps is objective.rate.scale.eps now"]),
        (["model.encoder=resnet18"], ["override model.encoder=resnet18: model.encoder is model.encoder.kind now"]),
        (["model.encoder.kind=resnet18", "model.encoder.width=4"], ["only applies with model.encoder.kind=convnet"]),
        (["sequence.scale=[1.0,0.5]"], ["sequence.scale = [1.0, 0.5]", "must be [lowest, highest]"]),
        (["optim.betas=[0.9]"], ["optim.betas = [0.9]", "must be a list of 2 numbers"]),
        (["optim.min_lr=1.0"], ["optim.min_lr = 1.0", "at most optim.lr"]),
        (["run=3"], ["override run=3", "must be a section"]),
        (["optim.accumulate=5"], ["optim.accumulate = 5", "does not divide data.batch_size"]),
        (
            ["data.batch_size=64", "data.train_subset=32"],
            ["data.batch_size = 64", "larger than data.train_subset = 32"],
        ),
        (
            ["model.aggregator.kind=transformer", "model.aggregator.num_heads=7"],
            ["model.aggregator.num_heads = 7", "does not divide the token width"],
        ),
        (["gates.enforce=true", "data.name=other"], ["gates.enforce", "no rules for data.name = other"]),
        (["control.enabled=false"], ["override control.enabled=false", "a gate requires a margin"]),
        (
            ["gates.rules.digits_affine=[{metric: online_r2_test}]"],
            ["gates.rules.digits_affine.0.metric", "needs min, max or margin"],
        ),
        (["optim.lr=.inf"], ["override optim.lr=.inf", "must be a number >= 0"]),
        (
            ["gates.rules.digits_affine=[{metric: val_loss, min: .nan}]"],
            ["gates.rules.digits_affine.0.min", "must be a number"],
        ),
        (["optim.lr=???"], ["override optim.lr=???: optim.lr = '???': a value is missing"]),
        (["gates.rules=[1]"], ["override gates.rules=[1]", "do not merge"]),
        (["run.epochs={a: 1}"], ["override run.epochs={a: 1}: run.epochs", "must be a whole number"]),
        (["sequence.translation=[0.2,0.8]"], ["sequence.translation = [0.2, 0.8]: must be a list of 2 whole numbers"]),
        (["run.name=.."], ["run.name = '..'"]),
        (["data.batch_size=32", "optim.accumulate=32"], ["optim.accumulate = 32", "batch norm needs at least two"]),
        (["confgs/smoke.yaml"], ["confgs/smoke.yaml: no such config file; did you mean configs/smoke.yaml?"]),
        (["run.epochs"], ["run.epochs: no such config file; nearest are", "--help", "section.key=value"]),
        (["--epochs"], ["--epochs: unknown option"]),
        (["=1"], ["not of the form section.key=value"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in str(value) else None,
)
def test_wrong_input_is_one_line_and_exit_code_2(words, parts, capsys):
    files = [] if any(w.endswith(".yaml") for w in words) else ["configs/smoke.yaml"]
    assert main([*files, *words]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    assert "Traceback" not in out + error
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: [a\n", "line 2: not readable as YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: 1\na: 2\n", "not readable as YAML"),
    ],
)
def test_wrong_files_are_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}:" in error
    assert message in error


def test_every_mistake_gets_a_line():
    with pytest.raises(InputError) as caught:
        compose(["configs/smoke.yaml", "optim.lr=-1", "run.epochs=0", "model.foo=1"])
    assert len(str(caught.value).splitlines()) == 3


def fields_of(section, prefix=""):
    """Every field that holds no section, by its dotted name, also those of kinds that are not the default."""
    for key, field in section.model_fields.items():
        if kinds := kinds_of(field.annotation):
            for kind in kinds:
                yield from fields_of(kind, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", field


def test_help_lists_every_field_with_its_doc():
    page = help_page(USAGE, Config)
    for name, field in fields_of(Config):
        assert f"  {name} = " in page
        if not name.endswith(".kind"):  # each kind has a doc of its own
            assert field.description.split()[0] in page
    assert "optim.lr = 0.0004   [a number >= 0]" in page
    assert "run.epochs = 1   [a whole number >= 1]" in page
    assert max(map(len, page.splitlines())) <= 240


def test_help_and_errors_do_not_wait_for_torch():
    code = (
        "import sys; from seqjepa.engine.train import USAGE, main; main(['--help']); main(['optim.lr=x']);"
        "assert not {'torch', 'wandb', 'accelerate', 'matplotlib'} & set(sys.modules), 'slow imports'"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "name", ["4711", "6e7", "007", "1_000", "0x1f", "1:30", "yes", "True", "2020-01-01", "1.50", "-.5e3"]
)
def test_text_stays_as_it_was_written(name, tmp_path):
    """Where a field asks for text YAML's numbers, booleans and dates are none; what is saved reads back."""
    (tmp_path / "by_hand.yaml").write_text(f"run: {{name: {name}}}\ntracking: {{group: {name}}}\n")
    for words in ([f"run.name={name}", f"tracking.group={name}"], [str(tmp_path / "by_hand.yaml")]):
        config = compose(["configs/smoke.yaml", *words]).config
        assert (config.run.name, config.tracking.group) == (name, name)
        (tmp_path / "config.yaml").write_text(dump(config))
        assert compose([str(tmp_path / "config.yaml")]).config == config
    assert compose(["configs/smoke.yaml", "tracking.group=null"]).config.tracking.group is None


@pytest.mark.parametrize("name", ["4711", "on", "1.0", "1", "null", "2020-01-01", "0x1f"])
def test_keys_and_lists_stay_as_they_were_written(name, tmp_path):
    """A task may have any name, and a rule any metric; 1 and on would even be one key."""
    rules = f"{{{name}: [{{metric: {name}, minus: {name}, min: 1}}], yes: []}}"
    if name == "null":  # of minus it is the default
        rules = rules.replace("metric: null, minus: null", "metric: 'null'")
    (tmp_path / "by_hand.yaml").write_text(f"data: {{name: '{name}'}}\ngates:\n  rules: {rules}\n")
    for words in ([f"data.name='{name}'", f"gates.rules={rules}"], [str(tmp_path / "by_hand.yaml")]):
        config = compose(["configs/smoke.yaml", *words]).config
        assert config.gates.rules.keys() >= {name, "yes"}
        (rule,) = config.active_rules
        assert (rule.metric, rule.minus) == (name, None if name == "null" else name)
        (tmp_path / "config.yaml").write_text(dump(config))
        assert compose([str(tmp_path / "config.yaml")]).config == config


def test_numbers_without_a_point_are_numbers(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 3e-4, min_lr: 1E-6, weight_decay: 1e2, warmup_epochs: .5}\n")
    optim = compose([str(tmp_path / "a.yaml"), "optim.clip_norm=+2.e+1"]).config.optim
    assert (optim.lr, optim.min_lr, optim.weight_decay) == (3e-4, 1e-6, 100.0)
    assert (optim.warmup_epochs, optim.clip_norm) == (0.5, 20.0)


def test_a_method_is_put_beside_lejepa():
    def beside(*words):
        rows = compose(
            ["configs/data/arc_programs.yaml", "configs/variant/jepa_lejepa.yaml", *words]
        ).config.beside_lejepa
        return {name: here for name, here, alike in rows if not alike}

    assert beside() == {}
    assert beside("objective.sigreg.weight=0.2") == {
        "weights": "one for each of 2 terms"
    }  # 0.7 and 0.2 are no shares of one
    assert beside("optim.clip_norm=1", "run.precision=fp32") == {"heuristics": "clipped gradients", "precision": "fp32"}
    easy_first = beside("data.fixed_views=true", "data.curriculum.kind=competence")
    assert easy_first == {"heuristics": "a curriculum"}
    analysed = beside("configs/variant/jepa_production.yaml")
    assert analysed["teacher"] == "EMA"
    assert analysed["terms"] == "prediction, sigreg, commitment, relational, recoloured, shifted, mirrored"
    helps = ("no gradient through the target", "a queue", "a learnt scale", "codes in the path", "early stopping")
    assert analysed["heuristics"] == ", ".join(helps)


@pytest.mark.parametrize(("variant", "count"), [("jepa_lejepa", 4), ("jepa_production", 23)])
def test_the_numbers_of_a_method_are_counted(variant, count):
    """LeJEPA's are two weights, the slices of SIGReg and the views of context."""
    numbers = compose(["configs/data/arc_programs.yaml", f"configs/variant/{variant}.yaml"]).config.method_numbers
    assert len(numbers) == count
    assert numbers["objective.reading.length"] == 3
    assert numbers["objective.sigreg.weight"] == (0.3 if variant == "jepa_lejepa" else 0.0002)
    assert ("target.decay" in numbers) == (variant == "jepa_production")
    assert not [name for name in numbers if name.startswith(("optim", "objective.rate"))]
