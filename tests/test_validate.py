"""Translation validation on a toy decoder that exists twice: as a PyTorch module and as ONNX text.

Its blocks compute x + tanh(W sum of x so far), so like attention they need a cache when run in pieces.
"""

from types import SimpleNamespace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from rotexport.errors import ValidationError
from rotexport.graph.io import Scratch
from rotexport.metrics import EQUAL_DB, Thresholds
from rotexport.passes.base import Pass, PassReport, Preserves
from rotexport.transforms.transform import Hadamard
from rotexport.validate import PassValidator, StreamView, observe_reference, prove

VOCAB, WIDTH, BLOCKS = 17, 8, 3
TOKENS = np.random.default_rng(5).integers(0, VOCAB, 24)
WINDOWS = np.random.default_rng(6).integers(0, VOCAB, (2, 12))


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.mix(x.cumsum(dim=1)))


class ToyDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=BLOCKS)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids, use_cache):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))


BLOCK = """
    present_N_key = Concat<axis = 1>(past_key_values_N_key, x_N)
    sums_N = CumSum(present_N_key, one)
    recent_N = Slice(sums_N, start, end, one)
    mixed_N = MatMul(recent_N, mix_N)
    plain_N = Tanh(mixed_N)
    bent_N = MatMul(plain_N, turn)
    x_M = Add(x_N, bent_N)
"""


def toy_graph(model, basis=None):
    """Write the module as a graph; its stream is multiplied by `basis`, an orthogonal matrix, when given.

    Tanh pins its output to the identity: there the turn stays online.
    """
    blocks = "".join(BLOCK.replace("_N", f"_{n}").replace("_M", f"_{n + 1}") for n in range(BLOCKS))
    pasts = "".join(f", float[batch, past, {WIDTH}] past_key_values_{n}_key" for n in range(BLOCKS))
    presents = "".join(f", float[batch, total, {WIDTH}] present_{n}_key" for n in range(BLOCKS))
    proto = onnx.parser.parse_model(f"""
    <ir_version: 11, opset_import: ["" : 23]>
    toy (int64[batch, sequence] input_ids{pasts}) => (float[batch, sequence, {VOCAB}] logits{presents})
    <int64[1] one = {{1}}, int64[1] end = {{1000000}}>
    {{
        x_0 = Gather(table, input_ids)
        length = Shape<start = 1, end = 2>(input_ids)
        start = Neg(length)
        {blocks}
        logits = MatMul(x_{BLOCKS}, head)
    }}""")
    turn = np.eye(WIDTH) if basis is None else basis
    weights = {"table": model.embedding.weight.detach().numpy() @ turn}
    weights["head"] = turn.T @ model.head.weight.detach().numpy().T
    weights["turn"] = turn
    for index, block in enumerate(model.blocks):
        weights[f"mix_{index}"] = turn.T @ block.mix.weight.detach().numpy().T
    proto.graph.initializer.extend(
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()
    )
    graph = gs.import_onnx(proto)
    for name, tensor in graph.tensors().items():
        parts = name.split("_")
        if name.startswith(("past_key", "present")):
            tensor.name = ".".join(["_".join(parts[:-2]), *parts[-2:]])
        elif parts[0] == "x" and parts[1] != "0":
            tensor.name = f"block.{int(parts[1]) - 1}.output"
    return graph


class ScaleHead(Pass):
    """Multiply the head by `factor`, exactly undone when `undo` is set."""

    def __init__(self, factor, preserves=Preserves.ROUNDING, undo=False):
        self.name, self.preserves = "scale_head", preserves
        self.factor, self.undo = factor, undo

    def run(self, graph):
        (head,) = (node for node in graph.nodes if node.outputs and node.outputs[0].name == "logits")
        weight = head.inputs[1]
        head.inputs[1] = gs.Constant(f"{weight.name}.scaled", weight.values * np.float32(self.factor))
        if self.undo:
            scaled = gs.Variable("scaled_logits", np.float32)
            (logits,) = head.outputs
            head.outputs = [scaled]
            inverse = gs.Constant("inverse", np.array(1 / self.factor, np.float32))
            graph.nodes.append(gs.Node("Mul", inputs=[scaled, inverse], outputs=[logits]))
        return PassReport(changed=1)


