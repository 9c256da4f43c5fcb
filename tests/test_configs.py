"""configs/README.md against the reference code's table: each row gives the hyperparameters of the reference code."""

import re
from pathlib import Path

import pytest

from seqjepa.configs.compose import CONFIGS
from seqjepa.engine.config import compose

ROWS = re.findall(r"^\| (\S+/\S+) \| `([^`]+)` \|$", (CONFIGS / "README.md").read_text(), re.MULTILINE)
TABLE = dict(ROWS)

# the reference code's table of configs, transcribed: data, images to train and test (None: all), batch, epochs, EMA,
# rate, decay, schedule, warm-up, last rate, thresholds of accuracy and R², and where they are not (0, False, False)
# the weight of the coding rate, whether symmetric, whether sharpened
ADAM = (1e-3, 0.0, "constant", 0, None)
QUICK, LITE = ("cifar10_rot", 5000, 1000, 64, 5), ("cifar10_rot", 20000, 2000, 128, 10)
SMOKE, MNIST = ("cifar10_rot", 128, 64, 16, 1), (10000, 2000, 64, 20)
STEP2 = (4e-4, 1e-3, "cosine", 5, 1e-5, 10.0, 0.1)
REMOTE = ("cifar100_aug", None, None, 128, 30)
COSINE = (1e-3, 0.0, "cosine", 2, 1e-5)
EXPECTED = {
    "archive/remote/cifar100_aug_baseline_10ep": ("cifar100_aug", None, None, 128, 10, True, *ADAM, 5.0, 0.05),
    "local/cifar100_aug_baseline_gate": (
        *("cifar100_aug", None, None, 128, 30, True),
        *(4e-4, 1e-3, "cosine", 10, 1e-5, 23.0, 0.45),
    ),
    "quick/cifar100_aug_quick": ("cifar100_aug", 5000, 1000, 64, 5, True, *ADAM, 2.0, 0.0),
    "quick/cifar100_aug_smoke": ("cifar100_aug", 128, 64, 16, 1, False, *ADAM, 1.0, -0.3),
    "quick/cifar10_rot_baseline": ("cifar10_rot", 20000, 2000, 128, 10, True, *ADAM, 30.0, 0.1),
    "quick/cifar10_rot_quick": ("cifar10_rot", 5000, 1000, 64, 5, True, *ADAM, 20.0, 0.0),
    "quick/cifar10_rot_smoke": ("cifar10_rot", 128, 64, 16, 1, False, *ADAM, 12.0, -0.3),
    "remote/cifar100_aug_baseline": (
        *("cifar100_aug", None, None, 128, 200, True),
        *(4e-4, 1e-3, "cosine", 10, 1e-5, 5.0, 0.1),
    ),
    "remote/cifar100_aug_paper": (
        *("cifar100_aug", None, None, 512, 2000, True),
        *(4e-4, 1e-3, "cosine", 20, 1e-5, None, None),
    ),
    "remote/cifar10_rot_baseline": ("cifar10_rot", 20000, 2000, 128, 10, True, *ADAM, 30.0, 0.1),
    "remote/step2_exp_a_ema_rate": ("cifar100_aug", None, None, 512, 30, True, *STEP2, 0.01),
    "remote/step2_exp_b_teacherless": ("cifar100_aug", None, None, 512, 30, False, *STEP2, 0.03),
    "step2/quick/cifar10_subspace_ema_rate": (*QUICK, True, *ADAM, 20.0, 0.0, 0.01),
    "step2/quick/exp_a_ema_rate_baseline": (*LITE, True, *ADAM, 30.0, 0.1, 0.01),
    "step2/quick/exp_a_ema_rate_quick": (*QUICK, True, *ADAM, 20.0, 0.0, 0.01),
    "step2/quick/exp_a_ema_rate_smoke": (*SMOKE, True, *ADAM, 12.0, -0.3, 0.01),
    "step2/quick/exp_b_stopgrad_baseline": (*LITE, False, *ADAM, 30.0, 0.1, 0.01),
    "step2/quick/exp_b_stopgrad_highrate_baseline": (*LITE, False, *ADAM, 30.0, 0.1, 0.1),
    "step2/quick/exp_b_stopgrad_quick": (*QUICK, False, *ADAM, 20.0, 0.0, 0.01),
    "step2/quick/exp_b_stopgrad_smoke": (*SMOKE, False, *ADAM, 12.0, -0.3, 0.01),
    "step2/quick/exp_b_stopgrad_warmup_baseline": (*LITE, False, 1e-3, 0.0, "cosine", 2, 1e-4, 30.0, 0.1, 0.03),
    "step2/quick/exp_c_symmetric_baseline": (*LITE, True, *COSINE, 30.0, 0.1, 0.01, True),
    "step2/quick/exp_d_sharpening_baseline": (*LITE, False, *COSINE, 30.0, 0.1, 0.03, False, True),
    "step2/quick/mnist_rot_only": ("mnist_rot", *MNIST, True, *ADAM, 80.0, 0.0, 0.01),
    "step2/quick/mnist_subspace_ema_rate": ("mnist_affine", *MNIST, True, *ADAM, 80.0, 0.0, 0.01),
    "step2/remote/exp_a_ema_rate_baseline": (*REMOTE, True, *ADAM, 5.0, 0.05, 0.01),
    "step2/remote/exp_b_stopgrad_baseline": (*REMOTE, False, *ADAM, 5.0, 0.05, 0.01),
}
DATASETS = {"cifar100_aug": "cifar100", "cifar10_rot": "cifar10", "mnist_affine": "mnist", "mnist_rot": "mnist"}


