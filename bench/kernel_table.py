"""Times the kernels beside what they replace: `python bench/kernel_table.py [--device cpu] [--only sigreg,ema]`.

A contender is timed only if its value and gradient agree with float64's; how it is timed stands in turns.py.
`graph_p50_us` is the same work replayed from a CUDA graph. A forward runs with gradients enabled. `least_us` is the
time that bench/roofline.py allows the case: bytes over bandwidth or FLOPs over their rate, by a known card's published
peaks. Elsewhere one product and one sum are measured for it, and what fits in a cache can be faster. Peak memory is
what torch's allocator held beyond the inputs, and a backward's includes the forward; workspaces of libraries are not
counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from common import command_line
from rich.console import Console
from rich.table import Table
from roofline import Work, factor_work, rate_work, sigreg_work
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet18
from turns import Bench, Contender, checked, compiled, differentiable, relative

from seqjepa.kernels import AdamWEMA, coding_rate, ema_update_, sigreg
from seqjepa.kernels.adamw_step import adamw_ema_reference
from seqjepa.kernels.coding_rate import coding_rate_reference
from seqjepa.kernels.directions import directions
from seqjepa.kernels.drop_in.lejepa import EppsPulley, SlicingUnivariateTest
from seqjepa.kernels.drop_in.lightly import EMPSSLLoss
from seqjepa.kernels.ema import ema_reference
from seqjepa.kernels.internal import cholesky
from seqjepa.kernels.sigreg import sigreg_reference

try:
    from timm.utils import ModelEmaV3
except ImportError:
    ModelEmaV3 = None
try:
    from lightly import loss as lightly
except ImportError:
    lightly = None

SINGLE = ((128, 512), (512, 256), (512, 640), (1024, 512), (4096, 512), (1024, 1024), (4096, 1024))  # rows, width
BATCHED = ((64, 256, 256), (16, 128, 128), (100, 100, 1024))  # the last is EMP-SSL's: patches, rows, width
CLASSES = (10, 1000, 128)
FACTORS = [(batch, n) for n in (64, 128, 256, 512, 1024) for batch in (1, 16, 64)]
SLICED = ((4096, 512, 1024), (512, 64, 1024), (256, 128, 256))  # samples, dimensions, slices
VIEWS = ((20, 100, 512), (4, 256, 128))  # of EMP-SSL: views, rows, width
SMALL_SLICED = ((256, 64, 256), (64, 32, 64))
EPS, LR, DECAY, BETAS, ADAM_EPS, WEIGHT_DECAY = 0.2, 1e-3, 0.996, (0.9, 0.999), 1e-8, 1e-2
OURS, LOGDET, CHOLESKY, EAGER, COMPILED = "ours", "torch.logdet", "cholesky_ex", "eager", "torch.compile"
OURS_COMPILED = "ours, torch.compile"
ONE_PROGRAM, LIBRARY = "one Triton program", "cholesky_ex, triangular solve, Gram"
LERP, SCHEDULED, FUSED = "_foreach_lerp_", "ours, decay on the device", "AdamW(fused), _foreach_lerp_"
AVERAGED, TIMM, COPY = "AveragedModel", "timm ModelEmaV3", "copy_"
NETWORK, SMALL = "ResNet-18, 11.2 M parameters", "62 tensors of 64 elements"
SINGLE_RATE = {"kernel": "coding_rate", "case": "(512, 640)", "mode": "both", "dtype": "float32"}
BATCHED_RATE = {"kernel": "coding_rate", "case": "(64, 256, 256)", "mode": "both"}
PATCHES = {"kernel": "coding_rate", "case": "(100, 100, 1024)", "mode": "both"}
STATISTIC = {"kernel": "sigreg", "case": "(4096, 512), 1024 slices", "mode": "both"}
STEP = {"kernel": "AdamWEMA", "case": NETWORK}
TARGETS = (  # device, what, rows, column, dividend, divisor, least
    ("cpu", "EMP-SSL's 100 patches, time of torch.logdet's loop / ours", PATCHES, "p50_us", LOGDET, OURS, 10),
    ("cuda", "coding rate (512, 640), time of torch.logdet / ours", SINGLE_RATE, "p50_us", LOGDET, OURS, 2),
    ("cuda", "coding rate (64, 256, 256), time of torch.logdet's loop / ours", BATCHED_RATE, "p50_us", LOGDET, OURS, 5),
    ("cuda", "SIGReg (4096, 512), 1024 slices, time of eager / ours", STATISTIC, "p50_us", EAGER, OURS, 4),
    ("cuda", "SIGReg (4096, 512), 1024 slices, peak memory of eager / ours", STATISTIC, "peak_mib", EAGER, OURS, 10),
    ("cuda", "AdamWEMA, bytes a second of ours / of a copy", STEP, "gb_per_s", OURS, COPY, 0.85),
    ("cuda", "AdamWEMA, the same from CUDA graphs", STEP, "graph_gb_per_s", OURS, COPY, 0.85),
)


def features(*shape: int, device: torch.device) -> Tensor:
    """Rows of unit length whose spectrum falls as a power law."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator) / torch.arange(1, shape[-1] + 1) ** 0.5
    return nn.functional.normalize(z, dim=-1).to(device)