class ForgetPast(Pass):
    """A defect that only shows on a filled cache: the cache is not read."""

    name, preserves = "forget_past", Preserves.ROUNDING

    def run(self, graph):
        for node in graph.nodes:
            if node.op == "CumSum":
                node.inputs[0] = node.inputs[0].inputs[0].inputs[1]
        return PassReport(changed=BLOCKS)


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(7)
    return ToyDecoder().eval()


@pytest.fixture
def scratch(tmp_path):
    return Scratch(tmp_path)


def validated(scratch, graph, *passes):
    validator = PassValidator(scratch, TOKENS)
    validator.start(graph)
    for rewrite in passes:
        report = rewrite.run(graph)
        validator.check(rewrite, report.changed, graph)
    return validator.records


def test_a_pass_that_keeps_its_promise_is_recorded(toy, scratch):
    (record,) = validated(scratch, toy_graph(toy), ScaleHead(3.0, undo=True))
    assert (record.name, record.preserves) == ("scale_head", Preserves.ROUNDING)
    assert record.comparison.tokens == len(TOKENS)
    assert 0 < record.comparison.relative_error < 1e-6


def test_a_pass_that_breaks_its_promise_is_named_with_figures(toy, scratch):
    with pytest.raises(
        ValidationError, match=r"'scale_head' must leave the model equal within rounding.*0\.10%"
    ):
        validated(scratch, toy_graph(toy), ScaleHead(1.001))


def test_the_bound_lies_between_rounding_and_a_defect(toy, scratch):
    validated(scratch, toy_graph(toy), ScaleHead(1 + 5e-5))
    with pytest.raises(ValidationError):
        validated(scratch, toy_graph(toy), ScaleHead(1 + 2e-4))


def test_quantization_may_change_the_function(toy, scratch):
    (record,) = validated(scratch, toy_graph(toy), ScaleHead(1.5, Preserves.QUANTIZATION))
    assert record.comparison.sqnr_db == pytest.approx(20 * np.log10(2), abs=0.01)


def test_each_pass_is_compared_with_the_one_before_it(toy, scratch):
    lossy, exact = ScaleHead(1.5, Preserves.QUANTIZATION), ScaleHead(2.0, undo=True)
    records = validated(scratch, toy_graph(toy), lossy, exact)
    assert records[0].comparison.relative_error > 0.1
    assert records[1].comparison.relative_error == 0.0  # powers of two do not round


def test_a_defect_of_the_cache_is_seen(toy, scratch):
    with pytest.raises(ValidationError, match="forget_past"):
        validated(scratch, toy_graph(toy), ForgetPast())


def test_a_pass_that_changed_nothing_is_not_run(toy, scratch):
    validator = PassValidator(scratch, TOKENS)
    validator.start(toy_graph(toy))
    record = validator.check(ForgetPast(), 0, graph=None)
    assert record.comparison is None


def test_undefined_logits_name_the_graph_and_the_token(toy, scratch):
    with pytest.raises(
        ValidationError, match=r"after pass 'scale_head' gives logits that are not finite.*token 0"
    ):
        validated(scratch, toy_graph(toy), ScaleHead(np.inf, Preserves.QUANTIZATION))


def saved(graph, directory):
    path = directory / "model.onnx"
    path.write_bytes(gs.export_onnx(graph, do_type_check=False).SerializeToString())
    return path


def test_the_reference_holds_every_block_and_leaves_no_hook(toy):
    reference = observe_reference(toy, TOKENS, WINDOWS)
    assert [stream.shape for stream in reference.blocks] == [(24, WIDTH)] * BLOCKS
    last = torch.from_numpy(reference.blocks[-1])
    np.testing.assert_allclose(reference.logits, toy.head(last).detach().numpy(), atol=1e-6)
    assert reference.evaluation.tokens == 2 * 11
    assert not any(block._forward_hooks for block in toy.blocks)


