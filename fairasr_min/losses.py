"""The losses of FairASR: plain functions of tensors, always computed in float32.

Shapes: B utterances, P projection size, 2B views (rows 0..B-1 view 1, rows B..2B-1 view 2).
"""

import torch
import torch.nn.functional as F


class _GradReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.strength * grad, None


def grad_reverse(x: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Gradient reversal layer (Ganin and Lempitsky, ICML 2015): x forward, -strength * grad back.

    The layers after it minimise the loss; the layers before it maximise the same loss.
    """
    return _GradReverse.apply(x, strength)


def info_nce(z1: torch.Tensor, z2: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """InfoNCE of SimCLR, "NT-Xent" (Chen et al., ICML 2020, eq. 1): (B, P), (B, P) -> scalar.

    Each of the 2B views must find the other view of its utterance among the 2B - 1 other views,
    by cosine similarity: a cross-entropy with one right answer.
    """
    with torch.autocast(z1.device.type, enabled=False):
        n = len(z1)
        logits = _similarities(z1, z2, temperature, normalize=True)
        other_view = torch.arange(2 * n, device=z1.device).roll(n)
        return F.cross_entropy(logits, other_view)


def sup_con(
    z1: torch.Tensor,
    z2: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 0.2,
    normalize: bool = True,
    own_view: bool = True,
) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, L_out, eq. 2); FairASR's FSC.

    (B, P), (B, P), labels (B,) -> scalar. The same cross-entropy, with every view of the anchor's
    group as a right answer: the mean over the positives of -log p(positive), then over the anchors.

    labels < 0 are unlabelled: no anchors, no positives, not in any denominator.
    normalize: cosine similarity; False is the paper's code (unbounded logits).
    own_view: the anchor's own other view is a positive (the paper's code). False leaves that pair
    to InfoNCE: it is then neither positive nor negative, and anchors without a positive are left
    out. With no anchor left the result is 0, still attached to the graph.
    """
    with torch.autocast(z1.device.type, enabled=False):
        n = len(z1)
        labels = torch.cat([labels, labels])
        known = labels >= 0
        logits = _similarities(z1, z2, temperature, normalize)
        candidate = known[None, :].repeat(2 * n, 1)  # who stands in the denominator of whom
        candidate.fill_diagonal_(False)
        if not own_view:
            index = torch.arange(2 * n, device=z1.device)
            candidate[index, index.roll(n)] = False
        positive = candidate & (labels[:, None] == labels[None, :]) & known[:, None]

        # -inf would give NaN in rows without any candidate; those rows are not anchors
        log_prob = F.log_softmax(logits.masked_fill(~candidate, torch.finfo(logits.dtype).min), 1)
        n_positive = positive.sum(1)
        per_anchor = -(log_prob * positive).sum(1) / n_positive.clamp(min=1)
        anchor = n_positive > 0
        return per_anchor.sum() / anchor.sum().clamp(min=1)  # others contribute 0


def _similarities(z1, z2, temperature, normalize):
    """(B, P), (B, P) -> logits (2B, 2B) in float32; a view is never compared with itself."""
    z = torch.cat([z1, z2]).float()
    if normalize:
        z = F.normalize(z, dim=1)
    logits = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return logits.masked_fill(itself, torch.finfo(logits.dtype).min)


def ctc_loss(log_probs, lengths, targets, target_lengths) -> torch.Tensor:
    """Connectionist temporal classification (Graves et al., ICML 2006): one value an utterance.

    log_probs (B, T, V+1) with the blank last, lengths (B,), targets (B, U), target_lengths (B,)
    -> (B,) in nats. A target that its frames cannot hold gives 0 and no gradient; the data check
    finds those before training.
    """
    with torch.autocast(log_probs.device.type, enabled=False):
        return F.ctc_loss(
            log_probs.float().transpose(0, 1),
            targets,
            lengths,
            target_lengths,
            blank=log_probs.shape[-1] - 1,
            reduction="none",
            zero_infinity=True,
        )


@torch.no_grad()
def contrastive_accuracy(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """Share of the 2B views whose nearest view is their own other one. Chance is 1 / (2B - 1)."""
    n = len(z1)
    nearest = _similarities(z1, z2, 1.0, normalize=True).argmax(1)
    return (nearest == torch.arange(2 * n, device=z1.device).roll(n)).float().mean()


@torch.no_grad()
def group_separation(z1: torch.Tensor, z2: torch.Tensor, labels: torch.Tensor):
    """How well a space separates groups, among other utterances of the batch: three scalars.

    (B, P), (B, P), labels (B,) -> the share of labelled views whose nearest view of another
    utterance has their label; what that share would be by chance; the share of labelled
    utterances that are alone of their group in the batch (their only FSC positive is their own
    other view). Nearest by cosine.
    """
    n = len(z1)
    both = torch.cat([labels, labels])
    index = torch.arange(2 * n, device=z1.device)
    same_utterance = index[:, None] % n == index[None, :] % n
    candidate = (both >= 0)[None, :] & (both >= 0)[:, None] & ~same_utterance
    match = candidate & (both[:, None] == both[None, :])
    similarity = _similarities(z1, z2, 1.0, normalize=True).masked_fill(~candidate, -2.0)
    anchor = candidate.any(1)
    hit = match[index, similarity.argmax(1)]
    chance = match.sum(1) / candidate.sum(1).clamp(min=1)
    alone = ~match.any(1) & (both >= 0)
    return (
        (hit & anchor).sum() / anchor.sum().clamp(min=1),
        (chance * anchor).sum() / anchor.sum().clamp(min=1),
        alone.sum() / (both >= 0).sum().clamp(min=1),
    )
