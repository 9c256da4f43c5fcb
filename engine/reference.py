"""Checkpoints of the authors' code (github.com/hafezgh/seq-jepa, SeqJEPA_Transforms and SeqJEPA_PLS) as ours."""

import math
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs.errors import InputError, first_line, shown
from ..configs.files import to_json, write_atomically
from ..loaders.images import find_dataset
from ..loaders.sequences import build_sequence
from .config import Config, compose
from .encoder import Description, Encoder
from .models.heads import build_encoder
from .models.seq_jepa import SeqJEPA
from .reports.card import without_paths
from .runs.checksums import seal
from .runs.state import VERSION, Best, PixelFacts, Position, TrainingState, Waiting
from .runs.tensors import load_model, rng_tensors, save_tensors, under

WEIGHTS_OF = ("model", "model_state", "model_state_dict", "state_dict")  # under which a file has its weights
# modules that the authors' programs hang on the network; every evaluation fits its own
PROBES = re.compile(r"(online_\w+|\w+_regressor|\w+_classifier)\.")
# names there, and here; the encoder's follow from its kind
NAMES = {
    r"action_proj\.0\.": "action_embedding.linear.",
    r"action_proj\.1\.": "action_embedding.norm.",
    r"agg_token$": "aggregator.token",
    r"transformer_encoder\.transformer_encoder\.layers\.": "aggregator.layers.",
    r"transformer_encoder\.norm\.": "aggregator.norm.",
    r"predictor\.": "predictor.layers.",
}


class Reference(NamedTuple):
    """A checkpoint of the authors' code."""

    encoder: Encoder
    config: Config
    tensors: dict[str, Tensor]  # of the whole network, by our names
    epoch: int
    num_actions: int | None  # numbers in an action; None if the network has none


def read_reference(path: Path, words: list[str], pixels: dict[str, list[float]], size: int | None) -> Reference:
    """Read a checkpoint whose network is inferred from the shapes of its weights.

    Args:
        path: the file, as torch.save wrote it; nothing in it is executed.
        words: config files and settings that say what it was trained on; model and target follow from the file.
        pixels: mean and std of the images, if they are not the published ones of `data.dataset`.
        size: height and width of the images, if they are not the dataset's.

    Raises:
        InputError: the file is none of the authors' checkpoints, or mean, std or size are unknown.
    """
    if not words:
        raise InputError("the data that it was trained on are needed, such as configs/data/cifar100_aug.yaml")
    of_file = [word for word in words if word.startswith(("model.", "target."))]
    if contrary := [word for word in of_file if not word.startswith("model.aggregator.num_heads=")]:
        raise InputError(f"{contrary[0]}: the file decides model and target, but for model.aggregator.num_heads")
    given, epoch = _weights(path)
    found = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    found = {name: tensor for name, tensor in found.items() if not PROBES.match(name)}
    if missing := {"encoder.conv1.weight", "agg_token", "predictor.0.weight"} - found.keys():
        raise InputError(f"{shown(path)}: no checkpoint of the authors' code ({min(missing)} is missing)")
    if "predictor.3.weight" not in found:
        raise InputError(f"{shown(path)}: its predictor is one layer (pred_hidden=0), which this network does not have")
    shapes = {"encoder.conv1.weight": 4, "agg_token": 3, "predictor.0.weight": 2, "action_proj.0.weight": 2}
    for name, dimensions in shapes.items():
        if name in found and found[name].ndim != dimensions:
            raise InputError(f"{shown(path)}: {name} is {list(found[name].shape)}, not of {dimensions} dimensions")
    if found["agg_token"].shape[-1] > 512 and "action_proj.0.weight" not in found:
        raise InputError(f"{shown(path)}: its actions are not embedded (learn_act_emb=0), as they are in this network")
    small = found["encoder.conv1.weight"].shape[-1] == 3
    settings = ["model.encoder.kind=resnet18"]
    if not small:
        settings = ["model.encoder.kind=timm", "model.encoder.name=resnet18", "model.encoder.stem=imagenet"]
    layers = {
        name.split(".")[3] for name in found if name.startswith("transformer_encoder.transformer_encoder.layers.")
    }
    settings += ["model.aggregator.kind=transformer", f"model.aggregator.num_layers={len(layers)}"]
    settings += ["model.predictor.kind=mlp", f"model.predictor.hidden={len(found['predictor.0.weight'])}"]
    settings += [
        f"target.kind={'ema' if any(name.startswith('target_encoder.') for name in found) else 'stop_gradient'}"
    ]
    embedding = found.get("action_proj.0.weight")
    acts = str(embedding is not None).lower()
    settings += [f"model.aggregator_action={acts}", f"model.predictor_action={acts}"]
    if embedding is not None:
        settings += [f"model.action_dim={len(embedding)}"]
    config = compose([*words, *settings]).config
    if config.sequence.kind == "augment":
        config = compose([*words, *settings, "actions.normalization=view_l2"]).config  # as in the authors' code
    tensors = {_ours(name, small): tensor for name, tensor in found.items()}
    network = build_encoder(config.model)
    try:
        load_model(network, under("encoder.", tensors))
    except InputError as error:
        raise InputError(f"{shown(path)}: {error}") from None
    description = Description(model=config.model, pixels=_pixels(config, pixels, size))
    actions = None if embedding is None else embedding.shape[1]
    return Reference(Encoder(network, description).eval(), config, tensors, epoch, actions)


