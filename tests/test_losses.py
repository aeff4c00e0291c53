"""Losses against double loops, closed forms, brute force and pytorch-metric-learning."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

from fairasr_min.losses import (
    contrastive_accuracy,
    ctc_loss,
    grad_reverse,
    group_separation,
    info_nce,
    sup_con,
)


def views(n=6, p=5, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(2, n, p, generator=generator, dtype=torch.float64)
    return z[0].requires_grad_(), z[1].requires_grad_()


def slow_sup_con(z1, z2, labels, temperature, normalize=True, own_view=True):
    """Khosla et al., eq. 2, one anchor, positive and negative at a time."""
    n = len(z1)
    z = torch.cat([z1, z2]).double()
    if normalize:
        z = z / z.norm(dim=1, keepdim=True)
    y = [*labels.tolist(), *labels.tolist()]
    per_anchor = []
    for i in range(2 * n):
        if y[i] < 0:
            continue
        others = [a for a in range(2 * n) if a != i and y[a] >= 0]
        if not own_view:
            others = [a for a in others if a % n != i % n]
        positives = [a for a in others if y[a] == y[i]]
        if not positives:
            continue
        denominator = sum(torch.exp(z[i] @ z[a] / temperature) for a in others)
        terms = [-torch.log(torch.exp(z[i] @ z[p] / temperature) / denominator) for p in positives]
        per_anchor.append(sum(terms) / len(terms))
    return sum(per_anchor) / len(per_anchor)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_info_nce_is_the_double_loop(temperature):
    z1, z2 = views()
    every_utterance_its_own_class = torch.arange(len(z1))
    expected = slow_sup_con(z1, z2, every_utterance_its_own_class, temperature)
    assert torch.isclose(info_nce(z1, z2, temperature).double(), expected, atol=1e-6)


def test_info_nce_is_ntxent_of_another_library():
    z1, z2 = views(n=8)
    other = NTXentLoss(temperature=0.5)(torch.cat([z1, z2]), torch.arange(8).repeat(2))
    assert torch.isclose(info_nce(z1, z2, 0.5).double(), other, atol=1e-6)


def test_info_nce_closed_forms():
    same = torch.ones(4, 3)
    assert math.isclose(info_nce(same, same).item(), math.log(7), rel_tol=1e-6)  # all alike
    axes = torch.eye(4)  # each pair alike, all else orthogonal
    expected = math.log(1 + 6 * math.exp(-1 / 0.5))
    assert math.isclose(info_nce(axes, axes, 0.5).item(), expected, rel_tol=1e-6)


LABELS = [
    [0, 0, 1, 1, 2, 2],
    [0, 0, 0, 0, 0, 1],  # one utterance alone of its class
    [0, 1, 2, 3, 4, 5],  # all alone
    [0, 0, 0, 0, 0, 0],
    [0, -1, 1, 1, -1, 0],  # unlabelled
    [-1, -1, -1, -1, -1, 3],
]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("normalize", [True, False])
def test_sup_con_is_the_double_loop_in_value_and_gradient(labels, normalize):
    labels = torch.tensor(labels)
    ours, theirs = views(), views()
    a = sup_con(*ours, labels, 0.2, normalize)
    b = slow_sup_con(*theirs, labels, 0.2, normalize)
    assert torch.isclose(a.double(), b, rtol=1e-5, atol=1e-6)
    a.backward()
    b.backward()
    for x, y in zip(ours, theirs):
        assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", LABELS[:2] + LABELS[3:5])
def test_sup_con_of_other_utterances_only(labels):
    labels = torch.tensor(labels)
    ours, theirs = views(), views()
    a = sup_con(*ours, labels, 0.2, own_view=False)
    b = slow_sup_con(*theirs, labels, 0.2, own_view=False)
    assert torch.isclose(a.double(), b, rtol=1e-5, atol=1e-6)
    a.backward()
    b.backward()
    assert torch.allclose(ours[0].grad, theirs[0].grad, rtol=1e-4, atol=1e-5)


def test_sup_con_is_that_of_another_library():
    z1, z2 = views(n=8)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    other = SupConLoss(temperature=0.2)(torch.cat([z1, z2]), labels.repeat(2))
    assert torch.isclose(sup_con(z1, z2, labels, 0.2).double(), other, atol=1e-6)


def test_sup_con_with_distinct_labels_is_info_nce():
    z1, z2 = views()
    a, b = sup_con(z1, z2, torch.arange(6), 0.5), info_nce(z1, z2, 0.5)
    assert torch.isclose(a, b, atol=1e-6)


@pytest.mark.parametrize("labels, own_view", [([-1] * 6, True), (list(range(6)), False)])
def test_without_anchors_sup_con_is_zero_and_stays_on_the_graph(labels, own_view):
    z1, z2 = views()
    loss = sup_con(z1, z2, torch.tensor(labels), own_view=own_view)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z1.grad, torch.zeros_like(z1))


def test_unlabelled_utterances_change_nothing():
    z1, z2 = views()
    labels = torch.tensor([0, 1, 0, -1, 1, -1])
    known = labels >= 0
    assert torch.isclose(sup_con(z1, z2, labels), sup_con(z1[known], z2[known], labels[known]))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_finite_float32_whatever_comes_in(scale, dtype):
    z1, z2 = (z.detach().to(dtype).requires_grad_() for z in views(scale=scale))
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(z1, z2) + sup_con(z1, z2, torch.tensor([0, 0, 0, 1, 1, 2]))
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert z1.grad.isfinite().all()


@pytest.mark.parametrize("strength", [0.0, 0.1, 1.0, 3.5])
def test_reversal_is_the_identity_and_its_gradient_exactly_minus_strength(strength):
    x = torch.randn(4, 3, requires_grad=True)
    upstream = torch.randn(4, 3)
    y = grad_reverse(x, strength)
    assert torch.equal(y, x)
    y.backward(upstream)
    assert torch.equal(x.grad, -strength * upstream)


def test_head_learns_what_the_encoder_unlearns():
    """Behind the reversal the loss's own gradient, before it the opposite."""
    encoder, head = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
    x, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])

    def gradients(reverse):
        h = encoder(x)
        z = head(grad_reverse(h) if reverse else h)
        loss = sup_con(z, z + 0.1, labels)
        return torch.autograd.grad(loss, [encoder.weight, head.weight])

    (e1, h1), (e2, h2) = gradients(False), gradients(True)
    assert torch.allclose(h1, h2) and torch.allclose(e1, -e2) and e1.abs().sum() > 0


