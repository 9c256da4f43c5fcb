"""Which shape of a product's programs is the fastest on this GPU, beside cuBLAS: `python bench/tiles.py`.

The kernels' products are those of the coding rate and of SIGReg, at the sizes of bench/kernel_table.py. A line has the
median time of a replayed CUDA graph, with a cold L2 cache, and the error beside float64. "now" is the shape that
kernels/internal/matmul.py chooses; cuBLAS in TF32 is there for its time, not for its accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from unittest.mock import patch

import torch
from common import command_line
from torch import Tensor
from triton.testing import do_bench
from turns import captured, relative

from seqjepa.kernels.internal import matmul
from seqjepa.kernels.internal.matmul import Shape

GRAMS = (
    (1, 512, 128), (1, 256, 512), (1, 512, 640), (1, 512, 1024), (1, 512, 4096), (1, 1024, 1024), (1, 1024, 4096),
    (64, 256, 256), (16, 128, 128), (100, 100, 1024),
)  # fmt: skip
PRODUCTS = (
    (1, 512, 512, 640), (1, 1024, 512, 512), (1, 4096, 512, 512), (1, 1024, 1024, 1024), (1, 4096, 1024, 1024),
    (64, 256, 256, 256), (1, 4096, 512, 1024), (1, 4096, 1024, 512), (1, 512, 64, 1024),
)  # fmt: skip
TILES = ((32, 32), (32, 64), (64, 64), (64, 128), (128, 64), (128, 128))  # rows and columns
PRECISIONS = ("ieee", "tf32x3", "bf16x6")
SHOWN = 6


def shapes(square: bool) -> Iterator[Shape]:
    """Shapes whose tiles and registers a GPU can hold."""
    for (rows, columns), step, warps, precision in product(TILES, (16, 32, 64), (4, 8), PRECISIONS):
        fits = step * max(rows, columns) <= 4096 and rows * columns <= 2048 * warps
        if fits and (rows == columns or not square):
            yield {
                "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": step, "num_warps": warps, "PRECISION": precision
            }  # fmt: skip


def microseconds(what: str, work: Callable[[], Tensor]) -> float:
    replay = captured(what, lambda: work)
    return float("inf") if replay is None else 1e3 * do_bench(replay, warmup=2, rep=10, return_mode="median")


def compare(what: str, work: Callable[[], Tensor], library: Callable[[], Tensor], exact: Tensor, chosen: str) -> None:
    """Print the times of one product: by the library, by the shape that is chosen now, and by the fastest ones.

    `chosen` is the name of the function in matmul.py that chooses the shape.
    """
    lines = []
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        lines.append((microseconds(what, library), f"cuBLAS, {precision}", relative(library(), exact)))
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    lines.append((microseconds(what, work), "now", relative(work(), exact)))
    found = []
    for shape in shapes(square=chosen == "gram_shape"):
        answer = shape if chosen == "gram_shape" else (shape,)
        with patch.object(matmul, chosen, lambda capability, answer=answer: answer):
            try:
                found.append((microseconds(what, work), " ".join(map(str, shape.values())), relative(work(), exact)))
            except Exception as error:  # one that the compiler or the GPU refuses is no candidate
                print(f"{what}, {shape}: {type(error).__name__}")
    print(what)
    for time, name, error in lines + sorted(found)[:SHOWN]:
        print(f"  {time:9.1f} µs  {error:.1e}  {name}", flush=True)


def gram(batch: int, size: int, inner: int, device: torch.device) -> None:
    y, c = torch.randn(batch, inner, size, device=device).mT, torch.ones(batch, device=device)
    exact = y.double() @ y.double().mT
    compare(
        f"Gram matrix, {batch} of ({size}, {inner})", lambda: matmul.gram(y, c), lambda: y @ y.mT, exact, "gram_shape"
    )


def multiply(batch: int, rows: int, inner: int, columns: int, device: torch.device) -> None:
    a, b = torch.randn(batch, rows, inner, device=device), torch.randn(batch, inner, columns, device=device)
    what = f"product, {batch} of ({rows}, {inner}) by ({inner}, {columns})"
    compare(what, lambda: matmul.matmul(a, b), lambda: a @ b, a.double() @ b.double(), "product_shapes")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", choices=("gram", "product"), help="one kind of product")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed")
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("rows, columns and step of a tile, warps, precision")
    for kind, function, cases in (("gram", gram, GRAMS), ("product", multiply, PRODUCTS)):
        if options.only in (None, kind):
            for case in cases:
                function(*case, device)


if __name__ == "__main__":
    main()
