"""Prices of GPUs: a file of the user's, since what is paid depends on who asks whom and when."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ground.errors import InputError
from ground.value_file import read_toml

ENTRIES = ("currency", "source", "gpu_hour")
"""What a price table holds."""


class PriceError(InputError):
    """A price table that cannot be used, in one line that names the file and the entry."""


@dataclass(frozen=True)
class Prices:
    """An hour of one GPU, by its name in the catalogue."""

    path: str
    per_gpu_hour: dict[str, float]
    currency: str = ""
    source: str = ""

    def of(self, gpu: str) -> float:
        """Look up what a GPU costs. Raises PriceError for one that is not in the table."""
        price = self.per_gpu_hour.get(gpu.lower())
        if price is None:
            near = difflib.get_close_matches(gpu.lower(), self.per_gpu_hour, 3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise PriceError(f"{self.path}: gpu_hour: no price for {gpu}{hint}")
        return price

    def an_hour(self, gpus: Mapping[str, int]) -> float:
        """Add up the price of so many GPUs of each name. Raises PriceError for one that is not in the table."""
        return sum(number * self.of(name) for name, number in gpus.items())


def kept_with(prices: Prices, gpus: Iterable[str]) -> dict[str, Any]:
    """What a record keeps of a table: the prices of its GPUs. Raises PriceError for one that is not in the table."""
    return {
        "currency": prices.currency,
        "source": prices.source,
        "gpu_hour": {gpu: prices.of(gpu) for gpu in gpus},
    }


def read_prices(path: Path) -> Prices:
    """A TOML file: `currency`, `source`, and a table `gpu_hour` with a price for each GPU.

    Raises PriceError for a file that cannot be read, an unknown entry, and a price that is not a number of 0 or more.
    """
    values = read_toml(path, PriceError)
    for name in values:
        if name not in ENTRIES:
            raise PriceError(f"{path}: {name}: no such entry; there are currency, source and the table gpu_hour")
    table = values.get("gpu_hour")
    if not isinstance(table, dict) or not table:
        raise PriceError(f"{path}: gpu_hour: missing; it holds a price for each GPU")
    for name, price in table.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf"):
            raise PriceError(f"{path}: gpu_hour.{name}: {price!r} is not a price of 0 or more")
    prices = {name.lower(): float(price) for name, price in table.items()}
    return Prices(str(path), prices, str(values.get("currency", "")), str(values.get("source", "")))
