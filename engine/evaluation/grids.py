"""What a network knows of grids and of the moves between them."""

import math
from collections.abc import Callable
from statistics import fmean
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...loaders.batch import Batch
from ...loaders.draws import COUNTERFACTUAL_STREAM, words
from ...loaders.grids.moves import MOVE, counts, sizes
from ...loaders.grids.objects import components, shape_keys
from ...loaders.grids.programs import counterfactuals
from ...loaders.loader import SequenceLoader
from ..analysis.accumulators import r2_score
from ..analysis.regressions import held_out_rows, ridge_regression
from ..models.config import Span
from ..models.encoders.grid_objects import GridObjects
from ..models.seq_jepa import SeqJEPA
from ..models.targets.ema import EMATeacher
from ..objectives.objective import Objective
from .arc import ALTERNATIVES, share_of_first
from .frozen import Progress, Rows, rows_of

NEGATIVES, NCE_SCALE = 8703, 0.07
FITTED, TESTED = 4000, 1000  # most sequences that probes are fitted to, and that are tested


@torch.no_grad()
def grid_scores(
    model: SeqJEPA,
    objective: Objective,
    spans: tuple[Span, ...],
    train_loader: SequenceLoader,
    test_loader: SequenceLoader,
    *,
    shuffled: bool = False,
    progress: Progress = lambda: None,
) -> dict[str, float]:
    """Scores of a network in eval mode on up to 1,000 test programs, with probes fitted to up to 4,000 of training.

    It runs on one process and waits for no other. `shuffled` networks get the actions of another sequence.

    - next_cf16: percent of predictions that are nearest to the true last grid among it and 15 that other moves make of
      the grid before; of equally near ones each counts in part (chance is 6.25). The others are valid steps: where
      programs are of the origin's draws, some 11 percent can be told without knowing the action
    - next_copy16: the same with the grid before in the place of the prediction
    - val_nce: cross-entropy of picking the true last grid by cosine, over 0.07, among it and 8,703 grids of training
      programs, always the same ones: it compares networks of any objective (chance is ln 8704 = 9.07); missing where
      there are fewer
    - next_top1: percent that are nearest to the true last grid among those of all these sequences
    - move_acc: percent of moves that a ridge regression tells from z of two grids and their difference (chance is 10)
    - codes_perplexity, codes_active: perplexity of the codes of the tokens, if they have some, and percent of all codes
      that occur; the mean over parts of a token
    - codes_perplexity_target, codes_active_target: the same of the teacher's codes, if there is a teacher
    - codes_colour, codes_colour_chance: percent of the objects of view 0 (those that have a slot) whose colour is the
      commonest of those with their code, and the same after the codes were dealt out at random
    - codes_shape, codes_shape_chance: the same for their shape, which is that of another object if both have the same
      cells but for their place
    - length_acc: percent of sequences of which a ridge regression tells from z of the first and of another grid, and
      their difference, how many moves lie between (chance is 100 over the number of moves)
    - size_r2, objects_r2, colours_r2: R² of height and width, of the logarithm of one plus the number of objects, and
      of the shares of the ten colours, by ridge regressions from z
    """

    def read(loader: SequenceLoader, nearest: bool) -> Rows:
        def features(batch: Batch) -> dict[str, Tensor]:
            return _features(model, objective, spans, loader, batch, shuffled, nearest)

        return rows_of(loader, 1, features, progress)

    train = read(train_loader.restricted(train_loader.sampler.indices[:FITTED]), False)
    test = read(test_loader.restricted(test_loader.sampler.indices[:TESTED]), True)
    held_out = held_out_rows(train["index"])

    def fitted(rows: Callable[[Rows], Tensor], target: str) -> Tensor:
        return ridge_regression(rows(train), train[target], held_out, rows(test))

    others = train["compared"].flatten(0, 1)[:NEGATIVES]
    logits = cosines(test["prediction"], torch.cat([test["target"], others])) / NCE_SCALE
    own = logits[:, : len(test["target"])].diagonal()[:, None]
    among = torch.cat([own, logits[:, len(test["target"]) :]], 1)
    similarity = torch.stack([objective.prediction.similarity(one, test["target"]) for one in test["prediction"]])
    equal = (test["grid"][:, None] == test["grid"]).all(-1)
    best = similarity >= similarity.amax(1, keepdim=True) - objective.prediction.resolution(test["target"])
    moves = fitted(lambda rows: rows["pair"], "move").argmax(1) == test["move"].argmax(1)
    lengths = fitted(lambda rows: rows["ends"], "length").argmax(1) == test["length"].argmax(1)
    found = {
        "next_cf16": 100 * test["right"].double().mean().item(),
        "next_copy16": 100 * test["copied"].double().mean().item(),
        "next_top1": 100 * ((best & equal).sum(1) / best.sum(1)).double().mean().item(),
        "move_acc": 100 * moves.double().mean().item(),
        "length_acc": 100 * lengths.double().mean().item(),
    }
    if len(others) == NEGATIVES:
        found["val_nce"] = (among.logsumexp(1) - own[:, 0]).mean().item()
    if "codes" in test:
        found |= code_scores(test["codes"], model.num_codes)
        if "target_codes" in test:
            of_target = code_scores(test["target_codes"], model.num_codes)
            found |= {f"{name}_target": value for name, value in of_target.items()}
        there = test["colour"] >= 0
        codes = test["first_codes"][there]
        order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0)).to(codes.device)
        for name in ("colour", "shape"):
            labels = test[name][there].unique(return_inverse=True)[1]
            found[f"codes_{name}"] = purity(codes, labels)
            found[f"codes_{name}_chance"] = purity(codes[order], labels)
    for name in ("size", "objects", "colours"):
        found[f"{name}_r2"] = r2_score(fitted(lambda rows: rows["z"], name), test[name])
    return found


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of all pairs of rows of [N, E] and [K, E]: [N, K]."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


