"""Any encoder of timm, by its name."""

import difflib
import functools
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ....configs.errors import InputError, first_line
from .base import ImageEncoder
from .config import SMALL, TimmConfig


def build(name: str, stem: str, side: int | None, **settings: Any) -> Any:
    """A network of timm.

    Args:
        name: as timm knows it, without a tag of weights.
        stem: cifar replaces a first convolution with a stride, and the max-pooling after it, by a 3x3 convolution, as
            for ResNets on small images; imagenet keeps them; auto, in checkpoints of before it was settled, is cifar
            where it is possible and the side is given and at most 64.
        side: height and width of the images; None leaves them to the network.
        settings: further arguments of timm's, such as num_classes, which is 0 otherwise.

    Raises:
        InputError: names the field that cannot be used.
    """
    if name not in timm.list_models():
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() has the names"
        raise InputError(f"timm has no such network; {hint}", "model.encoder.name")
    settings = {"num_classes": 0, **arguments(name, side), **settings}
    try:
        network: Any = timm.create_model(name, pretrained=False, **settings)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"timm cannot build {name} ({first_line(error)})", "model.encoder.name") from None
    replaceable = isinstance(getattr(network, "maxpool", None), nn.Module) and hasattr(network, "bn1")
    if stem == "cifar" and not replaceable:
        raise InputError(f"{name} has no stem that could be replaced; imagenet is allowed", "model.encoder.stem")
    if stem == "cifar" or (stem == "auto" and replaceable and side is not None and side <= SMALL):
        channels = settings.get("in_chans", 3)
        network.conv1 = nn.Conv2d(channels, network.bn1.num_features, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
        network.feature_info = [i | {"reduction": max(1, i["reduction"] // 4)} for i in network.feature_info]
        network.pretrained_cfg = network.default_cfg = network.pretrained_cfg | {"first_conv": "conv1"}
    return network


@functools.cache
def width(name: str, stem: str, side: int | None, size: tuple[int, int] | None = None) -> int:
    """Number of features that a network gives, found by a pass without memory or arithmetic.

    Args:
        name: see `build`, as for stem and side.
        size: height and width of the images that it sees; None takes the side, or those that it was designed for.

    Raises:
        InputError: names the field that cannot be used.
    """
    with torch.device("meta"):
        network = build(name, stem, side).eval()
        height, width = size or 2 * (side or network.default_cfg["input_size"][-1],)
        try:
            features = network(torch.empty(1, 3, height, width))
        except (RuntimeError, AssertionError, ValueError) as error:
            problem = f"{name} cannot see images of {width}x{height} pixels ({first_line(error)})"
            raise InputError(problem, "model.encoder.input_size" if side else "model.encoder.name") from None
    if features.ndim != 2:
        raise InputError(f"{name} gives features {list(features.shape)}, not [B, D]", "model.encoder.name")
    return features.shape[1]


@functools.cache
def has_two_stems(name: str) -> bool:
    """Whether the stem of a network can be replaced by one for small images."""
    try:
        with torch.device("meta"):
            build(name, "cifar", None)
    except InputError:
        return False
    return True


def needs_a_size(name: str) -> bool:
    """Whether a network is built for images of one size."""
    return bool(timm.models.get_pretrained_cfg_value(name, "fixed_input_size"))


def arguments(name: str, side: int | None) -> dict[str, Any]:
    """How timm is told the height and width of the images, if the network takes them."""
    return {} if side is None or not _takes_a_size(name) else {"img_size": side}


@functools.cache
def _takes_a_size(name: str) -> bool:
    try:
        with torch.device("meta"):
            timm.create_model(name, pretrained=False, num_classes=0, img_size=224)
    except TypeError:  # an unknown argument
        return False
    except (ValueError, AssertionError, RuntimeError):
        return True
    return True


class TimmEncoder(ImageEncoder):
    """A network of timm, without its classifier and with its own pooling, from random weights."""

    # its section asks for these without importing torch
    width = staticmethod(width)
    has_two_stems = staticmethod(has_two_stems)
    needs_a_size = staticmethod(needs_a_size)

    def __init__(self, config: TimmConfig):
        super().__init__()
        self.network = build(config.name, config.stem, config.input_size)

    @property
    def exported(self) -> nn.Module:
        return self.network

    def features(self, images: Tensor) -> Tensor:
        return self.network(images)
