"""Base class of action sequences: they draw parameters, render views and encode actions."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..batch import Views
from ..config import ActionsConfig, SequenceConfig
from ..draws import STATISTICS_STREAM, words

# B batch, V views (V - 1 observed and the target), C channels, H x W pixels, P parameters, A action dimensions

STATISTICS_SAMPLES = 4096
VIEW_L2_WARNING = (
    "actions.normalization=view_l2 divides each parameter by its norm over all views of a sequence, the target "
    "included: the actions that the model receives depend on the target and on the number of views. "
    "Use it only to compare with the reference code"
)


class Factor(NamedTuple):
    """A grid along one factor of variation, the others fixed. S steps, P parameters of the sequence."""

    name: str
    unit: str
    values: Tensor  # [S]
    identity: int  # step at which the image is unchanged
    params: Tensor  # [S, P]
    dims: int  # dimension of the subspace in which an equivariant encoder would represent it
    closed: bool = False  # whether the last step is next to the first: an angle


class Group(NamedTuple):
    """A factor in which a group acts, and its dimensions of the action."""

    factor: str
    kind: Literal["circle", "line"]
    dims: slice  # two for a circle: sine and cosine of the angle; any number for a line


class ActionSpace(NamedTuple):
    """What a network must know of actions: how many dimensions they have, and which groups act.

    Moves are `actions * scale + offset`. All three tensors are [A], and given if there are groups.
    """

    dim: int  # A
    groups: tuple[Group, ...] = ()
    offset: Tensor | None = None
    scale: Tensor | None = None
    deviation: Tensor | None = None  # standard deviation of moves


Sweeps = list[tuple["Sequence", list[Factor]]]  # each sequence, with the grids that it renders


def grid(rest: list[float], column: int, values: list[float]) -> Tensor:
    """Parameters [S, P]: `rest` in every row, except for one column, which takes the S values."""
    params = torch.tensor(rest).repeat(len(values), 1)
    params[:, column] = torch.tensor(values)
    return params


class Sequence(ABC):
    """A way to draw view parameters, to render views, and to encode the actions between them.

    Args:
        config: settings of the sequence.
        actions: how actions are encoded.
        image_size: (H, W).
        device: where everything happens.

    Attributes:
        num_views: V = M + 1.
        num_draws: number of random words that one view needs.
        param_names: names of the P parameters.
        factors: dimensions of the action that belong to each factor of variation, by its name.
        columns: parameters of each factor whose strength a task can set, by its name; none by default.
        whole: parameters that are whole numbers of pixels.
        choices: parameters that are drawn or not, so that they have no strength.
    """

    num_draws: int
    param_names: tuple[str, ...]
    factors: dict[str, slice]
    columns: ClassVar[dict[str, tuple[int, ...]]] = {}
    whole: ClassVar[tuple[int, ...]] = ()
    choices: ClassVar[tuple[int, ...]] = ()
    compilable: ClassVar[bool] = True  # whether one compiled program can draw its views

    def __init__(
        self, config: SequenceConfig, actions: ActionsConfig, image_size: tuple[int, int], device: torch.device
    ):
        self.config = config
        self.normalization = actions.normalization
        self.image_size = image_size[0], image_size[1]
        self.device = device
        self.num_views = config.num_observed + 1
        if self.normalization == "view_l2":
            warnings.warn(VIEW_L2_WARNING, stacklevel=3)

    @property
    def action_dim(self) -> int:
        """Number A of dimensions of an action."""
        return max([0, *(dims.stop for dims in self.factors.values())])

    def difficulty(self, views: Views, params: Tensor) -> Tensor:
        """How hard sequences of these views and parameters are, as whole numbers, int64 [B].

        Only a kind whose section is `graded` says so.
        """
        raise NotImplementedError

    def sample(self, images: Tensor, words: Tensor, strength: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Views and parameters, as `render` and `params` give them; of a kind that draws both together, overridden.

        Args:
            images: uint8 [B, H, W, C].
            words: random, int64 [B, V, num_draws].
            strength: float32 [B, P], for `weakened`; None: the parameters as they are drawn.
        """
        params = self.params(words)
        if strength is not None:
            params = self.weakened(params, strength)
        return self.render(images, params), params

    def unchanged(self, images: Tensor) -> Tensor:
        """Images, uint8 [B, H, W, C], in the form of views, float32 [B, C, H, W]."""
        return images.permute(0, 3, 1, 2).float() / 255

    def pictures(self, views: Tensor) -> Tensor:
        """Views, float32 [..., C, H, W] before normalisation, as colours to be shown, [..., H, W, 3] in [0, 1]."""
        return views.clamp(0, 1).movedim(-3, -1)

    def described(self, params: Tensor) -> list[list[list[str]]]:
        """Lines that describe each move of sequences, from parameters [B, V, P]: B lists of V - 1 lists of lines."""
        return [
            [
                [
                    f"{name} " + " ".join(f"{round(value, 2) + 0.0:+g}" for value in step[dims])
                    for name, dims in self.factors.items()
                ]
                for step in steps
            ]
            for steps in self.relative(params).tolist()
        ]

    @abstractmethod
    def params(self, words: Tensor) -> Tensor:
        """Absolute parameters of each view, float32 [B, V, P], from random words, int64 [B, V, num_draws].

        The last view is the target.
        """

    @abstractmethod
    def render(self, images: Tensor, params: Tensor) -> Tensor:
        """Views, float32 [B, V, C, H, W] in [0, 1], of images, uint8 [B, H, W, C], for any number of views."""

    @abstractmethod
    def encode(self, params: Tensor) -> Tensor:
        """Absolute parameters as the reference code encodes them, float32 [B, V, A]."""

    def relative(self, params: Tensor) -> Tensor:
        """Moves from each view to the next, float32 [B, V - 1, A], before normalisation."""
        return self.encode(params).diff(dim=1)

    def actions(self, params: Tensor) -> Tensor:
        """Actions as the model receives them, float32 [B, V - 1, A]: action i carries view i to view i + 1.

        `standard` subtracts from each dimension of the move its mean over the draws and divides by its standard
        deviation, both constants.
        """
        if self.normalization == "view_l2":
            encoded = self.encode(params)
            return (encoded / encoded.norm(dim=1, keepdim=True).clamp(min=1e-12)).diff(dim=1)
        moves = self.relative(params)
        if self.normalization == "standard" and self.action_dim:
            mean, deviation = self.statistics
            moves = (moves - mean) / deviation
        return moves

    def inverse_actions(self, params: Tensor) -> Tensor:
        """The way back, float32 [B, V - 1, A]: action i carries view i + 1 to view i."""
        return self.actions(params.flip(1)).flip(1)

    @property
    def still(self) -> Tensor:
        """Parameters [P] that leave an image as it is; a sequence with `columns` has them."""
        raise NotImplementedError

    @cached_property
    def _pixels(self) -> Tensor:
        """Which parameters are whole numbers, bool [P]."""
        return torch.tensor([column in self.whole for column in range(len(self.param_names))], device=self.device)

    def weakened(self, params: Tensor, strength: Tensor) -> Tensor:
        """Parameters [B, V, P], of which only a share of the way from `still` is left: `strength`, float32 [B, P].

        Whole numbers stay whole; they are rounded toward `still`. With strength 1 nothing changes.
        """
        strength = strength[:, None]
        moved = strength * (params - self.still)
        moved = self.still + torch.where(self._pixels, moved.trunc(), moved)
        return torch.where(strength == 1, params, moved)

    def strengths(self, factors: Iterable[str], strength: float = 1.0) -> Tensor:
        """Strength of each parameter if these factors have the one that is given and the others 0: float32 [P].

        It is a multiple of 1 / 1024, so that its product with a whole number is exact, and rounded alike everywhere.
        """
        share = max(1, round(1024 * strength)) / 1024
        found = torch.zeros(len(self.param_names))
        for column in (column for name in factors for column in self.columns[name]):
            found[column] = 1.0 if column in self.choices else share
        return found.to(self.device)

    def sweeps(self) -> Sweeps:
        """The factors along which diagnostics move images, one at a time; each grid contains the unchanged image.

        They are the same for all runs of a kind, whatever their ranges, so that figures can be compared.
        """
        return []

    @property
    def action_space(self) -> ActionSpace:
        """The dimensions of actions, and the groups of the factors that have one."""
        kinds = self.config.groups
        groups = tuple(Group(name, kinds[name], dims) for name, dims in self.factors.items() if name in kinds)
        if not groups:
            return ActionSpace(self.action_dim)
        mean, deviation = self.statistics
        if self.normalization == "standard":
            return ActionSpace(self.action_dim, groups, mean, deviation, deviation)
        return ActionSpace(self.action_dim, groups, torch.zeros_like(mean), torch.ones_like(mean), deviation)

    def prepare(self) -> None:
        """Compute cached values; call it before `torch.compile` traces this object."""
        if self.normalization == "standard" and self.action_dim:
            self.statistics  # noqa: B018
        if self.columns:
            self.still  # noqa: B018
            self._pixels  # noqa: B018

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, [A] each, of moves between drawn, observed views; the latter is 1 if constant.

        They come from a fixed set of draws, so they depend on neither the data nor the run's seed nor the number of
        views. Each move counts in both directions: shifts have mean 0, and the inverse of a shift is its negative.
        """
        index = torch.arange(STATISTICS_SAMPLES)
        draws = words(0, STATISTICS_STREAM, 0, index, 4, self.num_draws)  # views 1 and 2 of 4: drawn, not the target
        drawn = self.params(draws.to(self.device))[:, 1:3]
        moves = torch.cat([self.relative(drawn), self.relative(drawn.flip(1))])[:, 0].cpu().double()
        mean, deviation = moves.mean(0), moves.std(0)
        deviation = deviation.masked_fill(deviation <= 1e-6, 1.0)
        return mean.float().to(self.device), deviation.float().to(self.device)