def test_the_same_model_in_two_frameworks_agrees(toy, tmp_path):
    reference = observe_reference(toy, TOKENS, WINDOWS)
    limits = Thresholds(max_abs_error=1e-4, top1_agreement=1.0, perplexity_ratio=1.0001, block_sqnr_db=100)
    proof = prove(reference, saved(toy_graph(toy), tmp_path), limits)
    assert proof.passed
    proof.require()
    assert proof.comparison.sqnr_db > 100
    assert proof.cached.sqnr_db > 100
    assert proof.perplexity_ratio == pytest.approx(1.0, abs=1e-5)
    assert [error.block for error in proof.blocks] == [0, 1, 2]
    assert proof.first_diverged_block is None


def test_a_turned_stream_is_turned_back_before_it_is_compared(toy, tmp_path):
    basis, _ = np.linalg.qr(np.random.default_rng(8).normal(size=(WIDTH, WIDTH)))
    path = saved(toy_graph(toy, basis), tmp_path)
    reference = observe_reference(toy, TOKENS)
    straight = prove(reference, path, Thresholds())
    assert straight.comparison.sqnr_db > 100
    assert straight.first_diverged_block == 0
    turned_back = prove(reference, path, Thresholds(), StreamView(of_graph=lambda stream: stream @ basis.T))
    assert min(error.sqnr_db for error in turned_back.blocks) > 100


def test_the_view_undoes_a_transform_and_centers():
    stream = np.random.default_rng(9).normal(size=(5, WIDTH))
    rotation = Hadamard.of(WIDTH, None, 3)
    centered = stream - stream.mean(axis=-1, keepdims=True)
    view = StreamView.after(rotation, centered=True)
    np.testing.assert_allclose(view.of_graph(stream @ rotation.dense()), stream, atol=1e-12)
    np.testing.assert_allclose(view.of_reference(stream), centered, atol=1e-12)
    plain = StreamView.after(None, centered=False)
    np.testing.assert_array_equal(plain.of_graph(stream), plain.of_reference(stream))


def test_what_the_graph_lost_is_taken_from_the_reference_too(toy, tmp_path):
    def without_mean(stream):
        return stream - stream.mean(axis=-1, keepdims=True)

    reference = observe_reference(toy, TOKENS)
    view = StreamView(of_graph=without_mean, of_reference=without_mean)
    proof = prove(reference, saved(toy_graph(toy), tmp_path), Thresholds(), view)
    assert min(error.sqnr_db for error in proof.blocks) > 100


def test_the_first_diverged_block_is_named(toy, tmp_path):
    graph = toy_graph(toy)
    mix = graph.tensors()["mix_1"]
    mix.values = -mix.values
    proof = prove(
        observe_reference(toy, TOKENS), saved(graph, tmp_path), Thresholds(block_sqnr_db=20, kl=1e-3)
    )
    assert proof.blocks[0].sqnr_db > 100
    assert proof.first_diverged_block == 1
    assert not proof.passed
    with pytest.raises(ValidationError, match=r"missed: kl.*missed: block_sqnr_db.*follows PyTorch is 1$"):
        proof.require()


def test_the_worse_of_both_calls_is_judged(toy, tmp_path):
    graph = toy_graph(toy)
    ForgetPast().run(graph)
    limits = Thresholds(max_abs_error=1e-4)
    proof = prove(observe_reference(toy, TOKENS), saved(graph, tmp_path), limits)
    assert proof.comparison.max_abs_error < 1e-4 < proof.cached.max_abs_error
    assert not proof.passed


def test_a_graph_without_block_names_is_compared_at_the_logits(toy, tmp_path):
    graph = toy_graph(toy)
    for name, tensor in graph.tensors().items():
        tensor.name = name.replace("block.", "inner.")
    proof = prove(observe_reference(toy, TOKENS), saved(graph, tmp_path), Thresholds())
    assert proof.blocks == ()
    assert 100 < proof.comparison.sqnr_db <= EQUAL_DB
    assert proof.perplexity_ratio is None
