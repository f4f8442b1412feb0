"""Time series: yearly sunspot numbers, scaling, windows of past and future."""

from dataclasses import dataclass

import torch

from . import _checks


def sunspots():
    """Yearly mean sunspot numbers, 1700 to 2008.

    The series of the National Geophysical Data Center as statsmodels ships it (public domain). It rises and falls with
    the solar cycle, about every 11 years.

    Returns
    -------
    years : torch.Tensor, shape (309,), int64
    numbers : torch.Tensor, shape (309,), float32
        Sunspot number of each year, from 0 to about 190.

    Raises
    ------
    ImportError
        If statsmodels is not installed: ``pip install "rnnkernels[data]"``.

    Examples
    --------
    >>> from rnnkernels.data import sunspots
    >>> years, numbers = sunspots()
    >>> years[0].item(), years[-1].item(), numbers.shape
    (1700, 2008, torch.Size([309]))
    >>> years[numbers.argmax()].item()                      # the strongest maximum on record
    1957
    """
    try:
        from statsmodels.datasets import sunspots as source
    except ImportError as error:
        raise ImportError('sunspots() needs statsmodels: pip install "rnnkernels[data]"') from error
    table = source.load_pandas().data
    years = torch.tensor(table["YEAR"].to_numpy(), dtype=torch.int64)
    numbers = torch.tensor(table["SUNACTIVITY"].to_numpy(), dtype=torch.float32)
    return years, numbers


@dataclass(frozen=True)
class Standardizer:
    """Shift and scale to zero mean and unit standard deviation, :math:`z=(x-\\mu)/\\sigma`, and back.

    Make one with `fit`, from the training part only: a mean taken over the test part is a look into the future.

    Parameters
    ----------
    mean, scale : torch.Tensor
        Mean and standard deviation, shape () for one series or (F,) for F features; broadcast against the data.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.data import Standardizer
    >>> train = torch.tensor([1.0, 2.0, 3.0])
    >>> standardizer = Standardizer.fit(train)
    >>> standardizer(torch.tensor([2.0, 4.0]))
    tensor([0.0000, 2.4495])
    >>> standardizer.inverse(standardizer(train))
    tensor([1., 2., 3.])
    """

    mean: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def fit(cls, series):
        """Standardizer with the mean and standard deviation of `series` over its first dimension.

        Parameters
        ----------
        series : torch.Tensor, shape (N,) or (N, F), floating point
            The training part. The deviation divides by N.

        Raises
        ------
        TypeError, ValueError
            If `series` is no floating-point tensor of one or two dimensions, is empty, or a feature is constant.
        """
        _checks.tensor("series", series, (1, 2))
        if not series.is_floating_point():
            raise TypeError(f"series must be floating point, got dtype {series.dtype}")
        if series.numel() == 0:
            raise ValueError(f"series must not be empty, got shape {tuple(series.shape)}")
        mean = series.mean(dim=0)
        scale = (series - mean).square().mean(dim=0).sqrt()
        if (scale == 0).any():
            raise ValueError("series must vary in every feature, got a constant one")
        return cls(mean, scale)

    def __call__(self, values):
        """Standardized values."""
        return (values - self.mean) / self.scale

    def inverse(self, values):
        """Values on the original scale."""
        return values * self.scale + self.mean


def forecast_windows(series, length, horizon=1):
    """Every stretch of `length` steps of a time series, with the `horizon` steps that follow it.

    Parameters
    ----------
    series : torch.Tensor, shape (N,) or (N, F)
        The series, time first.
    length : int
        Steps T of the past that a model may see.
    horizon : int, default 1
        Steps K of the future to forecast; ``N >= T + K``.

    Returns
    -------
    past : torch.Tensor, shape (T, B) or (T, B, F)
    future : torch.Tensor, shape (K, B) or (K, B, F)
        ``B = N - T - K + 1`` overlapping windows in the order of time: window ``b`` is ``series[b : b + T]`` and the K
        steps after it.

    Raises
    ------
    TypeError, ValueError
        If `series` is no tensor of one or two dimensions, or shorter than ``length + horizon``.

    Examples
    --------
    >>> import torch
    >>> from rnnkernels.data import forecast_windows
    >>> past, future = forecast_windows(torch.arange(6.0), length=3, horizon=2)
    >>> past.T
    tensor([[0., 1., 2.],
            [1., 2., 3.]])
    >>> future.T
    tensor([[3., 4.],
            [4., 5.]])
    """
    _checks.tensor("series", series, (1, 2))
    _checks.positive_int("length", length)
    _checks.positive_int("horizon", horizon)
    if len(series) < length + horizon:
        raise ValueError(f"series must hold at least length + horizon = {length + horizon} steps, got {len(series)}")
    windows = series.unfold(0, length + horizon, 1).movedim(-1, 0)
    return windows[:length], windows[length:]
