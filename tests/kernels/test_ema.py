"""EMA update against the formula in double precision."""

import pytest
import torch

from seqjepa.kernels import ema_update_


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.996, 1.0])
def test_matches_formula_over_many_steps(decay):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (63,), (7, 5), (3, 2, 4, 4)]
    teacher = [torch.randn(shape, generator=generator) for shape in shapes]
    exact = [t.double() for t in teacher]
    for _ in range(20):
        student = [torch.randn(shape, generator=generator) for shape in shapes]
        ema_update_(teacher, student, decay)
        exact = [decay * t + (1 - decay) * s.double() for t, s in zip(exact, student, strict=True)]
    for got, expected in zip(teacher, exact, strict=True):
        # 20 roundings of values of order 1 in float32
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=20 * 2**-23)


def test_equal_teacher_is_a_fixed_point():
    student = [torch.randn(1000)]
    teacher = [student[0].clone()]
    for _ in range(500):
        ema_update_(teacher, student, 0.996)
    assert torch.equal(teacher[0], student[0])


def test_follows_channels_last_parameters():
    student = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    teacher = torch.zeros(4, 3, 5, 5)
    ema_update_([teacher], [student], 0.75)
    torch.testing.assert_close(teacher, 0.25 * student, rtol=1e-6, atol=0)


def test_refuses_bad_input():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        ema_update_([torch.zeros(1)], [torch.zeros(1)], 1.5)
    with pytest.raises(ValueError, match="2 teacher tensors and 1 student"):
        ema_update_([torch.zeros(1)] * 2, [torch.zeros(1)], 0.5)
