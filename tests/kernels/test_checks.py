"""What is no tensor is refused by name."""

import numpy as np
import pytest
import torch

from seqjepa.kernels import coding_rate, cosine_decay, sigreg, token_statistics_attention


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coding_rate([[1.0, 2.0]], eps=0.5), "z must be a tensor, got list"),
        (lambda: coding_rate(torch.ones(3, 2), eps=0.5, weights=[1, 1, 1]), "weights must be a tensor, got list"),
        (lambda: sigreg(np.ones((3, 2)), num_slices=4, seed=0), "z must be a tensor, got ndarray"),
        (lambda: token_statistics_attention(torch.ones(1, 2, 3, 4), 1.0), "temperature must be a tensor, got float"),
        (lambda: cosine_decay(5, start=0.9, total_steps=10), "step must be a tensor, got int"),
    ],
)
def test_what_is_no_tensor_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
