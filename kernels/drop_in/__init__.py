"""Losses of other codebases under their own names, computed by this package's kernels. Changing an import is enough.

    codebase                   module     classes and functions
    RobinWu218/SimDINO, v1     simdino    MCRLoss
    RobinWu218/SimDINO, v2     simdinov2  MCRLoss
    ryanchankh/mcr2            mcr2       MaximalCodingRateReduction
    tsb0601/EMP-SSL            emp_ssl    TotalCodingRate, MaximalCodingRateReduction
    lightly-ai/lightly         lightly    EMPSSLLoss, SIGReg, LeJEPALoss
    kaikun213/seq-jepa         seq_jepa   coding_rate_loss, coding_rate_loss_stable, CodingRateLoss
    rbalestr-lab/lejepa        lejepa     EppsPulley, SlicingUnivariateTest
    facebookresearch/eb_jepa   eb_jepa    BCS

For instance `from seqjepa.kernels.drop_in.simdino import MCRLoss`. Arguments, their order and defaults, constants,
signs, values and state dicts are those of the originals. All of them differ from the originals in this:

- Results are computed and returned in float32 (float64 for float64 inputs), whatever autocast and TF32 settings say.
- Nothing waits for the device. What an original returns as a Python float for logs is a detached 0-dim tensor here.
- Random directions come from another generator, which draws the same directions on all processes.
- An option of the original that is not supported here raises a ValueError with a one-line message.
"""
