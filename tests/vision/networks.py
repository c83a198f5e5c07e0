"""Small networks of our own, as `module:factory` names them."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Network(nn.Module):
    """Four residual blocks; its shift is a buffer that is not saved."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(8) for _ in range(4)))
        self.head = nn.Linear(8, 5)
        self.register_buffer("shift", torch.arange(5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        ones = torch.ones(x.shape[0], 1, device=x.device)  # depends on sizes alone
        return self.head(x.mean((2, 3))) * ones + self.shift


class Branching(nn.Module):
    """Cannot be traced: its way depends on what it sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    """Cannot be traced for any batch: `len` makes a constant of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), -1)


class TwoOutputs(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, x - 1


class Dense(nn.Module):
    """Every layer takes the results of all before it: there is no point to cut at."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(sum(found)))
        return torch.stack(found).sum(0)


def no_module() -> int:
    return 3


class InPlace(nn.Module):
    """Changes what it is given, and computes the weight before a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 3, 3, 3))
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*(Residual(8) for _ in range(2)))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        x = self.norm(nn.functional.conv2d(x, weight))
        return self.head(self.blocks(x).mean((2, 3)))


class Flat(nn.Sequential):
    """Convolutions with their BatchNorms and ReLUs, one after another."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for width in (3, 8, 8):
            layers += [nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def broken() -> nn.Module:
    raise ValueError("out of order")


class Mixing(Network):
    """What it makes of an image depends on the others of its batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(0))


class Unusual(nn.Module):
    """One block thrice, a plain tensor named as an operation, a scalar, and a random constant."""

    noise: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        shared = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([shared, Residual(8), shared, shared])
        self.head = nn.Linear(8, 5)
        self.mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("noise", torch.randn(5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem((x - self.mean) * self.gain)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3))) + self.noise


class Counting(nn.Module):
    """Cannot be cut: what it makes depends on how often it ran."""

    runs: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs[1:].add_(1)
        return x.mean((2, 3)) + self.runs[1]


class OfWeights(nn.Module):
    """Its constructor computes a buffer from weights that no rank has by then."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)
        self.register_buffer("total", self.head.weight.detach().sum(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean((2, 3))) + self.total


class Unregistered(nn.Module):
    """Its constant is in a list, where nobody finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.shifts = [torch.ones(3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + self.shifts[0]
