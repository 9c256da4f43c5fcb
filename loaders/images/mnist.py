"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28x28 pixels."""

from .base import TorchvisionDataset


class MNIST(TorchvisionDataset):
    """Gray images, given three equal channels."""

    reader = "MNIST"
    side, num_classes = 28, 10
    statistics = (0.1307,) * 3, (0.3081,) * 3
