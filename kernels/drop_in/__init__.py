"""Losses of other codebases by their own names, computed by this package's kernels: a user changes one import line.

    codebase                   module     classes and functions
    RobinWu218/SimDINO, v1     simdino    MCRLoss
    RobinWu218/SimDINO, v2     simdinov2  MCRLoss
    ryanchankh/mcr2            mcr2       MaximalCodingRateReduction
    tsb0601/EMP-SSL            emp_ssl    TotalCodingRate, MaximalCodingRateReduction
    lightly-ai/lightly         lightly    EMPSSLLoss, SIGReg, LeJEPALoss
    kaikun213/seq-jepa         seq_jepa   coding_rate_loss, coding_rate_loss_stable, CodingRateLoss
    rbalestr-lab/lejepa        lejepa     EppsPulley, SlicingUnivariateTest
    facebookresearch/eb_jepa   eb_jepa    BCS

For instance `from seqjepa.kernels.drop_in.simdino import MCRLoss`. Arguments with their order and defaults, constants,
signs, values and state dicts are the originals'. Everywhere different:

- Whatever autocast and TF32 say, all is computed and returned in float32 (float64 for float64).
- Nothing waits for the device; what an original returned as a Python float for logs is a 0-dim tensor, detached.
- Random directions are drawn by another generator, the same way on all processes.
- Where an original does something that is not done here, a ValueError says so in one line.
"""
