"""torch.compile(model, backend="dwconv_ext"): what is left as it is, and what the report says of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blocks import sequential
from small_models import Named, assert_same, check, fast, fused, picture
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import dwconv_ext
import dwconv_ext.compile
from dwconv_ext.compile import last_report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_report_says_why_and_where():
    class Mish(Named):
        def forward(self, x):
            y = self.bn1(self.dw(x))
            return self.pw(F.mish(y))

    check(Mish(), picture())
    (refusal,) = last_report().refused
    assert "mish" in refusal.why and refusal.layer
    assert "mish" in str(last_report()) and "1 depthwise convolutions" in str(last_report())
    assert "test_compile_refusals.py:" in refusal.line and refusal.line.endswith("y = self.bn1(self.dw(x))")
    assert last_report().base == "eager"


def test_what_ends_a_block():
    m = Named()

    def another_mode(x):
        y = m.dw(x)
        with torch.autocast("cpu", enabled=False):
            return m.pw(y)

    for f, why in (
        (lambda x: (lambda y: m.pw(y) + y.mean())(m.dw(x)), "its result has 2 users"),
        (m.dw, "its result leaves the graph"),
        (another_mode, "a grad or autocast mode, or a subgraph, begins or ends before its result is used"),
    ):
        check(f, picture())
        assert last_report().refused[0].why == why


def test_values_used_twice():
    m = Named()
    check(lambda x: (lambda y: (m.bn1(y), y))(m.dw(x)), picture(), wanted={"depthwise convolutions": 1})
    check(lambda x: (lambda y: m.pw(y) + y.mean())(m.dw(x)), picture(), wanted={
        "depthwise convolutions": 1, "pointwise convolutions": 1})  # fmt: skip
    check(lambda x: (lambda y: (m.pw(y), y.detach()))(m.dw(x)), picture())


def test_writes_in_between():
    m = Named()

    def the_input(x):
        y = m.dw(x)
        x.mul_(3)
        return m.bn1(y), x

    def the_statistics(x):
        y = m.dw(x)
        m.bn1.running_mean.add_(1)
        z = m.bn1(y)
        m.bn1.running_mean.sub_(1)
        return z

    def the_result(x):
        y = m.dw(x)
        y.mul_(2)
        return m.bn1(y), y

    def a_view_of_the_input(x):
        v = x[:, :, 1:]
        y = m.dw(v)
        x[:, :, 2] = 5
        return m.pw(y)

    def a_view_of_the_result(x):
        y = m.dw(x)
        y[:, 3].zero_()
        return m.pw(y)

    def a_view_by_shape(x):
        return m.bn1(m.dw(x).view(1, 16, 8, 16))

    for f in (the_input, the_statistics, the_result, a_view_of_the_input, a_view_of_the_result):
        check(f, picture())
        assert "blocks" not in fused(), f.__name__
    check(a_view_by_shape, picture(n=2))


@pytest.mark.parametrize("compute", (
    weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal,
    lambda c: prune.l1_unstructured(c, "weight", 0.5),
))  # fmt: skip
def test_computed_weights(compute):
    model = sequential(16, 16)
    compute(model[3])
    model(picture()), model.eval()
    compiled = check(model, picture())
    assert "blocks" not in fused() and any("computed" in r.why for r in last_report().refused)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
        assert_same(compiled(x := picture()), model(x))


def test_shared_modules():
    dw, bn, act, pw, _, _ = sequential(16, 16)
    model = nn.Sequential(dw, bn, act, pw, bn, act, dw, bn, act, pw, bn, act)
    compiled = check(model, picture(), wanted={"blocks": 2})
    with torch.no_grad():
        bn.weight.mul_(2)
        assert_same(compiled(x := picture()), model(x))


def test_a_wanted_derivative_is_a_reason():
    fast(sequential(16, 16))(picture())
    assert "no_grad" in last_report().refused[0].why and fused() == {"depthwise convolutions": 1}


def test_reports_of_all_graphs():
    block = sequential(16, 16)

    def twice(x):
        x = block(x)
        torch._dynamo.graph_break()
        return x + 1

    check(twice, picture())
    assert [dict(r.fused) for r in dwconv_ext.compile.reports()[-2:]] == [{"blocks": 1}, {}]


def test_a_refusal_names_the_module_where_no_line_is_known():
    dw, *_, pw, _, _ = sequential(16, 16)
    check(nn.Sequential(dw, nn.Tanh(), pw), picture())
    assert [r.line for r in last_report().refused] == ["module 0"]
