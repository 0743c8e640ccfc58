"""Models whose loss, gradient and Hessian are known, and the ways in which code uses a weight."""

import torch
from torch import nn
from torch.nn import functional as F


class Quadratic(nn.Module):
    """L = 1/2 sum h w^2 + sum g w over a weight that loss_fn reads without calling the module."""

    def __init__(self, rows=5, cols=30, dtype=torch.float64, slope=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.h = torch.rand(rows, cols, generator=generator, dtype=dtype) + 0.1
        self.g = torch.randn(rows, cols, generator=generator, dtype=dtype) if slope else 0.0
        self.weight = nn.Parameter(torch.zeros(rows, cols, dtype=dtype))

    def loss(self):
        return 0.5 * (self.h * self.weight**2).sum() + (self.g * self.weight).sum()


class Reader(nn.Module):
    """One linear layer is called, the weight of the other is read."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return F.linear(torch.tanh(self.called(x)), self.read.weight, self.read.bias)


class Both(nn.Module):
    """A layer that is called, and whose weight is read besides."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8, bias=False)

    def forward(self, x):
        return torch.tanh(self.layer(x)) @ self.layer.weight


class Tied(nn.Module):
    """An embedding whose weight is that of the last layer as well."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        assert self.head.weight.dtype.is_floating_point  # looks at no value
        assert self.head.weight.new_zeros(2).shape == (2,)
        return self.head(torch.tanh(self.embedding((x[:, 0].abs() * 7).long() % 11)))


class Own(nn.Module):
    """A module with a parameter of its own, seen in nested calls, and layers inside."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(6, 6))
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))

    def forward(self, x, again=True):
        x = x @ self.own
        return self(x, again=False) if again else self.layers(x)


class Attending(nn.Module):
    """torch's own attention reads its output projection."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x[None], x[None], x[None], need_weights=False)[0][0]


class Convolving(nn.Module):
    """Convolutions, whose rows are filters, and the other way round."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 6, 3, groups=2)
        )

    def forward(self, x):
        return self.layers(x[:, None, :])[:, :, 0]


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)),
    "reader": Reader,
    "both": Both,
    "tied": Tied,
    "own": Own,
    "attention": Attending,
    "convolutions": Convolving,
}


def made(name, dtype=torch.float32):
    """A model and a loss_fn that gives the same loss each time, in any mode but training."""
    torch.manual_seed(3)
    model = MODELS[name]().to(dtype)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(4)).to(dtype)
    return model, lambda: model(x).float().square().mean()


def bits(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
