"""Write the encoder of a run to a folder that other code loads: `seqjepa export RUN --out DIR`.

Or that of a checkpoint by the authors of seq-JEPA: `seqjepa export --from-reference FILE --out DIR DATA.yaml`.

The folder gets model.safetensors, config.json and a model card, README.md. `seqjepa.load_encoder(DIR)` reads it; so
does timm, if the encoder is one that timm knows: `import seqjepa.engine.timm_models, timm`, then
`timm.create_model("local-dir:DIR", pretrained=True)`. Each file is loaded once more and compared with the encoder.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..configs.cli import DONE, command, parser_of
from ..configs.errors import InputError, first_line, shown

FORMATS = ("timm", "onnx", "pt2")
CLOSE = 1e-5  # largest difference of features, as a share of their largest value
Features = Callable[[Any], Any]  # of images float32 [B, C, H, W] in [0, 1]


@command("nothing was exported")
def main(argv: list[str]) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 128 + signal when interrupted."""
    parser = parser_of("export", __doc__)
    add_words(parser)
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"--out {shown(args.out)}: exists; name a folder that is new or empty")
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        raise InputError(f"--push {shown(args.push)}: must be USER/NAME, as on the Hub")
    # torch is imported only here, so that --help is instant
    from .encoder import load_encoder
    from .reports.card import card, card_of_reference
    from .runs.checkpoints import find_checkpoint

    reference, run = None, Path()
    if args.from_reference:
        from .reference import read_reference, write_checkpoint

        pixels = {name: value for name in ("mean", "std") if (value := getattr(args, name)) is not None}
        reference = read_reference(args.from_reference, args.words, pixels, args.size)
        encoder = reference.encoder
    else:
        if unused := [name for name in ("mean", "std", "size") if getattr(args, name) is not None]:
            raise InputError(f"--{unused[0]}: only with --from-reference; a run knows it")
        if len(args.words) != 1:
            raise InputError(f"{len(args.words)} runs were given; export takes one, or --from-reference FILE")
        run = Path(args.words[0]).expanduser()
        if find_checkpoint(run) is None:
            raise InputError(f"{shown(run)}: neither a run with a checkpoint nor a checkpoint")
        encoder = load_encoder(run)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # beside its place and renamed, so that what stands there is whole
        with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}.") as partial:
            folder = Path(partial) / "whole"
            folder.mkdir()
            checked = write(encoder, folder, args.format)
            if reference is None:
                text = card(run, encoder, folder, args.license or "apache-2.0")
            else:
                text = card_of_reference(args.from_reference.stem, encoder, args.license)
                place = folder / "checkpoints" / f"epoch-{reference.epoch:04d}"
                if problem := write_checkpoint(reference, place):
                    print(f"{args.from_reference}: {problem}", file=sys.stderr)
            (folder / "README.md").write_text(text, encoding="utf-8")
            if args.out.exists():
                args.out.rmdir()
            shutil.move(folder, args.out)
    except OSError as error:
        raise InputError(f"{shown(error.filename or args.out)}: cannot be written ({error.strerror})") from None
    for name, difference in checked.items():
        print(f"{args.out / name}: loaded again, its features differ by at most {difference:.1e} of the largest")
    print(f"{args.out}: encoder of {encoder.num_features} features")
    if args.push:
        print(push(args.out, args.push))
    return DONE


