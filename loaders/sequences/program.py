"""Programs on grids: each view is what one more move has made of the grid."""

import torch
from torch import Tensor

from ...configs.errors import InputError
from ..batch import Views
from ..config import ActionsConfig, ProgramConfig
from ..grids.changes import changed
from ..grids.moves import COLUMNS, MOVE, NAMES, OUTSIDE
from ..grids.programs import ACTION_DIM, FACTORS, READS, draw_program, encode
from .base import Sequence

# the ten colours in which ARC's grids are usually shown, and what is outside
PALETTE = [[0, 0, 0], [0, 116, 217], [255, 65, 54], [46, 204, 64], [255, 220, 0], [170, 170, 170], [240, 18, 190]]
PALETTE += [[255, 133, 27], [127, 219, 255], [135, 12, 37], [255, 255, 255]]


def _lines(step: list[int]) -> list[str]:
    """The name of a move, and what it reads."""
    read = [f"{name} {value}" for name, value, reads in zip(COLUMNS, step, READS[step[MOVE]], strict=True) if reads]
    return [NAMES[step[MOVE]], *read[1:]]


class Program(Sequence):
    """View 0 is the grid itself, changed if the section says so, and each further view the grid after one more step.

    Images are grids, [S, S, 1] of colours 0 to 9, with 10 outside; views have the same numbers. The parameters of a
    view are the step that has led to it, those of view 0 are all 0. Which steps make sense depends on the grid, so
    views and parameters are drawn together.
    """

    num_draws = 2
    param_names = COLUMNS
    factors = FACTORS
    compilable = False  # a grid decides how often a step is drawn
    config: ProgramConfig

    def __init__(
        self, config: ProgramConfig, actions: ActionsConfig, image_size: tuple[int, int], device: torch.device
    ):
        super().__init__(config, actions, image_size, device)
        if self.normalization != "none":
            raise InputError("the actions of programs have their scale; only none is allowed", "actions.normalization")

    def sample(self, images: Tensor, words: Tensor, strength: Tensor | None = None) -> tuple[Tensor, Tensor]:
        grids = changed(images[..., 0].long(), words[:, 0], self.config.changes)
        frames, steps = draw_program(grids, words[:, 0], self.num_views - 1, self.config.draws)
        start = torch.zeros_like(steps[:, :1])
        return frames[:, :, None].float(), torch.cat([start, steps], 1).float()

    def difficulty(self, views: Views, params: Tensor) -> Tensor:
        """A thousand for each step that changes the grid, up to a hundred for the share of cells that change from the
        first grid to the last, and five hundred if its height or width does."""
        assert isinstance(views, Tensor)
        grids = views[:, :, 0].round().long()
        first, last = grids[:, 0], grids[:, -1]
        steps = (grids[:, 1:] != grids[:, :-1]).flatten(2).any(2).sum(1)
        cells = (first != OUTSIDE).flatten(1).sum(1)
        moved = ((first != last) & (first != OUTSIDE)).flatten(1).sum(1)
        resized = ((first == OUTSIDE) != (last == OUTSIDE)).flatten(1).any(1)
        return 1000 * steps + 100 * moved // cells + 500 * resized

    def unchanged(self, images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2).float()

    def pictures(self, views: Tensor) -> Tensor:
        return torch.tensor(PALETTE, device=views.device)[views[..., 0, :, :].round().long()] / 255

    def described(self, params: Tensor) -> list[list[list[str]]]:
        return [[_lines(step) for step in steps] for steps in params[:, 1:].long().tolist()]

    def params(self, words: Tensor) -> Tensor:
        raise NotImplementedError("the steps of a program depend on the grid")

    def render(self, images: Tensor, params: Tensor) -> Tensor:
        raise NotImplementedError("the steps of a program depend on the grid")

    def encode(self, params: Tensor) -> Tensor:
        return encode(params.long(), self.image_size[0])

    def relative(self, params: Tensor) -> Tensor:
        return self.encode(params)[:, 1:]

    @property
    def action_dim(self) -> int:
        return ACTION_DIM
