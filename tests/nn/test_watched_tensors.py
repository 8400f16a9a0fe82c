"""WatchedTensors: which changes of a tensor are seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dwconv_ext

NOTICED = {
    "in_place": lambda t: t[0].add_(1),
    "one_element": lambda t: t[0].view(-1)[777].mul_(2),
    "all_of_data": lambda t: t[1].data.mul_(2),
    "other_data": lambda t: setattr(t[0], "data", t[0].data.clone()),
    "swapped": lambda t: torch.utils.swap_tensors(t[0], nn.Parameter(t[0] * 2)),
}


@pytest.mark.parametrize("change", NOTICED)
@torch.no_grad()
def test_what_watched_tensors_notice(change):
    tensors = (nn.Parameter(torch.randn(64, 50)), torch.randn(3), None)
    watched = dwconv_ext._C.WatchedTensors(tensors)
    assert watched.unchanged(tensors)
    NOTICED[change](tensors)
    assert not watched.unchanged(tensors)


def test_watched_tensors_are_these_objects():
    a, b = torch.randn(5), torch.randn(5)
    watched = dwconv_ext._C.WatchedTensors((a, None))
    assert watched.unchanged((a, None))
    assert not any(map(watched.unchanged, [(b, None), (a,), (a, b), (a.clone(), None), (a.view(5), None)]))


def test_watched_tensors_know_the_instruction_set(isa):
    tensors = (torch.randn(5),)
    watched = dwconv_ext._C.WatchedTensors(tensors)
    dwconv_ext._C.select_isa("baseline")
    assert watched.unchanged(tensors) == (isa == "baseline")
