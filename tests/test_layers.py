"""Linear layers, LayerNorm and dropout of the encoder: against PyTorch's own, and the laws."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fairasr_min import layers
from fairasr_min.conformer import Conformer, ConformerConfig
from fairasr_min.layers import Dropout, LayerNorm, Linear, dropout_mask, length_mask, weights_held


def test_length_mask():
    expected = [[n > t for t in range(4)] for n in (0, 2, 4, 9)]
    assert length_mask(torch.tensor([0, 2, 4, 9]), 4).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_without_a_gradient_takes_tensors_however_they_lie_in_memory(dtype):
    torch.manual_seed(0)
    inputs = [
        torch.randn(2, 3, 6),
        torch.randn(1, 1, 6).expand(2, 3, 6),
        torch.randn(6, 3, 2).permute(2, 1, 0),
        torch.randn(2, 3, 9)[..., 2:8],
    ]
    weights = [torch.randn(5, 6), torch.randn(5, 8)[:, 1:7], torch.randn(6, 5).t()]
    biases = [None, torch.randn(5), torch.randn(5, 3)[:, 1], torch.randn(1).expand(5)]
    for x, weight, bias in itertools.product(inputs, weights, biases):
        expected = F.linear(x, weight, bias)
        with torch.no_grad():
            b = None if bias is None else bias.to(dtype)
            y = layers.linear(x.to(dtype), weight.to(dtype), b)
            swished = layers.linear(x.to(dtype), weight.to(dtype), b, then="swish")
        close = 5e-2 if dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(y.float(), expected, atol=close, rtol=close)
        expected = F.silu(expected)
        assert torch.allclose(swished.float(), expected, atol=close, rtol=close)


@pytest.mark.parametrize(
    "cpu, family, half",
    [
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, 26, True),
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, 25, False),  # in two turns
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, None, True),  # not Linux
        ({"avx512_f": True, "cpu_name": "Intel Xeon"}, 6, False),
        ({"avx512_f": False, "cpu_name": "AMD EPYC"}, 25, False),
        ({}, None, False),
    ],
)
def test_convolutions_take_the_place_of_products_where_mkl_takes_half(
    monkeypatch, tmp_path, cpu, family, half
):
    system = tmp_path / "cpuinfo"
    if family:
        system.write_text(f"processor\t: 0\ncpu family\t: {family}\nmodel\t\t: 17\n")
    monkeypatch.setattr(layers, "CPU_INFO", system)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert layers._mkl_takes_half.__wrapped__() == half


@pytest.mark.parametrize("half", [True, False])  # by convolutions, by PyTorch's products
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_is_pytorchs(monkeypatch, threads, half):
    monkeypatch.setattr(layers, "_mkl_takes_half", lambda: half)
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    layer, x = Linear(6, 5), torch.randn(2, 3, 6, requires_grad=True)
    results = []
    for y in (F.linear(x, layer.weight, layer.bias), layer(x)):
        gradients = torch.autograd.grad(y.sin().sum(), (x, layer.weight, layer.bias))
        results.append((y, *gradients))
    torch.set_num_threads(before)
    for theirs, ours in zip(*results):
        assert theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-5)
    assert torch.allclose(layer(x[0, 0]), results[0][0][0, 0], atol=1e-6)  # one row
    for d2, d in ((5, 6), (6, 5)):
        y, x = torch.randn(2, 3, d2), torch.randn(2, 3, d)
        expected = torch.einsum("bni,bnj->ij", y, x)
        assert torch.allclose(layers.transposed_product(y, x), expected, atol=1e-5)


@pytest.mark.parametrize("then, follow", [("relu", F.relu), ("swish", F.silu)])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)])
def test_what_follows_linear_has_its_gradient_and_copies_none(shape, then, follow):
    layer, x = Linear(6, 5), torch.randn(shape, requires_grad=True)
    y = layers.linear(x, layer.weight, layer.bias, then)
    nodes = [y.grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before]
    assert not any("CopySlices" in node.name() for node in nodes)  # of ReLU in place on a view
    expected = follow(F.linear(x, layer.weight, layer.bias))
    theirs, ours = (torch.autograd.grad(z.sin().sum(), (x, layer.weight)) for z in (expected, y))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(theirs, ours))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_held_change_no_number_and_are_let_go(precision):
    torch.manual_seed(0)
    model = Conformer(ConformerConfig(d_model=16, n_layers=2, n_heads=2, subsampling_channels=4))
    model.eval()
    x, lengths = torch.randn(2, 61, 80), torch.tensor([61, 40])

    @torch.no_grad()
    def encode():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(x, lengths)[0]

    before = encode()
    close = 1e-6 if precision == "fp32" else 2e-2  # products may add in another order
    with weights_held():
        first, kept = encode(), len(layers._held)
        assert torch.allclose(first, before, atol=close, rtol=close)
        assert torch.equal(encode(), first) and len(layers._held) == kept > 0
        trained = model.train()(x, lengths)[0].sum()
        trained.backward()
        assert all(p.grad is not None for p in model.parameters())
        model.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert torch.equal(encode(), encode()) and not torch.allclose(encode(), before, atol=0.1)
    with weights_held():
        assert torch.allclose(encode(), encode()) and not torch.allclose(encode(), first, atol=0.1)
    assert layers._held is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_pytorchs(dtype):
    torch.manual_seed(0)
    ours = LayerNorm(24)
    with torch.no_grad():
        ours.weight.normal_(), ours.bias.normal_()
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    wide = x.detach().float().requires_grad_()
    results = []
    for y, inputs in (
        (ours(x), x),
        (F.layer_norm(wide, (24,), ours.weight, ours.bias), wide),
    ):
        gradients = torch.autograd.grad(y.float().sin().sum(), (inputs, ours.weight, ours.bias))
        results.append((y, *gradients))
    assert results[0][0].dtype == results[0][1].dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 0.1  # bfloat16 rounds what goes into the sine
    for one, other in zip(*results):
        assert torch.allclose(one.float(), other, atol=close, rtol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_drops_its_share_keeps_the_mean_and_passes_gradient_where_it_kept(dtype):
    torch.manual_seed(0)
    layer, x = Dropout(0.1), torch.ones(1000, 1001, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()) and y.dtype == dtype
    dropped = (y == 0).double().mean().item()
    scale = 1e-2 if dtype == torch.bfloat16 else 1e-3
    assert abs(dropped - 0.1) < 1e-3 and abs(y.double().mean().item() - 1) < scale
    assert y.unique().numel() == 2
    residual = torch.full_like(x, 3)
    wide = residual.float().requires_grad_()  # as autocast has it on a GPU
    mixed = layer(x, wide, 0.5)
    assert mixed.dtype == torch.promote_types(dtype, torch.float32)
    for one, share in zip(torch.autograd.grad(mixed.sum(), (wide, x)), (1, 0.5 / 0.9)):
        assert one.max().item() == pytest.approx(share, rel=5e-3) and one.shape == x.shape
    assert (layer(x, residual, 0.5).double() - 3).mean().item() == pytest.approx(0.5, abs=scale)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    assert layer.eval()(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x)) and Dropout(0.0)(x) is x


def test_draws_of_a_mask_are_independent_of_each_other_and_of_those_of_other_masks():
    torch.manual_seed(0)
    x = torch.empty(2**20, dtype=torch.bfloat16)
    one, other = ((dropout_mask(x.shape, 0.25, x) == 0).double() for _ in range(2))
    pairs = {"masks": (one, other)} | {k: (one[:-k], one[k:]) for k in (1, 2, 8, 176, 704, 2008)}
    for name, (a, b) in pairs.items():
        both, n = (a * b).mean().item(), len(a)
        deviation = (0.0625 * (1 - 0.0625) / n) ** 0.5
        assert abs(both - 0.0625) < 4.5 * deviation, name


def test_places_of_masks_come_from_the_generator_and_the_table_grows_without_changing(monkeypatch):
    monkeypatch.setattr(layers, "_tables", {})
    monkeypatch.setattr(layers, "PLACES", 1000)
    x = torch.empty(())
    torch.manual_seed(1)
    small = [dropout_mask((3, 50), 0.5, x).clone() for _ in range(20)]
    assert len({tuple(mask.flatten().tolist()) for mask in small}) == 20
    dropout_mask((700, 100), 0.5, x)  # another, longer table
    torch.manual_seed(1)
    assert all(torch.equal(mask, dropout_mask((3, 50), 0.5, x)) for mask in small)
    monkeypatch.setattr(layers, "_tables", {})  # as in a process that begins with the long one
    dropout_mask((700, 100), 0.5, x)
    torch.manual_seed(1)
    assert all(torch.equal(mask, dropout_mask((3, 50), 0.5, x)) for mask in small)
    assert small[0].dtype == torch.int32 and set(small[0].unique().tolist()) == {-1, 0}


def test_a_table_of_masks_made_without_gradients_serves_training(monkeypatch):
    monkeypatch.setattr(layers, "_tables", {})
    layer, x = Dropout(0.5), torch.ones(4, 5)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_masks_do_what_a_cpus_do(dtype):
    """Bools in the place of integers; the operator that takes them is there on a CPU, too."""
    x = torch.randn(5, 7).to(dtype)
    bits = layers.dropout_mask(x.shape, 0.4, x)
    bools = bits != 0
    expected = torch.where(bools, x, 0)
    assert 0 < bools.sum() < bools.numel()
    assert torch.equal(layers.kept(x, bits), expected)
    assert torch.equal(layers.kept(x, bools), expected)
    assert torch.equal(layers.keep_(x.clone(), bools), expected)
    assert layers.dropout_mask(x.shape, 0.4, x.to("meta")).dtype == torch.bool
