"""Encoders of ours that timm does not have; importing this module registers them.

After `import seqjepa.engine.timm_models`, `timm.create_model("resnet18_cifar")` is timm's ResNet-18 with the stem for
small images, whose weights have the names of ours, and `timm.create_model("resnet_cifar", network="resnet50")` is
another of timm's networks with that stem.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from .models.encoders.from_timm import arguments, build
from .models.encoders.resnet import ResNet18CIFAR

OF_KINDS = {"resnet18": "resnet18_cifar"}  # timm's name of an encoder of this kind


def architecture(encoder: Any) -> tuple[str, dict[str, Any]] | None:
    """The name by which timm builds an encoder, after this module was imported, and the arguments that it needs.

    None if timm cannot build it.
    """
    model = encoder.description.model
    if model.neck.kind != "none":
        return None
    if model.encoder.kind == "timm":
        name, given = model.encoder.name, arguments(model.encoder.name, model.encoder.input_size)
        changed = isinstance(getattr(encoder.network.exported, "maxpool", None), nn.Identity)  # the stem, by us
        return ("resnet_cifar", {"network": name, **given}) if changed else (name, given)
    name = OF_KINDS.get(model.encoder.kind)
    return None if name is None else (name, {})


UNTRAINED = {"input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs(  # under this name timm looks for them
    {"resnet18_cifar.untrained": UNTRAINED, "resnet_cifar.untrained": UNTRAINED}
)


@register_model
def resnet18_cifar(pretrained: bool = False, **settings: Any) -> ResNet18CIFAR:
    """ResNet-18 with the stem for small images."""
    settings.setdefault("num_classes", 0)
    return build_model_with_cfg(ResNet18CIFAR, "resnet18_cifar", pretrained, **settings)


@register_model
def resnet_cifar(pretrained: bool = False, **settings: Any) -> nn.Module:
    """A network of timm, whose name is `network`, with the stem for small images."""
    settings.setdefault("num_classes", 0)

    def made(network: str, **given: Any) -> nn.Module:
        return build(network, "cifar", None, **given)

    return build_model_with_cfg(made, "resnet_cifar", pretrained, **settings)