def inflated(z: Tensor, members: Tensor | None = None, *, center: bool = False) -> Tensor:
    """I + d / (B eps) ZᵀZ as the original codes write it, for z [..., B, d]; for classes, with weighted rows."""
    z = z.float()  # LU and Cholesky know no bfloat16
    if center:
        z = z - z.mean(-2, keepdim=True)
    gram = z.mT @ z if members is None else z.mT @ (members[..., None] * z)
    rows = z.shape[-2] if members is None else members.sum(-1)[..., None, None]
    return torch.eye(z.shape[-1], device=z.device) + z.shape[-1] / (rows * EPS) * gram


def by_logdet(z: Tensor, *, center: bool = False) -> Tensor:
    return torch.logdet(inflated(z, center=center))


def class_by_logdet(z: Tensor, member: Tensor) -> Tensor:
    """MCR²'s rate of one class, whose membership is a diagonal matrix [B, B]."""
    scale = z.shape[-1] / (member.trace() * EPS)
    return torch.logdet(torch.eye(z.shape[-1], device=z.device) + scale * (z.T @ member @ z))


def by_cholesky(z: Tensor, members: Tensor | None = None, *, center: bool = False) -> Tensor:
    factor, _ = torch.linalg.cholesky_ex(inflated(z, members, center=center))
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum()


