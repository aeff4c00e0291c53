"""The encoder and the two models: against double loops, and the laws (NeMo: test_nemo.py)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fairasr_min import conformer
from fairasr_min.conformer import (
    SIZES,
    Conformer,
    ConformerConfig,
    FeedForward,
    MaskedBatchNorm,
    RelativeAttention,
    Subsampling,
    by_key,
    encoder_frames,
    relative_positions,
)
from fairasr_min.layers import length_mask
from fairasr_min.model import ConformerCTC, FairASR, masked_mean, samples_to_frames

SMALL = ConformerConfig(
    d_model=24,
    n_layers=2,
    n_heads=3,
    conv_kernel=7,
    subsampling_channels=8,
    dropout=0,
    dropout_att=0,
)


def test_size_small_is_nemos_conformer_ctc_small():
    assert sum(p.numel() for p in ConformerCTC(SIZES["small"]).parameters()) == 13_154_033


@pytest.mark.parametrize("rows, n", [(1, 1), (2, 2), (5, 5), (2, 5), (1, 4)])
@pytest.mark.parametrize("more", [0, 1, 3])
def test_by_key_takes_the_score_of_the_relative_position(rows, n, more):
    scores = torch.randn(2, 3, rows, n + rows + more)
    out = by_key(scores, n)
    assert out.shape == (2, 3, rows, n)
    for i in range(rows):
        for j in range(n):
            assert torch.equal(out[..., i, j], scores[..., i, rows - i + j])


@pytest.mark.parametrize("rows", [1, 2, 128])  # queries at a time
def test_attention_is_the_double_loop(monkeypatch, rows):
    monkeypatch.setattr(conformer._Attention, "BYTES", 4 * rows)
    torch.manual_seed(0)
    b, t, d, heads = 2, 5, 12, 3
    attention = RelativeAttention(d, heads, dropout=0.0)
    torch.nn.init.normal_(attention.pos_bias_u)
    torch.nn.init.normal_(attention.pos_bias_v)
    x, valid = torch.randn(b, t, d), length_mask(torch.tensor([5, 3]), t)
    with torch.no_grad():
        out = attention(x, valid, None, relative_positions(t, d, x.device))
        q, k, v = attention.linear_q(x), attention.linear_k(x), attention.linear_v(x)
        size = d // heads
        for n in range(b):
            for i in range(int(valid[n].sum())):
                parts = []
                for h in range(heads):
                    cut = slice(h * size, (h + 1) * size)
                    scores = []
                    for j in range(int(valid[n].sum())):
                        p = attention.linear_pos(sinusoid(i - j, d))[cut]
                        content = (q[n, i, cut] + attention.pos_bias_u[h]) @ k[n, j, cut]
                        place = (q[n, i, cut] + attention.pos_bias_v[h]) @ p
                        scores.append((content + place) / size**0.5)
                    weights = torch.stack(scores).softmax(0)
                    parts.append(weights @ v[n, : len(weights), cut])
                expected = attention.linear_out(torch.cat(parts))
                assert torch.allclose(out[n, i], expected, atol=1e-5)


@pytest.mark.parametrize("d, heads, bias", [(24, 3, True), (12, 4, False), (176, 4, True)])
@pytest.mark.parametrize("limited", [False, True])
def test_the_attention_of_a_gpu_is_that_of_a_cpu(d, heads, bias, limited):
    torch.manual_seed(0)
    n, lengths = 37, torch.tensor([37, 20, 5])
    attention = RelativeAttention(d, heads, dropout=0.0, bias=bias).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    x = torch.randn(3, n, d, dtype=torch.float64, requires_grad=True)
    valid = length_mask(lengths, n)
    context = torch.rand(n, n) < 0.5 if limited else None
    positions, found = relative_positions(n, d, x.device).double(), []
    for attend in (attention.by_hand, attention.fused):
        attention.zero_grad()
        x.grad = None
        y = attend(x, valid, context, positions, 0.0)[valid]
        y.square().sum().backward()
        used = [p for p in attention.parameters() if p.grad is not None]
        found.append([y.detach(), x.grad, *(p.grad for p in used)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rows", [2, 128])
@pytest.mark.parametrize("limited, dropout", [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_the_gradient_of_attention_is_that_of_finite_differences(
    monkeypatch, rows, limited, dropout
):
    monkeypatch.setattr(conformer._Attention, "BYTES", 8 * rows)
    torch.manual_seed(0)
    attention = RelativeAttention(4, 2, dropout, bias=not limited).double()
    torch.nn.init.normal_(attention.pos_bias_u)
    torch.nn.init.normal_(attention.pos_bias_v)
    x = torch.randn(2, 5, 4, dtype=torch.double, requires_grad=True)
    valid = length_mask(torch.tensor([5, 3]), 5)
    context = conformer._within((2, 1), 5, x.device) if limited else None
    positions = relative_positions(5, 4, x.device).double()
    names, parameters = zip(*attention.named_parameters())

    def call(x, *parameters):
        torch.manual_seed(1)  # the same weights dropped each time
        arguments = (x, valid, context, positions)
        y = torch.func.functional_call(attention, dict(zip(names, parameters)), arguments)
        return y[valid]

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_gradient_of_feed_forward_is_that_of_finite_differences(dropout):
    torch.manual_seed(0)
    block = FeedForward(3, 5, dropout, bias=True).double()
    x = torch.randn(2, 4, 3, dtype=torch.double, requires_grad=True)
    names, parameters = zip(*block.named_parameters())

    def call(x, *parameters):
        torch.manual_seed(1)  # the same elements dropped each time
        return torch.func.functional_call(block, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))
    expected = block.linear2(torch.nn.functional.silu(block.linear1(x)))
    assert torch.allclose(block.eval()(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_the_gated_convolution_and_its_gradient_are_pytorchs(bias):
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(6, 6, 5, padding=2, groups=6, bias=bias)
    x = torch.randn(3, 9, 12, requires_grad=True)
    valid = length_mask(torch.tensor([9, 4, 1]), 9)[:, :, None].float()
    theirs = layer((torch.nn.functional.glu(x, dim=-1) * valid).transpose(1, 2)).transpose(1, 2)
    ours = conformer._GatedConvolution.apply(x, valid, layer.weight, layer.bias)
    inputs = (x, *layer.parameters())
    for y, y2 in zip(
        (theirs, *torch.autograd.grad(theirs.sin().sum(), inputs)),
        (ours, *torch.autograd.grad(ours.sin().sum(), inputs)),
    ):
        assert y.shape == y2.shape and torch.allclose(y, y2, atol=1e-5)


@pytest.mark.parametrize("axis", [2, 3])
def test_the_weight_gradient_of_the_gated_convolution_is_autograds(axis):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 20, 8), torch.randn(8, 1, 5, requires_grad=True)
    y = conformer._GatedConvolution.over_time(x, weight)
    d_y = torch.randn_like(y)
    found = conformer._GatedConvolution.weight_gradient(x, d_y, weight, axis)
    torch.testing.assert_close(found, torch.autograd.grad(y, weight, d_y)[0])


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("of_features", [False, True])  # the usual case has a gradient by hand
def test_subsampling_is_pytorchs_convolutions(factor, precision, of_features):
    torch.manual_seed(0)
    config = ConformerConfig(
        n_mels=13, d_model=8, subsampling_channels=6, subsampling_factor=factor
    )
    ours = Subsampling(config)
    x, lengths = torch.randn(3, 19, 13, requires_grad=of_features), torch.tensor([19, 19, 19])
    inputs = [*ours.parameters(), *([x] if of_features else [])]
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        theirs = ours.conv(x[:, None]).transpose(1, 2).flatten(2)
        theirs = torch.nn.functional.linear(theirs, ours.out.weight, ours.out.bias)
        for y in (theirs, ours(x, lengths)[0]):
            gradients = torch.autograd.grad(y.float().sin().sum(), inputs)
            results.append((y, *gradients))
    close = 1e-5 if precision == "fp32" else 5e-2
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=close, rtol=close)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_changes_nothing_but_what_is_kept(precision):
    config = replace(SMALL, n_layers=3, dropout=0.1, dropout_att=0.1)
    x, lengths = torch.randn(2, 60, 80), torch.tensor([60, 41])
    results, kept = [], []

    def count(tensor):
        kept[-1] += tensor.nelement()
        return tensor

    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = Conformer(config)
        encoder.checkpointing = checkpointing
        kept.append(0)
        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), hooks:
            y, _ = encoder(x, lengths)
        y.float().square().sum().backward()
        after = torch.rand(3)  # the random numbers that follow are the same, too
        gradients = [p.grad for p in encoder.parameters()]
        results.append([y, after, *gradients, *encoder.buffers()])
        seen = encoder.layers[0].conv.batch_norm.num_batches_tracked
        assert seen == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "rows",  # of scores, times these and plus these; powers of two end at 2^127
    [(1, 0), (1, -10_000), (1, 300), (1, -300), (100, 0), (1e4, 0), (1e30, 0)],
)
def test_attention_weights_are_a_softmax_however_large_the_scores(dtype, rows):
    torch.manual_seed(0)
    scores = torch.randn(3, 7, 11)
    scores[1, 2] = scores[1, 2] * rows[0] + rows[1]
    scores = scores.to(dtype)
    before = scores.clone()
    weights = conformer.attention_weights(scores)
    expected = torch.softmax(scores.double() * np.log(2), -1)
    close = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float64: 1e-12}[dtype]
    close *= 1 + abs(rows[1]) / 10  # in float32, numbers of that size lie so far apart
    assert weights.dtype == dtype and torch.allclose(weights.double(), expected, atol=close)
    assert torch.equal(scores, before)


def sinusoid(position, d):
    out = torch.zeros(d)
    for c in range(0, d, 2):
        angle = position / 10_000 ** (c / d)
        out[c], out[c + 1] = np.sin(angle), np.cos(angle)
    return out


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
@pytest.mark.parametrize("depthwise", [False, True])
def test_encoder_frames_is_what_the_convolutions_leave(factor, depthwise):
    config = replace(SMALL, subsampling_factor=factor, depthwise_subsampling=depthwise)
    encoder = Conformer(config).eval()
    for n in (1, 2, 3, 4, 5, 8, 9, 97, 100):
        h, lengths = encoder(torch.randn(1, n, 80), torch.tensor([n]))
        assert h.shape[1] == int(lengths) == encoder_frames(n, factor)
        assert samples_to_frames(160 * n + 159, config) == encoder_frames(n, factor)


def test_limited_context_is_the_band_of_the_mask():
    """Attention alone: what lies outside of [i - 2, i + 1] must not change frame i."""
    torch.manual_seed(0)
    config = replace(SMALL, n_layers=1, conv_kernel=1, att_context=(2, 1))
    encoder = Conformer(config).eval()
    encoder.pre_encode = torch.nn.Identity()
    x, lengths = torch.randn(1, 9, 24), torch.tensor([9])
    encoder.pre_encode.forward = lambda x, lengths: (x, lengths)
    before, _ = encoder(x, lengths)
    for j in range(9):
        other = x.clone()
        other[0, j] += torch.randn(24)
        changed = ((encoder(other, lengths)[0] - before)[0].abs() > 1e-6).any(-1)
        assert changed.tolist() == [i - 2 <= j <= i + 1 for i in range(9)]


def test_tied_position_biases_are_one_parameter_and_stored_with_each_layer():
    encoder = Conformer(replace(SMALL, tied_position_biases=True))
    named = [name for name, _ in encoder.named_parameters() if "pos_bias" in name]
    stored = [name for name in encoder.state_dict() if "pos_bias" in name]
    assert len(named) == 2 and len(stored) == 2 * SMALL.n_layers


def random_model(seed=0):
    """A FairASR whose BatchNorm statistics and position biases are not the initial ones."""
    torch.manual_seed(seed)
    model = FairASR(SMALL, n_adversaries=1, independent_space=True)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if "pos_bias" in name:
            torch.nn.init.normal_(parameter)
    return model


def test_an_embedding_does_not_depend_on_batch_mates():
    model = random_model().eval()
    waveforms = [torch.randn(n) for n in (5000, 16000, 23457, 800, 160)]
    n_samples = torch.tensor([len(w) for w in waveforms])
    together = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    with torch.no_grad():
        z, (r,) = model(*model.log_mel(together, n_samples))
        for i, waveform in enumerate(waveforms):
            alone, (r_alone,) = model(*model.log_mel(waveform[None], n_samples[i : i + 1]))
            assert torch.allclose(alone[0], z[i], atol=1e-5)
            assert torch.allclose(r_alone[0], r[i], atol=1e-5)


def test_in_training_loss_and_gradients_do_not_depend_on_the_amount_of_padding():
    n_frames = torch.tensor([40, 57, 12])
    features = torch.randn(3, 57, 80) * length_mask(n_frames, 57)[:, :, None]

    def train_step(extra):
        model = random_model().train()
        z, (r,) = model(torch.nn.functional.pad(features, (0, 0, 0, extra)), n_frames)
        loss = z.square().mean() + r.sin().mean()
        loss.backward()
        grads = {k: p.grad for k, p in model.named_parameters()}
        return loss, grads, dict(model.named_buffers())

    loss, grads, buffers = train_step(extra=0)
    for extra in (1, 3, 50):
        loss2, grads2, buffers2 = train_step(extra)
        assert torch.allclose(loss, loss2, atol=1e-6)
        for name in grads:
            assert torch.allclose(grads[name], grads2[name], rtol=1e-4, atol=1e-5), name
        for name in buffers:
            assert torch.allclose(buffers[name].float(), buffers2[name].float(), atol=1e-5), name


def test_masked_batch_norm_is_batch_norm_of_the_valid_frames():
    torch.manual_seed(0)
    lengths = torch.tensor([7, 3, 5])
    valid = length_mask(lengths, 7)
    x = torch.randn(3, 7, 4).mul(3).add(1)
    ours, theirs = MaskedBatchNorm(4), torch.nn.BatchNorm1d(4)
    for norm in (ours, theirs):
        norm.weight.data = torch.tensor([1.0, 2.0, 0.5, -1.0])
        norm.bias.data = torch.tensor([0.0, 1.0, 2.0, 3.0])
    frames = x[valid].requires_grad_()  # (15, 4): only the valid ones
    padded = x.masked_fill(~valid[:, :, None], 99.0).requires_grad_()
    out, expected = ours(padded, valid[:, :, None])[valid], theirs(frames)
    assert torch.allclose(out, expected, atol=1e-5)
    toward = torch.randn(15, 4)
    (out * toward).sum().backward()
    (expected * toward).sum().backward()
    assert torch.allclose(padded.grad[valid], frames.grad, atol=1e-5)
    assert padded.grad[~valid].abs().max() == 0
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, atol=1e-5)
    assert torch.allclose(ours.bias.grad, theirs.bias.grad, atol=1e-5)
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-5)
    assert ours.num_batches_tracked == 1


def test_masked_mean_is_the_mean_of_the_valid_frames():
    x, lengths = torch.randn(3, 6, 4), torch.tensor([6, 2, 0])
    x[2] = float("nan")  # an utterance without frames must not spread
    mean = masked_mean(x, lengths)
    assert torch.allclose(mean[0], x[0].mean(0), atol=1e-6)
    assert torch.allclose(mean[1], x[1, :2].mean(0), atol=1e-6)
    assert torch.equal(mean[2], torch.zeros(4))


@pytest.mark.parametrize("n, independent, heads", [(0, True, 0), (2, False, 0), (2, True, 2)])
def test_heads_of_the_two_spaces(n, independent, heads):
    model = FairASR(SMALL, n, independent)
    assert len(model.adversaries) == heads
    z, reversed_z = model(torch.randn(2, 20, 80), torch.tensor([20, 9]))
    assert z.shape == (2, 128) and len(reversed_z) == n
    for r in reversed_z:
        assert torch.equal(r, z) != independent  # the reversal is the identity forward


def test_a_bf16_step_stays_close_to_fp32():
    model = random_model().train()
    features, n_frames = torch.randn(2, 60, 80), torch.tensor([60, 31])
    z, _ = model(features, n_frames)
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = model(features, n_frames)
    assert torch.nn.functional.cosine_similarity(z, half.float()).min() > 0.99


def test_transcribe_needs_eval_mode_and_takes_nothing():
    model = ConformerCTC(SMALL, vocab_size=5)
    with pytest.raises(ValueError, match="eval"):
        model.train().transcribe([torch.zeros(1600)])
    assert model.eval().transcribe([]) == []