def write_checkpoint(reference: Reference, folder: Path) -> str | None:
    """Write a checkpoint that `seqjepa eval` reads; it cannot be resumed, because it has no state of an optimiser.

    Args:
        reference: what `read_reference` returned.
        folder: to write to; it is made.

    Returns:
        None, or a line that says why these data do not suit the network, and then nothing is written.
    """
    config, pixels = reference.config, reference.encoder.description.pixels
    size = pixels.size[0], pixels.size[1]
    actions = build_sequence(config.sequence, size, config.actions).action_space
    if reference.num_actions not in (None, actions.dim):
        has = f"its actions have {reference.num_actions} numbers, those of sequence.kind={config.sequence.kind}"
        return f"{has} {actions.dim}: the encoder is exported, and no checkpoint for `seqjepa eval`"
    model = SeqJEPA(config.model, config.target, actions)
    load_model(model, reference.tensors)
    state = TrainingState(
        version=VERSION,
        position=Position(reference.epoch),
        best=Best(segment=0, value=None, metrics={}),
        final={},
        patience=Waiting(best=None, waited=0),
        seconds=0,
        train_seconds=0,
        images="unknown",
        wandb_id=None,
        commit=None,
        config=without_paths(config.model_dump()),
        pixels=pixels,
    )
    folder.mkdir(parents=True)
    contents = {"model": model.state_dict(), "probes": {}, "trainer": {}, "rng-00000": rng_tensors()}
    for name, tensors in contents.items():
        save_tensors(tensors, folder / f"{name}.safetensors")
    write_atomically(folder / "state.json", to_json(state.model_dump(mode="json"), indent=1) + "\n")
    seal(folder)
    return None


def _weights(path: Path) -> tuple[dict[str, Tensor], int]:
    """The weights in a file, and the number of epochs that it says."""
    try:
        said: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read ({error.strerror or first_line(error)})") from None
    except pickle.UnpicklingError:
        wanted = "torch.save(model.state_dict(), FILE) makes one with weights alone"
        raise InputError(f"{shown(path)}: no weights by torch.save, or other Python objects too; {wanted}") from None
    except Exception as error:  # a damaged file raises errors of any kind
        raise InputError(f"{shown(path)}: no file of weights by torch.save ({first_line(error)})") from None
    found = next((said[name] for name in WEIGHTS_OF if name in said), said) if isinstance(said, dict) else said
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise InputError(f"{shown(path)}: holds no weights, neither at its top nor under {', '.join(WEIGHTS_OF)}")
    epoch = said.get("epoch", 0)
    return found, epoch if isinstance(epoch, int) and epoch >= 0 else 0


def _ours(name: str, small: bool) -> str:
    """Our name of a weight."""
    inside = "" if small else "network."
    encoders = {r"encoder\.": f"encoder.{inside}", r"target_encoder\.": f"target.teacher.{inside}"}
    for theirs, ours in (encoders | NAMES).items():
        if re.match(theirs, name):
            return re.sub(f"^{theirs}", ours, name)
    return name


def _pixels(config: Config, given: dict[str, list[float]], size: int | None) -> PixelFacts:
    dataset = find_dataset(config.data.dataset)
    side = size or dataset.side or config.data.size
    published = dict(zip(("mean", "std"), dataset.statistics or (), strict=False))
    channels = 3  # of the authors' encoder
    for name, values in given.items():
        if len(values) != channels or not all(math.isfinite(value) for value in values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: {channels} finite numbers are expected")
    if not all(0 <= value <= 1 for value in given.get("mean", [])) or not all(0 < v <= 1 for v in given.get("std", [])):
        raise InputError("--mean and --std are of pixels from 0 to 1, and std is not 0")
    if size is not None and size < 8:
        raise InputError(f"--size {size}: 8 pixels or more are allowed")
    for name in ("mean", "std"):
        if name not in published | given:
            raise InputError(f"--{name} is needed: {dataset.name} has no published one")
    if side is None:
        raise InputError(f"--size is needed: images of {dataset.name} have any")
    mean, std = (list(given.get(name) or published[name]) for name in ("mean", "std"))
    return PixelFacts(mean=mean, std=std, size=[side, side], classes=[])