def each(rate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The loop over a batch, as in the original codes."""
    return lambda z: torch.stack([rate(one) for one in z.unbind()]).sum()


def coding_rate_rows(bench: Bench) -> None:
    capture = OURS, CHOLESKY  # LU is not safe in a graph (pytorch/pytorch#195731)
    for rows, width in SINGLE:
        centered = partial(by_logdet, center=True)
        functions = {
            OURS: partial(coding_rate, eps=EPS),
            LOGDET: centered,
            CHOLESKY: partial(by_cholesky, center=True),
            COMPILED: compiled(centered),
        }
        exact = partial(coding_rate_reference, scale=width / EPS)
        for dtype in (torch.float32, torch.bfloat16):
            z = features(rows, width, device=bench.device).to(dtype)
            needs = partial(rate_work, 1, rows, width, dtype.itemsize)
            differentiable(bench, "coding_rate", f"({rows}, {width})", z, functions, exact, capture, needs)
    for batch, rows, width in BATCHED:
        functions = {
            OURS: lambda z: coding_rate(z, eps=EPS, center=False).sum(),
            LOGDET: each(by_logdet),
            CHOLESKY: by_cholesky,
            COMPILED: each(compiled(by_logdet)),
        }
        exact = each(partial(coding_rate_reference, scale=width / EPS, center=False))
        z = features(batch, rows, width, device=bench.device)
        needs = partial(rate_work, batch, rows, width, 4)
        differentiable(bench, "coding_rate", f"({batch}, {rows}, {width})", z, functions, exact, capture, needs)
    classes, rows, width = CLASSES
    z = features(rows, width, device=bench.device)
    labels = torch.arange(rows, device=bench.device) % classes
    members = nn.functional.one_hot(labels).T.float()  # [classes, rows]
    diagonal = torch.diag_embed(members)
    compiled_class = compiled(class_by_logdet)
    functions = {
        OURS: lambda z: coding_rate(z, eps=EPS, center=False, weights=members).sum(),
        LOGDET: lambda z: torch.stack([class_by_logdet(z, member) for member in diagonal]).sum(),
        CHOLESKY: lambda z: by_cholesky(z, members),
        COMPILED: lambda z: torch.stack([compiled_class(z, member) for member in diagonal]).sum(),
    }
    case = f"({rows}, {width}), {classes} classes"

    def exact(z: Tensor) -> Tensor:
        return coding_rate_reference(z, width / EPS, members.double(), center=False).sum()

    needs = partial(rate_work, classes, rows, width, 4, shared=True)
    differentiable(bench, "coding_rate", case, z, functions, exact, capture, needs)


def factor_rows(bench: Bench) -> None:
    """Time log-determinants and inverses by both algorithms, at sizes on both sides of the switch between them."""
    usual = cholesky.ONE_PROGRAM

    def factored(largest: int, matrix: Tensor) -> tuple[Tensor, Tensor]:
        cholesky.ONE_PROGRAM = largest
        logdet, factor, info = cholesky.factor_logdet(matrix, alone=False)
        return logdet, cholesky.inverse_of(factor, info, torch.ones_like(logdet), alone=False)

    for batch, n in FACTORS:
        matrix = inflated(features(batch, 2 * n, n, device=bench.device))
        exact = [torch.linalg.slogdet(matrix.double())[1], torch.linalg.inv(matrix.double())]
        routes = {ONE_PROGRAM: n, LIBRARY: 0}
        if bench.device.type == "cpu":
            del routes[ONE_PROGRAM]
        contenders = {}
        for name, largest in routes.items():
            results = factored(largest, matrix.clone())
            error = max(relative(a, b) for a, b in zip(results, exact, strict=True))
            contenders[name] = Contender(
                lambda matrix=matrix, largest=largest: partial(factored, largest, matrix.clone()),  # is overwritten
                checked(f"factor {batch} x {n}, {name}", error, 1e-3),
                factor_work(batch, n),
                capture=True,
            )
        bench.measure("factor", f"({batch}, {n}, {n})", matrix.dtype, "forward", contenders)
    cholesky.ONE_PROGRAM = usual
    if bench.device.type == "cpu":
        print("the factor in one Triton program needs a GPU: only the library's route was measured")


def eager_sigreg(z: Tensor, unit: Tensor, table: Tensor) -> Tensor:
    """LeJEPA's form: cosine and sine of samples x slices x knots."""
    t, phi, weight = table
    angle = (z.float() @ unit)[..., None] * t
    error = (angle.cos().mean(-3) - phi) ** 2 + angle.sin().mean(-3) ** 2
    return z.shape[-2] * (error @ (weight * phi)).mean(-1)


def drawn_sigreg(z: Tensor, slices: int, table: Tensor) -> Tensor:
    """The same with new directions, as in LeJEPA."""
    return eager_sigreg(z, nn.functional.normalize(torch.randn(z.shape[-1], slices, device=z.device), dim=0), table)


def knots_of(device: torch.device) -> Tensor:
    """Knots, φ and weights [3, 16]; zero's term is zero, and without it the baselines are faster."""
    t = torch.linspace(0, 3, 17)[1:]
    weight = torch.full_like(t, 2 * 3 / 16)  # of the trapezoidal rule, doubled for the other half
    weight[-1] /= 2
    return torch.stack([t, torch.exp(-(t**2) / 2), weight]).to(device)


def sigreg_rows(bench: Bench) -> None:
    table, seed = knots_of(bench.device), torch.tensor(0, device=bench.device)
    for samples, width, slices in SLICED:
        unit = directions(seed, width, slices)
        ours, draws = partial(sigreg, num_slices=slices, seed=seed), partial(drawn_sigreg, slices=slices, table=table)
        functions = {
            OURS: ours,
            OURS_COMPILED: compiled(ours),
            EAGER: partial(eager_sigreg, unit=unit, table=table),
            COMPILED: partial(compiled(eager_sigreg), unit=unit, table=table),
        }
        timed = {EAGER: draws, COMPILED: compiled(draws)}  # ours draws directions too
        exact = partial(sigreg_reference, unit=unit.double())
        case = f"({samples}, {width}), {slices} slices"
        z = torch.randn(samples, width, generator=torch.Generator().manual_seed(0)).to(bench.device)
        for dtype in (torch.float32, torch.bfloat16) if width == SLICED[1][1] else (torch.float32,):
            needs = partial(sigreg_work, samples, width, slices, table.shape[1], size=dtype.itemsize)
            differentiable(bench, "sigreg", case, z.to(dtype), functions, exact, functions, needs, timed)


def drop_in_rows(bench: Bench) -> None:
    """Classes of other packages and ours of the same names, in eager mode: what changing an import brings."""
    for views, rows, width in VIEWS if lightly is not None else ():
        theirs = lightly.EMPSSLLoss()
        functions = {OURS: partial(of_views, EMPSSLLoss()), "lightly": partial(of_views, theirs)}
        z = features(views, rows, width, device=bench.device)
        needs = partial(rate_work, views, rows, width, 4)
        case = f"{views} views of ({rows}, {width})"
        differentiable(bench, "EMPSSLLoss", case, z, functions, partial(of_views, theirs), functions, needs)
    table = knots_of(bench.device)
    for samples, width, slices in SMALL_SLICED:
        test = SlicingUnivariateTest(EppsPulley(), num_slices=slices).to(bench.device)
        unit = directions(test.global_step, width, slices)

        def first_call(z: Tensor, test: SlicingUnivariateTest = test) -> Tensor:
            test.global_step.zero_()
            return test(z)

        functions = {OURS: first_call, EAGER: partial(eager_sigreg, unit=unit, table=table)}
        timed = {OURS: test, EAGER: partial(drawn_sigreg, slices=slices, table=table)}
        z = torch.randn(samples, width, generator=torch.Generator().manual_seed(0)).to(bench.device)
        exact, case = partial(sigreg_reference, unit=unit.double()), f"({samples}, {width}), {slices} slices"
        needs = partial(sigreg_work, samples, width, slices, table.shape[1])
        differentiable(bench, "SlicingUnivariateTest", case, z, functions, exact, functions, needs, timed)
    if lightly is None:
        print("lightly is not installed: its EMPSSLLoss is not in the table")


def of_views(loss: Callable[[list[Tensor]], Tensor], z: Tensor) -> Tensor:
    return loss(list(z.unbind()))


def network(device: torch.device, case: str = NETWORK) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A module, its parameters, and a teacher with other values."""
    torch.manual_seed(0)
    student = resnet18(num_classes=10) if case == NETWORK else nn.ParameterList(torch.randn(62, 64).unbind())
    parameters = [p.detach() for p in student.to(device).parameters()]
    return student, parameters, [p + 0.02 * torch.randn_like(p) for p in parameters]


def steps(
    bench: Bench,
    kernel: str,
    case: str,
    bytes_each: int,
    numel: int,
    works: dict[str, Callable],
    errors: dict[str, float],
) -> None:
    """Time steps on a module's parameters, taking turns with a plain copy."""
    source = torch.ones(2**28 if bench.device.type == "cuda" else 2**26, device=bench.device)
    target = torch.zeros_like(source)
    contenders = {
        name: Contender(
            partial(lambda work: work, work), errors[name], Work(bytes_each * numel), capture=name != AVERAGED
        )
        for name, work in works.items()  # AveragedModel waits for the device
    }
    target.copy_(source)
    copy = partial(target.copy_, source)
    contenders[COPY] = Contender(lambda: copy, relative(target, source), Work(8 * source.numel()), capture=True)
    bench.measure(kernel, case, torch.float32, "step", contenders)


def ema_rows(bench: Bench, case: str) -> None:
    student, parameters, start = network(bench.device, case)
    decay = torch.tensor(DECAY, dtype=torch.float64, device=bench.device)
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(student)  # the first call copies
    lerp = compiled(lambda teacher, student: torch._foreach_lerp_(teacher, student, 1 - DECAY))
    own = {name: [t.clone() for t in start] for name in (OURS, SCHEDULED, LERP, COMPILED)}
    teachers = {**own, AVERAGED: [p.detach() for p in averaged.module.parameters()]}
    works = {
        OURS: lambda: ema_update_(own[OURS], parameters, DECAY),
        SCHEDULED: lambda: ema_update_(own[SCHEDULED], parameters, decay),
        LERP: lambda: torch._foreach_lerp_(own[LERP], parameters, 1 - DECAY),
        COMPILED: lambda: lerp(own[COMPILED], parameters),
        AVERAGED: lambda: averaged.update_parameters(student),
    }
    if ModelEmaV3 is None:
        print("timm is not installed: its ModelEmaV3 is not in the table")
    else:
        shadow = ModelEmaV3(student, decay=DECAY)
        teachers[TIMM] = [p.detach() for p in shadow.module.parameters()]
        works[TIMM] = lambda: shadow.update(student)
    exact = [ema_reference(t.double(), p.double(), DECAY) - t for t, p in zip(start, parameters, strict=True)]
    errors = {}
    for name, work in works.items():
        torch._foreach_copy_(teachers[name], start)
        work()
        moves = [t.double() - before for t, before in zip(teachers[name], start, strict=True)]
        # of the move, 0.4 % of a difference, float32 keeps four digits
        errors[name] = checked(f"ema, {name}", relative(moves, exact), 1e-3)
    own.update(dict.fromkeys(own, own[OURS]))  # where in memory tensors lie is worth up to a fifth
    steps(bench, "ema_update_", case, 12, sum(t.numel() for t in start), works, errors)


def adamw_rows(bench: Bench, case: str) -> None:
    _, start, start_teacher = network(bench.device, case)
    grads = [torch.cos(1e3 * p) for p in start]
    exact = three_steps(start, grads, start_teacher)
    works, errors = {}, {}
    # all have the same tensors, but for their moments
    parameters, teacher = [p.clone() for p in start], [t.clone() for t in start_teacher]
    for p in parameters:
        p.grad = torch.empty_like(p)
    for name, build in ((OURS, our_adamw), (FUSED, fused_adamw), (COMPILED, compiled_adamw)):
        for lists in ((parameters, start), (teacher, start_teacher), ([p.grad for p in parameters], grads)):
            torch._foreach_copy_(*lists)
        works[name] = build(parameters, teacher, bench.device.type == "cuda")
        for _ in range(3):
            works[name]()
            torch._foreach_mul_([p.grad for p in parameters], -0.5)
        moves = [[now.double() - before for now, before in zip(*lists, strict=True)]
                 for lists in ((parameters, start), (teacher, start_teacher))]  # fmt: skip
        error = max(relative(*pair) for pair in zip(moves, exact, strict=True))
        errors[name] = checked(f"adamw, {name}", error, 1e-3)
    steps(bench, "AdamWEMA", case, 36, sum(t.numel() for t in start), works, errors)


def our_adamw(parameters: list[Tensor], teacher: list[Tensor], on_gpu: bool) -> Callable[[], object]:
    pairs = zip(parameters, teacher, strict=True)
    return AdamWEMA(parameters, LR, BETAS, ADAM_EPS, WEIGHT_DECAY, ema_decay=DECAY, teacher=pairs).step


def fused_adamw(parameters: list[Tensor], teacher: list[Tensor], on_gpu: bool) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(parameters, LR, BETAS, ADAM_EPS, WEIGHT_DECAY, fused=True, capturable=on_gpu)

    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(teacher, parameters, 1 - DECAY)

    return step


def compiled_adamw(parameters: list[Tensor], teacher: list[Tensor], on_gpu: bool) -> Callable[[], object]:
    """AdamW's own function and the EMA in one graph that Inductor can fuse; `optimizer.step` would break the graph."""

    def step(parameters, grads, first, second, counts, teacher):
        adamw(
            parameters, grads, first, second, [], counts, foreach=True, capturable=True, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=LR, weight_decay=WEIGHT_DECAY, eps=ADAM_EPS, maximize=False,
        )  # fmt: skip
        torch._foreach_lerp_(teacher, parameters, 1 - DECAY)

    # capturable on a CPU too: else Inductor fails on foreach operations with a 0-dim tensor (torch 2.15)
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    counts = [torch.zeros((), device=parameters[0].device) for _ in parameters]
    return partial(compiled(step), parameters, [p.grad for p in parameters], *moments, counts, teacher)


def three_steps(start: list[Tensor], grads: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Changes of parameters and teachers in float64, with a gradient that changes from step to step."""
    moves = [], []
    for p, grad, t in zip(start, grads, teacher, strict=True):
        now, m, v, follower = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double(), t.double()
        for step in range(3):
            now, m, v, follower = adamw_ema_reference(
                now, grad.double() * (-0.5) ** step, m, v, step + 1, follower, lr=LR, beta1=BETAS[0], beta2=BETAS[1],
                eps=ADAM_EPS, weight_decay=WEIGHT_DECAY, ema_decay=DECAY,
            )  # fmt: skip
        moves[0].append(now - p)
        moves[1].append(follower - t)
    return moves


def show(bench: Bench, console: Console) -> None:
    """Print medians with p20 and p80, and the least time; with a gradient, of forward and backward together."""
    for kernel in dict.fromkeys(row["kernel"] for row in bench.rows):
        rows = [row for row in bench.rows if row["kernel"] == kernel]
        if any(row["mode"] == "both" for row in rows):
            rows = [row for row in rows if row["mode"] == "both"]
        providers = list(dict.fromkeys(row["provider"] for row in rows))
        title = f"{kernel}: p50 (p20 to p80) in ms, {rows[0]['mode']}, beside the least that the hardware allows"
        table = Table("case", "least", *providers, title=title)
        for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
            found = [
                bench.row(kernel=kernel, case=case, dtype=dtype, mode=rows[0]["mode"], provider=name)
                for name in providers
            ]
            least = f"{found[0]['least_us'] / 1e3:.3g}"
            table.add_row(f"{case}\n{dtype}, n = {found[0]['n']}", least, *map(cell, found))
        console.print(table)


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    p20, p50, p80 = (f"{row[key] / 1e3:.3g}" for key in ("p20_us", "p50_us", "p80_us"))
    graph = "" if row["graph_p50_us"] is None else f", graph {row['graph_p50_us'] / 1e3:.3g}"
    speed = f"{row['peak_mib']:.1f} MiB" if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f} GB/s"
    return f"{p50} ({p20} to {p80}){graph}\n{speed}"


def judge(bench: Bench) -> None:
    """Print which targets are reached or missed, by medians."""
    for device, what, where, column, above, below, least in TARGETS:
        above, below = (bench.row(**where, provider=name) for name in (above, below))
        if device != bench.device.type:
            print(f"needs {device}: {what}")
        elif above is None or below is None or None in (above[column], below[column]):
            print(f"not measured: {what}")
        else:
            ratio = above[column] / below[column]
            print(f"{'reached' if ratio >= least else 'MISSED'} {ratio:.2f}, at least {least}: {what}")


SECTIONS = {
    "coding_rate": coding_rate_rows,
    "factor": factor_rows,
    "sigreg": sigreg_rows,
    "drop_in": drop_in_rows,
    "ema": lambda bench: [ema_rows(bench, case) for case in (NETWORK, SMALL)],
    "adamw": lambda bench: [adamw_rows(bench, case) for case in (NETWORK, SMALL)],
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--repetitions", type=int, help="turns at most: 100 on a GPU, 20 on a CPU")
    options = parser.parse_args()
    if unknown := set(options.only) - SECTIONS.keys():
        parser.error(f"--only knows {', '.join(SECTIONS)}, not {', '.join(sorted(unknown))}")
    name = "kernels" if options.only == list(SECTIONS) else f"kernels-{'-'.join(options.only)}"
    repetitions = options.repetitions or (100 if options.device == "cuda" else 20)
    bench = Bench(torch.device(options.device), repetitions, name)
    for section in options.only:
        started = time.perf_counter()
        SECTIONS[section](bench)
        print(f"{section}: {time.perf_counter() - started:.0f} s", flush=True)
    print(", ".join(f"{key} {value}" for key, value in bench.facts.items()))
    show(bench, Console(width=150))
    judge(bench)
    print(f"bench/history/{bench.path.name}")


if __name__ == "__main__":
    main()
