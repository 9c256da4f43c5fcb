"""Draw a contact sheet of action sequences: `seqjepa show CONFIG.yaml --out sheet.png`.

Each row is the sequence of one image: the observed views, then the target. The move from each view to the
next is printed between them, before normalisation, one line per factor. section.key=value overrides the config.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, model_validator

from ..configs.cli import DONE, MACHINE_FAILED, command, located, parser_of
from ..configs.compose import Composed, compose
from ..configs.errors import InputError, out_of_memory, shown
from ..configs.section import Schema
from .config import ActionsConfig, AffineConfig, AnySequence, DataConfig

if TYPE_CHECKING:
    from .loader import Loaders

MOST_ROWS = 64  # of 17 views each, these take half a minute to draw


class _Config(Schema):
    """The sections that the sheet needs; others in the files are ignored."""

    model_config = ConfigDict(extra="ignore")

    data: DataConfig = DataConfig()
    sequence: AnySequence = AffineConfig()
    actions: ActionsConfig = ActionsConfig()

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, sections: dict[str, Any]) -> dict[str, Any]:
        for name in sections.keys() - cls.model_fields.keys():
            if close := difflib.get_close_matches(str(name), cls.model_fields, 1, 0.7):
                raise InputError(f"unknown key, did you mean {close[0]}?", str(name))
        return sections


def draw_sheet(loaders: Loaders, rows: int, path: Path) -> None:
    """Draw the first training sequences of epoch 0.

    Args:
        loaders: loaders of the data.
        rows: largest number of sequences; the first batch may have fewer.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loader, sequence = loaders.train, loaders.sequence
    batch = next(loader.epoch(0))
    images: Any = batch.views  # a tensor, since only images and grids can be drawn
    views = sequence.pictures(images[:rows] * loader.std + loader.mean).cpu()
    num_views, moves = views.shape[1], sequence.described(batch.params[:rows])
    # a text column is as wide as its longest line
    text_width = max(len(line) for steps in moves for lines in steps for line in lines) * 0.047
    widths = [1.0, text_width] * (num_views - 1) + [1.0]
    margin, heading = 0.06, 0.2  # inches
    width, height = sum(widths) + 2 * margin, 1.08 * len(views) + margin + heading
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    edges = {"left": margin / width, "right": 1 - margin / width}
    edges |= {"bottom": margin / height, "top": 1 - heading / height}
    cells = figure.subplots(
        len(views), len(widths), width_ratios=widths, squeeze=False, gridspec_kw={"wspace": 0, "hspace": 0.06, **edges}
    )
    for first, row, pictures, steps in zip([True] + rows * [False], cells, views, moves, strict=False):
        for number, view in enumerate(pictures):
            axes = row[2 * number]
            axes.imshow(view.numpy(), interpolation="nearest")
            if first:
                axes.set_title("target" if number == num_views - 1 else f"view {number}", fontsize=7, pad=3)
        for number, lines in enumerate(steps):
            row[2 * number + 1].text(
                0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=5.5, family="monospace"
            )
        for axes in row:
            axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _read(words: list[str]) -> Composed[_Config]:
    """The config from YAML files and overrides; an override of a section that the sheet does not need is refused."""
    for word in words:
        section, *_ = word.partition("=")[0].split(".")
        if "=" in word and section and section not in _Config.model_fields:
            raise InputError(f"{word}: the sheet depends only on {', '.join(_Config.model_fields)}")
    return compose(words, _Config)


@command("nothing was drawn")
def main(argv: list[str]) -> int:
    """Run the command line and return 0, 2 for bad input, or 4 if memory runs out."""
    parser = parser_of("show", __doc__)
    add_words(parser)
    args = parser.parse_intermixed_args(argv)
    if not 1 <= args.rows <= MOST_ROWS:
        raise InputError(f"--rows {args.rows}: must be from 1 to {MOST_ROWS}")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be from 0 to 2**32 - 1")
    if args.out.suffix.lower() != ".png":
        raise InputError(f"--out {shown(args.out)}: must be the name of a PNG, such as sheet.png")
    composed = _read(args.words)
    config = composed.config
    for note in composed.notes:
        print(note)
    data = config.data.model_copy(update={"batch_size": args.rows, "train_subset": None})
    # torch is imported only here, so that errors above appear at once
    import torch

    from .loader import build_loaders

    build = {"seed": args.seed, "device": torch.device("cpu"), "drop_last": False}  # rows may outnumber the images
    try:
        with located(composed):
            loaders = build_loaders(data, config.sequence, config.actions, **build)
            draw_sheet(loaders, args.rows, args.out)
    except OSError as error:
        raise InputError(f"{shown(error.filename or args.out)}: {error.strerror}") from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print("out of memory; use smaller images or fewer --rows; nothing was drawn", file=sys.stderr)
        return MACHINE_FAILED
    print(args.out)
    return DONE


def add_words(parser: argparse.ArgumentParser) -> None:
    """Give a parser what the command takes."""
    parser.add_argument("words", nargs="+", metavar="CONFIG", help="YAML files, and section.key=value")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"), help="PNG file to write (default: sheet.png)")
    parser.add_argument("--rows", type=int, default=6, help=f"number of sequences, up to {MOST_ROWS} (default: 6)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the draws (default: 42)")


if __name__ == "__main__":
    sys.exit(main())