def resolve(words):
    return compose([w if "=" in w else f"configs/{w}.yaml" for w in words.split()]).config


def test_every_config_of_the_reference_code_is_mapped():
    assert len(TABLE) == len(ROWS) == 27
    assert TABLE.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", TABLE)
def test_rows_resolve(name):
    config = resolve(TABLE[name])
    assert DATASETS[config.data.name] == config.data.dataset
    # constant in all files of the reference code
    assert (config.run.seed, config.data.subset_seed, config.sequence.num_observed) == (42, 42, 3)
    assert (config.model.encoder.kind, config.model.aggregator.num_heads) == ("resnet18", 4)
    assert config.probes.lr == 1e-3
    small = config.data.dataset == "mnist"
    model = (config.model.action_dim, config.model.aggregator.num_layers, config.model.predictor.hidden)
    assert model == ((64, 2, 512) if small else (128, 3, 1024))


@pytest.mark.parametrize("name", EXPECTED)
def test_hyperparameters_equal_those_of_the_reference_code(name):
    config = resolve(TABLE[name])
    optim, gate = config.optim, {}
    for rule in config.active_rules:
        if rule.minus is None and rule.min is not None:
            gate[rule.metric] = rule.min
    found = (
        *(config.data.name, config.data.train_subset, config.data.val_subset, config.data.batch_size),
        *(config.run.epochs, config.target.kind == "ema"),
        *(optim.lr, optim.weight_decay, optim.schedule, optim.warmup_epochs),
        optim.min_lr if optim.schedule == "cosine" else None,
        *(gate.get("online_linacc_test"), gate.get("online_r2_test")),
        *(
            config.objective.rate.weight,
            config.objective.reading.kind == "both",
            config.target.sharpening.kind == "softmax",
        ),
    )
    expected = EXPECTED[name]
    assert found == expected + (0.0, False, False)[len(expected) - 13 :]
    rate, sharpening = config.objective.rate, config.target.sharpening
    if rate.weight:  # constant where the rate is on
        assert (rate.features, rate.normalize, rate.scaling) == ("agg", "none", {"alpha": 1.0})
    if sharpening.kind == "softmax":
        assert (sharpening.temperature, sharpening.center_momentum) == (0.04, 0.9)
    if config.target.kind == "ema":
        assert (config.target.decay, config.target.schedule, config.target.buffers) == (0.996, "constant", "ignore")


def test_sequences_equal_those_of_the_reference_code():
    aug = resolve("data/cifar100_aug").sequence
    assert (aug.crop_area, aug.crop_ratio, aug.flip) == ([0.2, 1.0], [3 / 4, 4 / 3], 0.5)
    assert (aug.jitter, aug.brightness, aug.contrast) == (0.8, [0.6, 1.4], [0.6, 1.4])
    assert (aug.saturation, aug.hue, aug.grayscale) == ([0.8, 1.2], [-0.1, 0.1], 0.2)
    assert (aug.blur, aug.blur_sigma, aug.solarize) == ([1.0, 0.1], [0.1, 2.0], [0.0, 0.2])
    multi, turned = resolve("data/mnist_affine").sequence, resolve("data/mnist_rot").sequence
    assert (multi.rotation, multi.translation, multi.scale) == ([-75.0, 75.0], [-7, 7], [0.5, 1.0])
    assert (turned.rotation, turned.translation, turned.scale) == ([-180.0, 180.0], [0, 0], [1.0, 1.0])
    cifar = resolve("data/cifar_affine").sequence
    assert (cifar.rotation, cifar.translation, cifar.scale, cifar.padding) == (
        *([-30.0, 30.0], [-4, 4], [0.8, 1.2]),
        "reflect",
    )


@pytest.mark.parametrize("folder", ["tier", "variant"])
def test_the_tables_name_them_all(folder):
    table = (CONFIGS / "README.md").read_text().split(f"| {folder} |")[1].split("\n\n")[0]
    named = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == {Path(path).stem for path in (CONFIGS / folder).glob("*.yaml")}
