"""Operations that any PyTorch code can use. They import torch and triton only, and nothing else of this project."""

if __name__ == "kernels":
    # `import kernels` found this folder because the repository's root is on sys.path: it means Hugging Face's package
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != root])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("No module named 'kernels'; this project's is seqjepa.kernels", name="kernels")
    sys.modules["kernels"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["kernels"])
else:
    from .adamw_ema import AdamWEMA
    from .coding_rate import CodingRate, coding_rate
    from .ema import EMA, cosine_decay, ema_update_
    from .local_rate import local_coding_rate
    from .rate_statistics import CodingRateStats, coding_rate_stats
    from .sigreg import SIGReg, sigreg
    from .token_statistics import token_statistics_attention

    __all__ = [
        "EMA",
        "AdamWEMA",
        "CodingRate",
        "CodingRateStats",
        "SIGReg",
        "coding_rate",
        "coding_rate_stats",
        "cosine_decay",
        "ema_update_",
        "local_coding_rate",
        "sigreg",
        "token_statistics_attention",
    ]
