"""Every quantized form runs in the session that evaluates builds, as it does without optimizations."""

import numpy as np
import pytest
from support.graphs import graph_of, run

from rotexport.graph.io import WeightFile, save_model
from rotexport.passes.quantize_activations import QuantizeActivations
from rotexport.passes.quantize_weights import QuantizeWeights
from rotexport.quant.calibrate import InputStatistics
from rotexport.quant.plan import SitePlan
from rotexport.quant.scheme import ActivationScheme, WeightScheme
from rotexport.runtime.model import OnnxModel

K, N = 32, 6


def decoder(dtype):
    return graph_of(f"""decoder (int64[batch, sequence] input_ids, {dtype}[50, {K}] Table, {dtype}[{K}, {N}] W)
        => ({dtype}[batch, sequence, {N}] logits)
        {{ x = Gather(Table, input_ids)
           logits = MatMul(x, W) }}""")


def forms():
    for weights in ("int8", "int4", "fp8"):
        for group in (None, 16):
            yield WeightScheme(weights, group), ActivationScheme()
            if weights != "fp8":
                yield WeightScheme(weights, group, symmetric=False), ActivationScheme()
    for group in (None, 16):
        yield WeightScheme("int4", group, symmetric=False), ActivationScheme("int8", "dynamic")
        yield WeightScheme("int8", group, symmetric=False), ActivationScheme("int8")
    for mode in ("static", "dynamic"):
        yield WeightScheme("fp8"), ActivationScheme("fp8", mode)
        yield WeightScheme("int8"), ActivationScheme("int8", mode)
        yield WeightScheme("int4", 16), ActivationScheme("int8", mode)
        yield WeightScheme("int8", 16), ActivationScheme("int4", mode)
    yield WeightScheme("int4", 16), ActivationScheme("int4", "dynamic", group=16)
    yield WeightScheme("int4", 16), ActivationScheme("int4", "dynamic", symmetric=False)


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("weights,activations", list(forms()))
def test_optimizations_change_rounding_only(tmp_path, dtype, low_memory, weights, activations):
    graph = decoder(dtype)
    plan = [SitePlan("head", "logits", K, weights, activations)]
    seen = InputStatistics(np.full(2, 3.0), np.full(K, 3.0), 3.0, np.ones(1, np.int64))
    QuantizeWeights(plan).run(graph)
    QuantizeActivations(plan, {"head": seen}).run(graph)
    ids = np.arange(20).reshape(2, 10)
    plain = run(graph, input_ids=ids)[0]
    save_model(graph, tmp_path / "model.onnx", WeightFile(tmp_path / "model.data"))
    model = OnnxModel(tmp_path / "model.onnx", low_memory=low_memory)
    result = model.run(ids)["logits"]
    assert result.dtype == plain.dtype
    # Half precision rounds the products of 32 terms in another order; float32 hardly.
    tolerance = 1e-5 if dtype == "float" else 4e-3
    assert np.abs(result - plain).max() <= tolerance * np.abs(plain).max()
