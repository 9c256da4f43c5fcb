"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test photographs of 32x32 pixels."""

from .base import TorchvisionDataset


class CIFAR10(TorchvisionDataset):
    """Airplanes, cars, birds, cats, deer, dogs, frogs, horses, ships and trucks."""

    reader = "CIFAR10"
    side, num_classes = 32, 10
    statistics = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class CIFAR100(TorchvisionDataset):
    """A hundred finer classes."""

    reader = "CIFAR100"
    side, num_classes = 32, 100
    statistics = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
