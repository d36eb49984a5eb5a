"""The walk through a model: what is measured, what is corrected, what is left behind."""

from __future__ import annotations

import numpy as np
import torch

from edgewright.export.calibration.decoder_blocks import find_blocks, weight_layers, weight_of
from edgewright.export.calibration.gptq import damped
from edgewright.export.calibration.layerwise import DAMP, SINK, Moments, Task, corrected, quantize_layerwise
from edgewright.export.source import load_source
from edgewright.student import load_model


def test_moments_leave_out_the_start_of_every_sequence():
    generator = torch.Generator().manual_seed(1)
    reference, quantized = (torch.randn(3, 10, 6, generator=generator) for _ in range(2))
    moments = Moments.empty(6)
    moments.add(reference[:2], quantized[:2])
    moments.add(reference[2:], quantized[2:])
    right, found = (value[:, SINK:].reshape(-1, 6).double().numpy() for value in (reference, quantized))
    np.testing.assert_allclose(moments.hessian, found.T @ found, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.drift, (right - found).T @ found, rtol=1e-5, atol=1e-5)


def test_the_correction_is_the_ridge_regression():
    """Against least squares on the data itself: W X^T from Z, the change of W damped."""
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((400, 12))
    quantized = reference + 0.3 * rng.standard_normal((400, 12)) + 0.1
    weight = rng.standard_normal((5, 12)).astype(np.float32)
    moments = Moments(quantized.T @ quantized, (reference - quantized).T @ quantized)
    damping = damped(moments.hessian, DAMP) - moments.hessian
    stacked = np.concatenate([quantized, np.linalg.cholesky(damping).T])
    wanted = np.concatenate([(reference - quantized) @ weight.T, np.zeros((12, 5))])
    change = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    np.testing.assert_allclose(corrected(weight, moments), weight + change, rtol=1e-8, atol=1e-10)

    def missed(candidate: np.ndarray) -> float:
        return float(((reference @ weight.T - quantized @ candidate.T) ** 2).sum())

    assert missed(corrected(weight, moments)) < 0.95 * missed(weight)


def test_the_model_computes_with_what_was_found(tiny_model):
    """In place, every weight asked for and no other, at the widths asked for."""
    source = load_source(tiny_model("llama"))
    model = load_model(source.directory).eval()
    layers = weight_layers(model, find_blocks(model), embedding=source.embedding, head=source.head)
    before = {name: weight_of(layer).detach().clone() for name, layer in layers.items()}
    kept = "model.layers.0.self_attn.k_proj.weight"
    bits = {name: 8 if "mlp" in name else 4 for name in layers if name not in (kept, source.head)}
    sequences = torch.randint(0, 200, (4, 64), generator=torch.Generator().manual_seed(0))
    task = Task(
        matrix=source.matrix, bits=bits, group=32, embedding=source.embedding, head=source.head, say=lambda line: None
    )
    lattice = quantize_layerwise(model, sequences, task)
    assert {name: each.bits for name, each in lattice.items()} == bits
    for name, layer in layers.items():
        right = torch.from_numpy(lattice[name].dequantize()) if name in lattice else before[name]
        torch.testing.assert_close(weight_of(layer).detach(), right, rtol=0, atol=0)