def add_words(parser: argparse.ArgumentParser) -> None:
    """Give a parser what the command takes."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN",
        help="folder of a run (its newest checkpoint) or of a checkpoint; with --from-reference, config files and "
        "settings as of `seqjepa train` that say what it was trained on",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=[],
        help="timm: refuse what timm cannot load; onnx, pt2: also write a graph (needs seqjepa[export])",
    )
    parser.add_argument(
        "--from-reference",
        type=Path,
        metavar="FILE",
        help="a checkpoint of the authors' code, instead of a run; --out also gets a checkpoint for `seqjepa eval`",
    )
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            type=float,
            help=f"with --from-reference: the {what} of its images, if it is not the published one of data.dataset",
        )
    parser.add_argument("--size", type=int, help="with --from-reference: height and width of its images")
    parser.add_argument(
        "--license", help="of the weights, for the card (default: apache-2.0 for a run, none for a FILE)"
    )
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face Hub")


def write(encoder: Any, folder: Path, formats: list[str]) -> dict[str, float]:
    """Write an encoder in every format that is asked for, load each file again, and compare the features.

    Args:
        encoder: an `Encoder` on the CPU, in evaluation mode.
        folder: to write to; it exists and is empty.
        formats: timm, onnx, pt2, or none of these for the weights with their config alone.

    Returns:
        The largest difference of each file's features from the encoder's, as a share of their largest value.

    Raises:
        InputError: a package is missing, a format does not suit the encoder, or a file gives other features.
    """
    import torch
    from torch.testing import make_tensor

    from .encoder import CONFIG, WEIGHTS, exported, load_encoder
    from .runs.tensors import save_tensors
    from .timm_models import architecture

    height, width = encoder.image_size
    grids = encoder.sees == "grids"
    if grids and formats:
        raise InputError(f"--format {formats[0]}: the encoder sees grids, not images; leave --format out")
    if grids:
        images = torch.randint(0, 10, (4, height, width))
    else:
        images = make_tensor((4, len(encoder.mean), height, width), dtype=torch.float32, device="cpu", low=0, high=1)
    named, kind = architecture(encoder), encoder.description.model.encoder.kind
    if "timm" in formats and named is None:
        how = "leave timm out, and load the folder by seqjepa.load_encoder"
        own = kind != "timm"
        reason = f"has no {kind} encoder" if own else "builds it without model.neck"
        raise InputError(f"--format timm: timm {reason}; {how}")
    save_tensors(exported(encoder).state_dict(), folder / WEIGHTS)
    said: dict[str, Any] = {"seqjepa": {"encoder": encoder.description.model_dump(mode="json")}}
    if named is not None:
        pixels = encoder.description.pixels
        said |= {
            "architecture": named[0],
            "model_args": named[1],
            "num_classes": 0,
            "num_features": encoder.num_features,
            "pretrained_cfg": {
                "input_size": [len(pixels.mean), height, width],
                "mean": pixels.mean,
                "std": pixels.std,
                "num_classes": 0,
                **_ends(exported(encoder)),
                "fixed_input_size": kind == "timm" and encoder.description.model.encoder.fixed_size,
                "crop_pct": 1.0,
            },
        }
    (folder / CONFIG).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    loaded: dict[str, Features] = {WEIGHTS: load_encoder(folder)}
    try:
        if "timm" in formats:
            loaded[CONFIG] = _by_timm(folder, encoder)
        if "pt2" in formats:
            loaded["encoder.pt2"] = _by_export(encoder, images, folder / "encoder.pt2")
        if "onnx" in formats:
            loaded["encoder.onnx"] = _by_onnx(encoder, images, folder / "encoder.onnx")
    except ModuleNotFoundError as error:
        how = "pip install 'seqjepa[export]' brings it, in a clone '.[export]'"
        raise InputError(f"--format: {error.name} is missing; {how}") from None
    with torch.inference_mode():
        wanted = encoder(images)
        largest = wanted.abs().max().clamp(min=1e-12)
        found = {
            name: float((torch.as_tensor(give(images)) - wanted).abs().max() / largest) for name, give in loaded.items()
        }
    for name, difference in found.items():
        if not difference <= CLOSE:
            raise InputError(f"{name} gives other features: by {difference:.1e} of the largest, {CLOSE} is allowed")
    return found


def _ends(network: Any) -> dict[str, Any]:
    """Names of the first and the last layer, by which timm changes the number of channels and adds a classifier."""
    known = getattr(network, "pretrained_cfg", None) or {"first_conv": "conv1", "classifier": "fc"}
    return {name: known[name] for name in ("first_conv", "classifier") if known.get(name)}


def push(folder: Path, name: str) -> str:
    """Upload a folder to the Hub; returns its address.

    Raises:
        InputError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of the network or of the Hub: many classes
        raise InputError(f"--push {name}: {first_line(error)}; the folder {folder} is whole") from None
    return f"https://huggingface.co/{name}"


def _by_timm(folder: Path, encoder: Any) -> Features:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda images: model((images - encoder.mean) / encoder.std)


def _by_export(encoder: Any, images: Any, path: Path) -> Features:
    import torch

    torch.export.save(_graph(encoder, images), path)
    return torch.export.load(path).module()


def _graph(encoder: Any, images: Any) -> Any:
    """The encoder as a graph for any number of images of this size, without the places of its source."""
    import torch

    graph = torch.export.export(encoder, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})
    for module in graph.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return graph


def _by_onnx(encoder: Any, images: Any, path: Path) -> Features:
    import onnxruntime
    import torch

    torch.onnx.export(
        _graph(encoder, images),
        (images,),
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["images"],
        output_names=["features"],
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]


if __name__ == "__main__":
    sys.exit(main())
