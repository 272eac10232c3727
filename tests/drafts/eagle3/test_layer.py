"""The layer's halves against the same maths left to autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from draft_model.drafts.eagle3.layer import normed_linear, residual_swiglu

from .case import relative_error

ROWS, HIDDEN, INNER, EPS = 11, 8, 12, 1e-5


def plain_norm(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def plain_linear(x, norm, weight):
    return plain_norm(x, norm) @ weight.T


def plain_swiglu(x, norm, gate_up, down):
    gate, up = (plain_norm(x, norm) @ gate_up.T).chunk(2, -1)
    return x + (gate * gate.sigmoid() * up) @ down.T


def tensors(shapes, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


CASES = {
    "normed_linear": (normed_linear, plain_linear, [(ROWS, HIDDEN), (HIDDEN,), (5, HIDDEN)]),
    "residual_swiglu": (
        residual_swiglu,
        plain_swiglu,
        [(ROWS, HIDDEN), (HIDDEN,), (2 * INNER, HIDDEN), (HIDDEN, INNER)],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_value_and_gradients_equal_autograds(name, dtype, tolerance, scale):
    ours, plain, shapes = CASES[name]
    given = [tensor.to(dtype) for tensor in tensors(shapes)]
    given[0] = given[0] * scale
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    truths = [tensor.double().requires_grad_() for tensor in given]
    value, truth = ours(*leaves, EPS), plain(*truths)
    grad = torch.randn(truth.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    value.backward(grad)
    truth.backward(grad.double())
    assert value.dtype == dtype
    assert relative_error(value, truth) < tolerance
    for leaf, exact in zip(leaves, truths, strict=True):
        assert leaf.grad.dtype == dtype
        assert relative_error(leaf.grad, exact.grad) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_the_backward_changes_nothing_that_was_kept(name):
    ours, _, shapes = CASES[name]
    leaves = [tensor.requires_grad_() for tensor in tensors(shapes)]
    before = [leaf.detach().clone() for leaf in leaves]
    value = ours(*leaves, EPS)
    first = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(value.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(leaf, kept) for leaf, kept in zip(leaves, before, strict=True))


def test_a_frozen_input_gets_no_gradient():
    x, norm, weight = tensors(CASES["normed_linear"][2])
    norm.requires_grad_()
    normed_linear(x, norm, weight.requires_grad_(), EPS).sum().backward()
    assert x.grad is None
    assert weight.grad.abs().sum() > 0


def test_rows_of_zeros_stay_finite():
    leaves = [
        torch.zeros(ROWS, HIDDEN).requires_grad_(),
        *(t.requires_grad_() for t in tensors(CASES["residual_swiglu"][2][1:])),
    ]
    residual_swiglu(*leaves, EPS).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
