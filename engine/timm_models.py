"""Encoders of ours that timm does not have; importing this module registers them.

After `import seqjepa.engine.timm_models`, `timm.create_model("resnet18_cifar")` is timm's ResNet-18 with the stem for
small images, whose weights have the names of ours.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

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
        from .models.encoders.from_timm import arguments

        changed = isinstance(getattr(encoder.network.exported, "maxpool", None), nn.Identity)  # the stem, by us
        return None if changed else (model.encoder.name, arguments(model.encoder.name, model.encoder.input_size))
    name = OF_KINDS.get(model.encoder.kind)
    return None if name is None else (name, {})


default_cfgs = generate_default_cfgs(  # under this name timm looks for it
    {"resnet18_cifar.untrained": {"input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc"}}
)


@register_model
def resnet18_cifar(pretrained: bool = False, **settings: Any) -> ResNet18CIFAR:
    """ResNet-18 with the stem for small images."""
    settings.setdefault("num_classes", 0)
    return build_model_with_cfg(ResNet18CIFAR, "resnet18_cifar", pretrained, **settings)
