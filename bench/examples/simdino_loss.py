"""Trains twice, with SimDINO's loss in plain torch and with ours: `python bench/examples/simdino_loss.py`."""

import argparse
import copy
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from seqjepa.kernels.drop_in.simdino import MCRLoss

EPS, BATCH, WIDTH = 0.5, 128, 64


def original(student, teacher):
    """-cosine across views - γ/2 log det(I + p / (m eps) ZᵀZ) of the student's features Z, with γ = 1/p + 1/m."""
    student, teacher = student.chunk(2), teacher.chunk(2)  # [m, p] each
    m, p = student[0].shape
    cosines = [torch.cosine_similarity(student[i], teacher[1 - i]).mean() for i in range(2)]
    rates = [torch.logdet(torch.eye(p) + p / (m * EPS) * z.T @ z) for z in student]
    return -sum(cosines) / 2 - (1 / p + 1 / m) / 2 * sum(rates) / 2


def train(criterion, steps):
    """Train an encoder of noisy digits with its moving average; returns the losses of all steps, and seconds."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data).float() / 16  # [1797, 64]
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, WIDTH))
    teacher = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    losses, started = [], time.perf_counter()
    for _ in range(steps):
        batch = images[torch.randint(len(images), (BATCH,))].repeat(2, 1)
        views = batch + 0.3 * torch.randn_like(batch)
        loss = criterion(*(nn.functional.normalize(network(views)) for network in (encoder, teacher)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in encoder.parameters()], 0.004)
        losses.append(loss.item())
    return losses, time.perf_counter() - started


def compare(steps=301):
    """Train with either loss and compare the curves."""
    mcr = MCRLoss(ncrops=2, eps=EPS)
    plain, plain_seconds = train(original, steps)
    ours, our_seconds = train(lambda student, teacher: mcr(student, teacher)[0], steps)
    for step in range(0, steps, max(1, steps // 10)):
        print(f"step {step:4d}: original {plain[step]:.6f}, ours {ours[step]:.6f}")
    apart = max(abs(a - b) / abs(a) for a, b in zip(plain, ours, strict=True))
    print(f"largest relative difference {apart:.1e}; original {plain_seconds:.2f} s, ours {our_seconds:.2f} s")
    return plain, ours


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # these matrices are small
    compare()