def slow_ctc(log_probs, target, blank):
    """-log of the summed probability of every path that collapses to the target."""
    total = 0.0
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        merged = [k for k, _ in itertools.groupby(path)]
        if [k for k in merged if k != blank] == target:
            total += math.exp(sum(log_probs[t, k].item() for t, k in enumerate(path)))
    return -math.log(total)


def test_ctc_is_the_sum_over_all_paths_for_each_utterance():
    torch.manual_seed(0)
    log_probs = F.log_softmax(torch.randn(3, 5, 4), dim=-1)
    targets = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 0, 0]])
    lengths, target_lengths = torch.tensor([5, 5, 3]), torch.tensor([3, 2, 1])
    loss = ctc_loss(log_probs, lengths, targets, target_lengths)
    assert loss.shape == (3,)
    for i in range(3):
        target = targets[i, : target_lengths[i]].tolist()
        expected = slow_ctc(log_probs[i, : lengths[i]], target, blank=3)
        assert math.isclose(loss[i].item(), expected, rel_tol=1e-5)


def test_ctc_of_an_impossible_target_is_zero_without_gradient():
    logits = torch.randn(2, 2, 4, requires_grad=True)
    targets, lengths = torch.tensor([[1, 1], [1, 2]]), torch.tensor([2, 2])
    loss = ctc_loss(F.log_softmax(logits, -1), lengths, targets, lengths)
    loss.sum().backward()
    assert loss[0] == 0 and loss[1] > 0  # a repeat needs a blank between: 3 frames
    assert logits.grad[0].abs().sum() == 0 and logits.grad.isfinite().all()


def test_contrastive_accuracy():
    axes = torch.eye(4)
    assert contrastive_accuracy(axes, axes) == 1
    assert contrastive_accuracy(axes, axes.roll(1, 0)) == 0


def test_group_separation():
    near = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.5, 0.5]])
    labels = torch.tensor([0, 0, 1, 1, -1])
    accuracy, chance, alone = group_separation(near, near, labels)
    assert accuracy == 1 and alone == 0
    assert torch.isclose(chance, torch.tensor(1 / 3))  # one of three other labelled utterances
    accuracy, _, alone = group_separation(near, near, torch.tensor([0, 1, 0, 1, 2]))
    assert accuracy == 0
    assert torch.isclose(alone, torch.tensor(1 / 5))
