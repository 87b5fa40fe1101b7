"""Learned clips shrink the range of each group, and survive their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rotexport.errors import GraphError
from rotexport.learning.rounding import WeightRounding
from rotexport.passes.quantize_weights import quantizer_of
from rotexport.quant.clipped import ClippedRounding, save_clips
from rotexport.quant.formats import weight_format
from rotexport.quant.plan import SitePlan
from rotexport.quant.scales import AsymmetricRounding, ScaledRounding
from rotexport.quant.scheme import ActivationScheme, WeightScheme
from rotexport.quant.solved import dequantized

K, N, GROUP = 32, 5, 8
WEIGHT = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32) + np.float32(0.3)
RATIOS = np.random.default_rng(1).uniform(0.5, 1, (K // GROUP, N)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_range_is_shrunk_by_its_own_ratio(symmetric: bool, tmp_path: Path) -> None:
    save_clips(tmp_path / "clips.npz", {"0.up": RATIOS, "0.gate": RATIOS[:, ::-1]})
    plain = (ScaledRounding if symmetric else AsymmetricRounding)(weight_format("int4"), GROUP, search=True)
    result = ClippedRounding(plain, tmp_path / "clips.npz", "0.up").quantize(WEIGHT)
    for g in range(K // GROUP):
        for n in range(N):
            rows = WEIGHT[g * GROUP : (g + 1) * GROUP, n].astype(np.float64)
            if symmetric:
                scale, zero = np.abs(rows).max() * RATIOS[g, n] / 7, 0
            else:
                least, most = min(rows.min(), 0), max(rows.max(), 0)
                scale, zero = (most - least) * RATIOS[g, n] / 15, np.rint(-8 - least / ((most - least) / 15))
            expected = np.clip(np.rint(rows / scale), -8 - zero, 7 - zero) * scale
            found = dequantized(result)[g * GROUP : (g + 1) * GROUP, n]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_exported_is_what_was_trained(symmetric: bool, tmp_path: Path) -> None:
    scheme = WeightScheme("int4", GROUP, symmetric=symmetric)
    site = SitePlan("0.up", "node", K, scheme, ActivationScheme(), clips=tmp_path / "clips.npz")
    rounding = WeightRounding(site, N, learn_clip=True)
    with torch.no_grad():
        rounding.logit += torch.randn(rounding.logit.shape, generator=torch.Generator().manual_seed(0))
        trained = rounding(torch.from_numpy(WEIGHT))
        save_clips(tmp_path / "clips.npz", {"0.up": rounding.ratios().numpy()})
    exported = dequantized(quantizer_of(site).quantize(WEIGHT))
    np.testing.assert_allclose(exported, trained.numpy(), rtol=1e-6, atol=1e-7)
    unclipped = SitePlan("0.up", "node", K, scheme, ActivationScheme())
    assert np.abs(exported - dequantized(quantizer_of(unclipped).quantize(WEIGHT))).max() > 1e-3


def test_clips_of_another_matrix_are_refused(tmp_path: Path) -> None:
    save_clips(tmp_path / "clips.npz", {"0.up": RATIOS})
    quantizer = ClippedRounding(
        ScaledRounding(weight_format("int4"), 16, search=False), tmp_path / "clips.npz", "0.up"
    )
    with pytest.raises(GraphError, match=r"site 0\.up: .* holds clips \(4, 5\), not \(2, 5\)"):
        quantizer.quantize(WEIGHT)
