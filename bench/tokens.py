"""What attention over a sequence costs in its length: token statistics (ToST) beside torch's fused and naive softmax.

    python bench/tokens.py                    # 4 to 512 tokens of width 160, four heads, batch 16
    python bench/tokens.py --batch 64 --width 640

Each contender maps the same projected tokens to its output and back: forward and backward, without the linear layers
around it, which are alike. Contenders take turns. Memory is what the forward pass keeps for the backward pass beside
its input; on a GPU also the peak. Results go to bench/history, and the figure to bench/figures/tokens.png.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from common import command_line, interleaved, kept_for_backward, record, wait
from draw import FIGURES
from torch import Tensor

from seqjepa.engine.reports.figures.curves import new_figure
from seqjepa.kernels.token_statistics import token_statistics_attention, token_statistics_reference

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512)
MIB = 2**20


def naive(w: Tensor) -> Tensor:
    """Softmax attention with its N x N matrix."""
    w = w.transpose(1, 2)
    return (torch.softmax(w @ w.mT / math.sqrt(w.shape[-1]), -1) @ w).transpose(1, 2)


def fused(w: Tensor) -> Tensor:
    """torch's fused softmax attention."""
    w = w.transpose(1, 2)
    return F.scaled_dot_product_attention(w, w, w).transpose(1, 2)


def contenders(heads: int, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    temperature = torch.ones(heads, device=device)
    return {
        "token statistics": lambda w: token_statistics_attention(w, temperature),
        "token statistics, causal": lambda w: token_statistics_attention(w, temperature, causal=True),
        "token statistics, eager": lambda w: token_statistics_reference(w, temperature),
        "softmax, fused": fused,
        "softmax, naive": naive,
    }


def peak(function: Callable[[Tensor], Tensor], w: Tensor) -> int | None:
    """Bytes at the peak of forward and backward, beside w itself; None on a CPU."""
    if not w.is_cuda:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(w).sum().backward()
    w.grad = None
    return torch.cuda.max_memory_allocated() - before


def exponent(seconds: dict[int, float], low: int, high: int) -> float:
    """Exponent of the length by which the time grows from one length to another."""
    return math.log(seconds[high] / seconds[low]) / math.log(high / low)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--batch", type=int, default=16, help="number of sequences (default: %(default)s)")
    parser.add_argument("--width", type=int, default=160, help="width of a token (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="number of heads (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    functions = contenders(args.heads, device)
    rows = []
    for length in LENGTHS:
        w = torch.randn(args.batch, length, args.heads, args.width // args.heads, device=device, requires_grad=True)
        slope = torch.randn_like(w)
        repeats = max(1, 2048 // length)

        def work(function, w=w, slope=slope, repeats=repeats) -> int:
            for _ in range(repeats):
                torch.autograd.grad(function(w), w, slope)
            wait()
            return repeats

        turns = {name: (lambda function=function: work(function)) for name, function in functions.items()}
        rates = interleaved(turns, 7)
        for name, function in functions.items():
            seconds = [1 / rate for rate in rates[name]]
            memory = {"kept": kept_for_backward(partial(function, w), w), "peak": peak(function, w)}
            rows.append({"tokens": length, "contender": name, "seconds": seconds, "input": w.nbytes, **memory})
    medians = {
        name: {row["tokens"]: median(row["seconds"]) for row in rows if row["contender"] == name} for name in functions
    }
    print(f"forward and backward of {args.batch} sequences, width {args.width}, {args.heads} heads, {device.type}:")
    print(f"| tokens | {' | '.join(f'{name}, ms (MiB kept)' for name in functions)} |")
    print(f"| --- |{' --- |' * len(functions)}")
    for length in LENGTHS:
        here = {row["contender"]: row for row in rows if row["tokens"] == length}
        cells = [f"{1e3 * median(row['seconds']):.3f} ({row['kept'] / MIB:.2f})" for row in here.values()]
        print(f"| {length} | {' | '.join(cells)} |")
    growth = [f"{exponent(medians[name], LENGTHS[-2], LENGTHS[-1]):.2f}" for name in functions]
    print(f"| exponent, {LENGTHS[-2]} to {LENGTHS[-1]} | {' | '.join(growth)} |")
    print(f"\nbench/history/{record('tokens', rows, args.threads).name}")

    figure = new_figure(9, 3.8)
    panels = figure.subplots(1, 2)
    for number, name in enumerate(functions):
        found = [row for row in rows if row["contender"] == name]
        lengths = [row["tokens"] for row in found]
        panels[0].plot(lengths, [1e3 * median(row["seconds"]) for row in found], "o-", color=f"C{number}", label=name)
        panels[1].plot(lengths, [row["kept"] / row["input"] for row in found], "o-", color=f"C{number}", label=name)
    panels[0].set(title="time of forward and backward", ylabel="ms", yscale="log")
    panels[1].set(title="kept for backward, beside the input", ylabel="times the input", yscale="log")
    for axes in panels:
        axes.set(xlabel="tokens", xscale="log")
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(FIGURES / "tokens.png", dpi=120)
    print("bench/figures/tokens.png")


if __name__ == "__main__":
    main()
