"""Programs of moves on grids: which step comes next, drawn so that it does something, and the vector that tells of it.

All draws are integer arithmetic on counter-based words (`seqjepa.loaders.draws`), so that a program is the same in any
batch, on any device and after a restart.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.philox import philox
from .moves import (
    COLUMNS,
    DX,
    DY,
    FIRST,
    LEVEL,
    MOVE,
    NUM_COLOURS,
    OUTSIDE,
    SECOND,
    THIRD,
    TURNS,
    Move,
    X,
    Y,
    apply,
    commonest,
    present,
    sizes,
    touching,
)

ACTION_DIM = 49
FACTORS = {
    "move": slice(0, 10),
    "turns": slice(10, 14),
    "shift": slice(14, 16),
    "place": slice(16, 18),
    "level": slice(18, 19),
    "colours": slice(19, 49),
}
VALID_TRIES = 4
ORIGIN_TRIES, ORIGIN_PROGRAMS = 8, 16
LEAST_SIDE, LEAST_COLOURS = 3, 2  # of a grid that a valid step may make

# the columns that each move reads
READS = torch.zeros(len(Move), len(COLUMNS), dtype=torch.bool)
for _move, _columns in {
    Move.ROTATE: (TURNS,),
    Move.TRANSLATE: (DX, DY, FIRST),
    Move.RECOLOUR: (FIRST, SECOND),
    Move.THRESHOLD: (LEVEL, FIRST, SECOND),
    Move.FLOOD: (Y, X, FIRST),
    Move.EXTRACT: (Y, X, FIRST),
    Move.MERGE: (FIRST, SECOND, THIRD),
}.items():
    READS[_move, list(_columns)] = True
READS[:, MOVE] = True


def draw_program(
    grids: Tensor, key: Tensor, steps: int, draws: Literal["valid", "origin"] = "valid"
) -> tuple[Tensor, Tensor]:
    """The grids that a program of some steps passes through, and its steps.

    Args:
        grids: to begin with, int64 [B, S, S].
        key: two random words for each grid, int64 [B, 2].
        steps: number n of steps.
        draws: valid: parameters for which the move can do something, and up to four draws until a step changes the
            grid and leaves two colours and three rows and columns; origin: parameters at random, up to eight draws
            until a step changes the grid, and up to 16 programs until one changes it.

    Returns:
        Grids [B, n + 1, S, S], and steps [B, n, 10], in which what a move does not read is 0.
    """
    if draws == "valid":
        frames, taken = [grids], []
        for number in range(steps):
            step, after = _valid_step(frames[-1], key, number)
            taken.append(step)
            frames.append(after)
        return torch.stack(frames, 1), torch.stack(taken, 1)
    frames = grids[:, None].repeat(1, steps + 1, 1, 1)
    taken = torch.zeros(len(grids), steps, len(COLUMNS), dtype=torch.int64, device=grids.device)
    rows = torch.arange(len(grids), device=grids.device)
    for program in range(ORIGIN_PROGRAMS):
        for number in range(steps):
            step, after = _origin_step(frames[rows, number], grids[rows], key[rows], (program << 8) + number)
            taken[rows, number], frames[rows, number + 1] = step, after
        rows = rows[(frames[rows, -1] == grids[rows]).flatten(1).all(1)]
        if not len(rows):
            break
    return frames, taken


def counterfactuals(grids: Tensor, steps: Tensor, after: Tensor, key: Tensor, number: int) -> Tensor:
    """What grids could have become instead, by other steps.

    Half of the steps are the same move with other parameters, if two draws find some that make another grid; the rest
    are any moves. Each is drawn up to eight times until its grid differs from the true one and from the others.

    Args:
        grids: int64 [B, S, S].
        steps: that were taken, int64 [B, 10].
        after: the grids after them, int64 [B, S, S].
        key: two random words for each grid, int64 [B, 2].
        number: of alternatives.

    Returns:
        int64 [B, number, S, S].
    """
    found = after[:, None].repeat(1, number + 1, 1, 1)  # the first is the true one
    for place in range(1, number + 1):
        rows = torch.arange(len(grids), device=grids.device)
        for attempt in range(2 * VALID_TRIES):
            before, words = grids[rows], _words(key[rows], place, 256 + attempt)
            same = place <= number // 2 and attempt < 2
            move = steps[rows, MOVE] if same else _below(words[:, 0], len(Move))
            found[rows, place] = apply(before, _known(_valid_parameters(before, move, words)))
            again = (found[rows, place, None] == found[rows, :place]).flatten(2).all(2).any(1)
            again |= (found[rows, place] == before).flatten(1).all(1)
            rows = rows[again]
            if not len(rows):
                break
    return found[:, 1:]


def _words(key: Tensor, number: int, attempt: int) -> Tensor:
    """Eight random words for an attempt at a step, int64 [B, 8]."""
    block = torch.arange(2, device=key.device)
    lanes = philox((key[:, :1], key[:, 1:]), (block, number, attempt, 0))
    return torch.stack(lanes, -1).flatten(1)


def _below(word: Tensor, number: Tensor | int) -> Tensor:
    """A word as a number that is uniform on 0 to `number` - 1; 0 if there is none."""
    return word * number >> 32


def _one_of(mask: Tensor, word: Tensor) -> Tensor:
    """The position of one of the true entries of a mask [B, K], all of them alike; 0 if there is none."""
    rank = mask.long().cumsum(1)
    chosen = _below(word, rank[:, -1])[:, None] + 1
    return ((rank == chosen) & mask).byte().argmax(1)


def _but(word: Tensor, taken: Tensor) -> Tensor:
    """A colour that is not `taken`."""
    found = _below(word, NUM_COLOURS - 1)
    return found + (found >= taken).long()


def _known(step: Tensor) -> Tensor:
    """A step [B, 10] without what its move does not read."""
    return torch.where(READS.to(step.device)[step[:, MOVE]], step, 0)


def _valid_step(grids: Tensor, key: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The first of four draws that is accepted, or the last; and the grids after it."""
    step = torch.zeros(len(grids), len(COLUMNS), dtype=torch.int64, device=grids.device)
    after, rows = grids.clone(), torch.arange(len(grids), device=grids.device)
    for attempt in range(VALID_TRIES):
        before = grids[rows]
        words = _words(key[rows], number, attempt)
        step[rows] = drawn = _known(_valid_parameters(before, _below(words[:, 0], len(Move)), words))
        after[rows] = found = apply(before, drawn)
        height, width = sizes(found)
        large = (height >= LEAST_SIDE) & (width >= LEAST_SIDE)
        changed = (found != before).flatten(1).any(1)
        rows = rows[~(changed & large & (present(found).sum(1) >= LEAST_COLOURS))]
        if not len(rows):
            break
    return step, after


