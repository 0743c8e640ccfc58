"""A mean with its confidence interval."""

import math
import statistics

from torch import Tensor


class Estimate(float):
    """A mean over samples: a float that knows how sure it is.

    Attributes:
        samples: float64 [n], what it is the mean of.
        interval: (low, high), Student's t at `confidence`; infinite with one sample, NaN where a
            sample is.
        confidence: in (0, 1).
        standard_error: of the mean.
    """

    samples: Tensor
    interval: tuple[float, float]
    confidence: float
    standard_error: float

    def __new__(cls, samples: Tensor, confidence: float) -> "Estimate":
        """Of float64 [n], n at least 1; a sample that is not finite stays in the mean."""
        self = super().__new__(cls, samples.mean())
        self.samples, self.confidence = samples, confidence
        count = len(samples)
        self.standard_error = math.inf
        if count > 1:
            self.standard_error = float(samples.std(correction=1)) / math.sqrt(count)
        half = t_quantile(0.5 + confidence / 2, count - 1) * self.standard_error
        self.interval = float(self) - half, float(self) + half
        return self

    def __repr__(self) -> str:
        """The mean and its interval."""
        low, high = self.interval
        return f"{float(self):.6g} [{low:.6g}, {high:.6g}]"

    def __reduce__(self) -> tuple:
        """Copies keep all of it."""
        return type(self), (self.samples, self.confidence)


def t_quantile(p: float, freedom: int) -> float:
    """The quantile of Student's t for p in (0.5, 1); infinite without a degree of freedom.

    Exact for one and two degrees; else Hill, "Algorithm 396: Student's t-quantiles", CACM 1970,
    within 1e-3 relative.
    """
    if freedom < 1:
        return math.inf
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        tail = 4 * p * (1 - p)
        return (2 * p - 1) * math.sqrt(2 / tail)
    n, tail = freedom, 2 * (1 - p)
    a = 1 / (n - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * n
    y = (d * tail) ** (2 / n)
    if y > 0.05 + a:
        x = statistics.NormalDist().inv_cdf(tail / 2)
        y = x * x
        if n < 5:
            c += 0.3 * (n - 4.5) * (x + 0.6)
        c += (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = (
            (1 / (((n + 6) / (n * y) - 0.089 * d - 0.822) * (n + 2) * 3) + 0.5 / (n + 4)) * y - 1
        ) * (n + 1) / (n + 2) + 1 / y
    return math.sqrt(n * y)