def code_scores(codes: Tensor, num_codes: int) -> dict[str, float]:
    """Perplexity of codes, int64 [..., G] from 0 to `num_codes` - 1, or -1 for none, and percent that occur at all.

    Each is the mean over the G parts.
    """
    perplexities, active = [], []
    for part in codes.flatten(0, -2).T:
        counts = torch.bincount(part[part >= 0], minlength=num_codes).double()
        shares = counts / counts.sum().clamp(min=1)
        perplexities.append(torch.special.entr(shares).sum().exp().item())
        active.append(100 * (counts > 0).double().mean().item())
    return {"codes_perplexity": fmean(perplexities), "codes_active": fmean(active)}


def purity(codes: Tensor, labels: Tensor) -> float:
    """Percent of tokens whose label [M] is the commonest of those with their code [M, G], int64; the mean over G.

    NaN if there are no tokens.
    """
    if not len(labels):
        return math.nan
    classes, shares = int(labels.max()) + 1, []
    for part in codes.T:
        pairs, number = torch.unique(part * classes + labels, return_counts=True)
        commonest = number.new_zeros(int(part.max()) + 1).scatter_reduce_(0, pairs // classes, number, "amax")
        shares.append(100 * (commonest.sum() / len(labels)).item())
    return fmean(shares)


def _features(
    model: SeqJEPA,
    objective: Objective,
    spans: tuple[Span, ...],
    loader: SequenceLoader,
    batch: Batch,
    shuffled: bool,
    nearest: bool,
) -> dict[str, Tensor]:
    views = batch.views
    assert isinstance(views, Tensor)
    grids = views[:, :, 0].round().long()  # [B, V, S, S]
    # in single precision: in half, what is equally near would be told apart by roundings
    output = model(views, batch.actions.roll(1, 0) if shuffled else batch.actions, None, spans).float()
    z = model.encoder(views[:, :2]).float()
    length = batch.index % (views.shape[1] - 1) + 1  # of the program from the first to another grid
    end = model.encoder(views.gather(1, length[:, None, None, None, None].expand(-1, 1, *views.shape[2:])))[
        :, 0
    ].float()
    first = grids[:, 0]
    number = (components(first) == torch.arange(first[0].numel(), device=first.device).view(1, *first[0].shape)) & (
        (first != 0) & (first < 10)
    )
    height, width = sizes(first)
    found = {
        "z": z[:, 0],
        "pair": torch.cat([z[:, 0], z[:, 1], z[:, 1] - z[:, 0]], -1),
        "ends": torch.cat([z[:, 0], end, end - z[:, 0]], -1),
        "length": F.one_hot(length - 1, views.shape[1] - 1).float(),
        "move": F.one_hot(batch.params[:, 1, MOVE].long(), 10).float(),
        "size": torch.stack([height, width], -1).float(),
        "objects": number.flatten(1).sum(1, keepdim=True).float().log1p(),
        "colours": counts(first) / (height * width)[:, None],
        "prediction": objective.prediction.comparable(output.prediction),
        "target": output.target,
        "grid": grids[:, -1].flatten(1),
    }
    if output.tokens is not None and output.tokens.codes is not None:
        found["codes"] = output.tokens.codes.long()
        found["first_codes"] = found["codes"][:, 0]  # of view 0, whose objects are looked up again for their colours
        objects = cast(GridObjects, model.encoder).objects(views[:, 0])
        slots, empty = objects.slots.flatten(1), first.new_zeros(len(first), objects.present.shape[1] + 1)
        colour = empty.scatter_(1, slots, first.flatten(1))[:, :-1]
        found["colour"] = torch.where(objects.present, colour, -1)
        found["shape"] = shape_keys(objects)
        if isinstance(model.target, EMATeacher):
            found["target_codes"] = model.target.teacher.with_tokens(views[:, -1:])[1].codes
    if not nearest:
        known = output.projections if model.target.joint and model.sharpening is None else None
        found["compared"] = (_compared(model, views) if known is None else known).float()
    if nearest:
        key = words(loader.sampler.seed, COUNTERFACTUAL_STREAM, 0, batch.index, 1, 2)[:, 0]
        others = counterfactuals(grids[:, -2], batch.params[:, -1].long(), grids[:, -1], key, ALTERNATIVES)
        candidates = torch.cat([grids[:, -1:], others], 1)
        told = _compared(model, torch.cat([candidates, grids[:, -2:-1]], 1)[:, :, None].to(views.dtype)).float()
        told, before = told[:, :-1], told[:, -1:]
        similarity, nothing = objective.prediction.similarity, objective.prediction.resolution(told)
        found["right"] = share_of_first(similarity(found["prediction"][:, None], told), nothing)
        found["copied"] = share_of_first(similarity(before, told), nothing)
    return found


def _compared(model: SeqJEPA, views: Tensor) -> Tensor:
    """What predictions of views [B, N, ...] are compared with, [B, N, E]."""
    target = model.target
    z = model.encoder(views) if target.joint else target.features(model.encoder, views)
    if model.projector is not None:
        z, shape = z.flatten(0, 1), z.shape[:2]
        z = (model.projector(z) if target.joint else target.project(model.projector, z)).unflatten(0, shape)
    return z if model.sharpening is None else model.sharpening(z)