def _valid_parameters(grids: Tensor, move: Tensor, words: Tensor) -> Tensor:
    """Steps of these moves, int64 [N], with parameters that the grid allows."""
    a, b, c, d = (words[:, number] for number in (1, 2, 3, 4))
    there, side = present(grids), grids.shape[-1]
    height, width = sizes(grids)
    step = torch.zeros(len(grids), len(COLUMNS), dtype=torch.int64, device=grids.device)
    step[:, MOVE], step[:, TURNS] = move, 1 + _below(a, 3)
    far_x, far_y = (width // 2).clamp(min=1), (height // 2).clamp(min=1)
    step[:, DX], step[:, DY] = _below(a, 2 * far_x + 1) - far_x, _below(b, 2 * far_y + 1) - far_y
    # a colour that is there, but not the largest: the level is then between two of them
    highest = (there.long() * torch.arange(1, NUM_COLOURS + 1, device=grids.device)).argmax(1)
    lower = there & ~F.one_hot(highest, NUM_COLOURS).bool()
    step[:, LEVEL] = _one_of(lower, a)
    inside, common = grids != OUTSIDE, commonest(grids)[:, None, None]
    seeds = torch.where((move == Move.EXTRACT)[:, None, None], inside & (grids != common), inside)
    cell = _one_of(seeds.flatten(1), a)
    step[:, Y], step[:, X] = cell // side, cell % side
    colour = grids.flatten(1).gather(1, cell[:, None])[:, 0]
    source = _one_of(there, a)
    first = _below(c, NUM_COLOURS)
    first = torch.where(move == Move.TRANSLATE, 0, first)
    first = torch.where(move == Move.RECOLOUR, source, first)
    first = torch.where(move == Move.FLOOD, _but(c, colour), first)
    step[:, FIRST], step[:, SECOND], step[:, THIRD] = first, _but(d, first), _below(d, NUM_COLOURS)
    rows = (move == Move.MERGE).nonzero()[:, 0]
    if len(rows):
        masks = F.one_hot(grids[rows], NUM_COLOURS + 1)[..., 1:NUM_COLOURS].movedim(-1, 1).bool()  # 1 to 9
        beside = torch.einsum("naij,nbij->nab", touching(masks).float(), masks.float()) > 0.5
        beside &= ~torch.eye(NUM_COLOURS - 1, dtype=torch.bool, device=grids.device)
        pair = _one_of(beside.flatten(1), a[rows])
        pair = torch.where(beside.flatten(1).any(1), pair, 1)  # of colours 1 and 2, which do not touch
        step[rows, FIRST], step[rows, SECOND] = 1 + pair // (NUM_COLOURS - 1), 1 + pair % (NUM_COLOURS - 1)
    return step


def _origin_step(grids: Tensor, first: Tensor, key: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The first of eight draws that changes the grid, or the last; colours are those of the `first` grid, and 0."""
    palette = present(first)
    palette[:, 0] = True
    step = torch.zeros(len(grids), len(COLUMNS), dtype=torch.int64, device=grids.device)
    after, rows = grids.clone(), torch.arange(len(grids), device=grids.device)
    move = None
    for attempt in range(ORIGIN_TRIES):
        words, before = _words(key[rows], number, attempt), grids[rows]
        move = _below(words[:, 0], len(Move)) if move is None else move  # a retry draws other parameters
        step[rows] = drawn = _known(_origin_parameters(before, move, palette[rows], words))
        after[rows] = found = apply(before, drawn)
        still = (found == before).flatten(1).all(1)
        rows, move = rows[still], move[still]
        if not len(rows):
            break
    return step, after


def _origin_parameters(grids: Tensor, move: Tensor, palette: Tensor, words: Tensor) -> Tensor:
    """Parameters that need not fit the grid."""
    a, b, c, d, e = (words[:, number] for number in range(1, 6))
    height, width = sizes(grids)
    colours = palette.clone()
    colours[:, 0] = False
    colours[:, 0] |= ~colours.any(1)  # a palette of the background alone
    step = torch.zeros(len(grids), len(COLUMNS), dtype=torch.int64, device=grids.device)
    step[:, MOVE], step[:, TURNS] = move, 1 + _below(a, 3)
    far_x, far_y = (width // 2).clamp(min=1), (height // 2).clamp(min=1)
    step[:, DX], step[:, DY] = _below(a, 2 * far_x + 1) - far_x, _below(b, 2 * far_y + 1) - far_y
    step[:, Y], step[:, X] = _below(a, height), _below(b, width)
    highest = (palette.long() * torch.arange(1, NUM_COLOURS + 1, device=grids.device)).argmax(1)
    step[:, LEVEL] = _below(a, highest + 1)
    any_of, source = _one_of(palette, c), _one_of(colours, c)
    named = (move == Move.RECOLOUR) | (move == Move.MERGE)
    step[:, FIRST] = torch.where(named, source, any_of)
    first = F.one_hot(source, NUM_COLOURS).bool()
    rest = palette & ~first  # the target of a recolouring
    others = colours & ~first
    others = torch.where(others.any(1, keepdim=True), others, colours)
    second = torch.where(move == Move.RECOLOUR, _one_of(rest, d), _one_of(palette, d))
    step[:, SECOND] = torch.where(move == Move.MERGE, _one_of(others, d), second)
    step[:, THIRD] = _one_of(palette, e)
    return step


def encode(steps: Tensor, side: int) -> Tensor:
    """Steps [..., 10] as actions, float32 [..., 49]; what a move does not read is 0.

    Its dimensions are the move (10), the number of quarter turns (4), the shift and the place of a cell over half of
    the canvas's side (2 and 2), the level over the largest colour (1), and three colours (30).
    """
    reads = READS.to(steps.device)[steps[..., MOVE]].float()

    def known(column: int, values: Tensor) -> Tensor:
        return values * reads[..., column, None]

    half = side / 2
    parts = [F.one_hot(steps[..., MOVE], len(Move)).float(), known(TURNS, F.one_hot(steps[..., TURNS], 4).float())]
    parts += [known(column, steps[..., column, None] / half) for column in (DX, DY, Y, X)]
    parts.append(known(LEVEL, steps[..., LEVEL, None] / (NUM_COLOURS - 1)))
    parts += [known(column, F.one_hot(steps[..., column], NUM_COLOURS).float()) for column in (FIRST, SECOND, THIRD)]
    return torch.cat(parts, -1)
