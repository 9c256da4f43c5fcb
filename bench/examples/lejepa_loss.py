"""Trains twice, with LeJEPA's loss in plain torch and with ours: `python bench/examples/lejepa_loss.py`."""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from seqjepa.kernels import sigreg
from seqjepa.kernels.directions import directions

LAMBDA, BATCH, WIDTH, SLICES = 0.05, 128, 32, 256


def original(views, seed):
    """SIGReg from all cosines and sines [V, N, slices, knots]; the integral over [-3, 3] is twice that over [0, 3]."""
    t = torch.linspace(0, 3, 17)
    window = torch.exp(-(t**2) / 2)
    angle = (views @ directions(seed, WIDTH, SLICES))[..., None] * t
    error = (angle.cos().mean(1) - window).square() + angle.sin().mean(1).square()
    return views.shape[1] * 2 * torch.trapezoid(error * window, t).mean()


def fast(views, seed):
    return sigreg(views, num_slices=SLICES, seed=seed).mean()


def train(statistic, steps):
    """Train an encoder of digits to agree on two noisy views; returns the losses of all steps, and seconds."""
    torch.manual_seed(0)
    images = torch.from_numpy(load_digits().data).float() / 16  # [1797, 64]
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, WIDTH))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    losses, started = [], time.perf_counter()
    for step in range(steps):
        batch = images[torch.randint(len(images), (BATCH,))].expand(2, -1, -1)
        views = encoder(batch + 0.3 * torch.randn(batch.shape))  # [V, N, D]
        agreement = (views - views.mean(0)).square().mean()
        loss = LAMBDA * statistic(views, torch.tensor(step)) + (1 - LAMBDA) * agreement
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - started


def compare(steps=301):
    """Train with either loss and compare the curves."""
    plain, plain_seconds = train(original, steps)
    ours, our_seconds = train(fast, steps)
    for step in range(0, steps, max(1, steps // 10)):
        print(f"step {step:4d}: original {plain[step]:.6f}, ours {ours[step]:.6f}")
    apart = max(abs(a - b) / abs(a) for a, b in zip(plain, ours, strict=True))
    print(f"largest relative difference {apart:.1e}; original {plain_seconds:.2f} s, ours {our_seconds:.2f} s")
    return plain, ours


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)  # these matrices are small
    compare()
