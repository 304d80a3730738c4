"""Operators check their arguments, all that are alike once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends.torch.kernels import common


def operator(limit: int = 4096) -> tuple[Any, list[Any], list[Any]]:
    checks: list[Any] = []
    launched: list[Any] = []

    def launch(x: Any, factor: int, window: int | None = None) -> Any:
        launched.append((x, factor, window))
        return x

    @common.launches(launch)
    def scale(x: Any, factor: int, window: int | None = None) -> None:
        """Scale."""
        checks.append(x)
        if x.dtype != torch.float32:
            raise TypeError("x")

    return scale, checks, launched


def test_arguments_alike_are_checked_once_and_launched_every_time(device):
    scale, checks, launched = operator()
    x = torch.ones((4, 6), device=device)
    for _ in range(3):
        assert scale(x, 2, window=5) is x
        scale(torch.zeros((4, 6), device=device), 2, window=5)
    assert (len(checks), len(launched)) == (1, 6)
    assert launched[0][1:] == (2, 5) and scale.__doc__ == "Scale."


@pytest.mark.parametrize("other", ["dtype", "shape", "strides", "number", "keyword"])
def test_whatever_a_check_can_see_makes_arguments_new(other, device):
    scale, checks, _ = operator()
    x = torch.ones((4, 4), device=device)
    scale(x, 2)
    if other == "dtype":
        for _ in range(2):  # what is wrong is not remembered as right
            with pytest.raises(TypeError):
                scale(x.half(), 2)
    elif other == "shape":
        scale(x[:2], 2)
    elif other == "strides":
        scale(x.t(), 2)
    elif other == "number":
        scale(x, 3)
    else:
        scale(x, 2, window=2)
    assert len(checks) == (3 if other == "dtype" else 2)


def test_shapes_without_end_are_forgotten(monkeypatch, device):
    monkeypatch.setattr(common, "MOST_SHAPES", 3)
    scale, checks, _ = operator()
    for rows in (1, 2, 3, 4, 4, 1):
        scale(torch.ones((rows, 2), device=device), 1)
    assert [len(x) for x in checks] == [1, 2, 3, 4, 1]
