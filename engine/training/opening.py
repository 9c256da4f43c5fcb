"""What a run says of itself when it begins: data, device, precision, and what may be unexpected about them."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from ...loaders.loader import Loaders
from ..config import Config
from ..runs.state import Settled
from ..runtime.accelerator import crowded, overruled
from .segments import Segments
from .stream import buffer_size


def opening_lines(
    config: Config, loaders: Loaders, segments: Segments, settled: Settled, accelerator: Accelerator
) -> Iterator[str]:
    """The lines, in the order in which they are said."""
    yield (
        f"{config.run.name}: {config.data.name}, {loaders.numbers}, {loaders.kind} loader, "
        f"{settled.device}, {settled.precision}, {settled.processes} process(es)"
    )
    if loaders.notice:
        yield loaders.notice
    majority = loaders.largest_class
    if majority is None and config.sequence.views == "images":
        yield "the images have no classes: accuracies are left out"
    elif majority is not None and majority > 150 / len(loaders.classes):
        share = f"{majority:.1f} % of the {loaders.validated_on} images"
        yield f"the largest class has {share}: always guessing it is right as often"
    if loaders.stream:
        yield f"a stream of {len(segments)} tasks, {segments.start(len(segments))} steps"
    if kept := buffer_size(loaders):
        yield f"kept to be trained on again: {kept}"
    yield from overruled(config.run, config.optim.accumulate, accelerator)
    alone = settled.device == "cpu" and settled.processes == 1 and config.run.threads == "auto"
    if alone and (advice := crowded(torch.get_num_threads())):
        yield advice
