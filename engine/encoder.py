"""A trained encoder as a module that takes plain images, from a run, from an exported folder, or from the Hub."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..configs.errors import InputError, first_line
from ..configs.section import Section
from .evaluation.cases import read_network
from .models.config import ModelConfig
from .models.heads import build_encoder
from .runs.checkpoints import find_checkpoint
from .runs.state import PixelFacts
from .runs.tensors import load_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"  # files of an exported folder
ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")


class Description(Section):
    """What rebuilds an encoder, in an exported folder's config.json under the key `seqjepa`."""

    model: ModelConfig
    """The network it is a part of; only encoder and neck are built."""
    pixels: PixelFacts
    """The images it was trained on."""


class Encoder(nn.Module):
    """Turns images into features z, and keeps what it was trained on.

    Args:
        network: from normalised views [B, N, C, H, W] to features [B, N, D].
        description: how the network is built, and the mean and standard deviation of its images.

    Attributes:
        num_features: width D of the features.
        image_size: (height, width) of the images it was trained on.
        classes: names of the classes of these images.
        mean: mean of their pixels in [0, 1], float32 [C, 1, 1].
        std: standard deviation of their pixels, float32 [C, 1, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, description: Description):
        super().__init__()
        self.network = network
        self.description = description
        self.num_features = description.model.num_features
        self.sees = description.model.encoder.sees
        pixels = description.pixels
        self.image_size = pixels.size[0], pixels.size[1]
        self.classes = pixels.classes
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(pixels, name)).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [B, D].

        Args:
            images: [B, C, H, W], uint8 from 0 to 255 or floating-point from 0 to 1; gray ones may have one channel.
                An encoder of grids takes colours from 0 to 9, integers [B, H, W].

        Raises:
            ValueError: they have another shape, type or range.
        """
        if self.sees == "grids":
            if images.ndim != 3 or images.is_floating_point():
                raise ValueError(f"grids are {images.dtype} {list(images.shape)}: integers [B, H, W] are expected")
            pixels = images[:, None].to(self.mean.dtype)
        else:
            pixels = self._checked(images)
        return self.network(((pixels - self.mean) / self.std)[:, None])[:, 0].float()

    def _checked(self, images: Tensor) -> Tensor:
        """Images in [0, 1], with as many channels as the network sees."""
        channels = len(self.mean)
        if images.ndim != 4 or images.shape[1] not in (1, channels):
            raise ValueError(f"images are {list(images.shape)}: [B, {channels}, H, W] is expected")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: uint8, or floating-point from 0 to 1, is expected")
        elif images.device.type == "cpu" and not torch.compiler.is_compiling() and len(images):
            low, high = images.aminmax()
            if low < -1e-3 or high > 1 + 1e-3:
                raise ValueError(f"images are from {low:.3g} to {high:.3g}: from 0 to 1 is expected, or uint8")
        return images.to(self.mean.dtype).expand(-1, channels, -1, -1)


def load_encoder(place: str | Path) -> Encoder:
    """Load a trained encoder, on the CPU, in evaluation mode.

    Args:
        place: a run's folder, which stands for its newest checkpoint; a checkpoint; a folder that `seqjepa export`
            made; or a name on the Hugging Face Hub, USER/NAME.

    Raises:
        InputError: there is no encoder, or it cannot be read.
    """
    path = Path(place).expanduser()
    if not path.exists():
        path = _download(str(place))
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file() and not (path / "state.json").is_file():
        return _read_export(path)
    found = find_checkpoint(path)
    if found is None:
        raise InputError(f"{place}: neither a run with a checkpoint nor a folder that `seqjepa export` made")
    model, state, config = read_network(found)
    if state.pixels is None:
        raise InputError(f"{found}: an older checkpoint, without mean and std of its images; resume the run once")
    return Encoder(model.encoder, Description(model=config.model, pixels=state.pixels)).eval()


def exported(encoder: Encoder) -> nn.Module:
    """The module of an encoder whose weights an exported folder has, under the names that its library gives them."""
    network: Any = encoder.network
    return getattr(network, "exported", network)


def _read_export(folder: Path) -> Encoder:
    try:
        said: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        description = Description.model_validate(said["seqjepa"]["encoder"])
        encoder = Encoder(build_encoder(description.model), description)
        load_model(exported(encoder), load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        said = first_line(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{folder}: not a folder that `seqjepa export` made ({said})") from None
    return encoder.eval()


def _download(name: str) -> Path:
    if not ON_THE_HUB.fullmatch(name):
        raise InputError(f"{name}: no such folder, and no name on the Hub (USER/NAME)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:  # of the network, of the Hub, of the disk: many classes
        raise InputError(f"{name}: no such folder, and the Hub does not give it ({first_line(error)})") from None
