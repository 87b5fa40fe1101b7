"""The analysis says which axes share a basis, and what fixes it."""

from support.graphs import graph_of
from support.models import DIM, HEAD, decoder

from rotexport.graph.basis import analyse, attention_nodes, residual
from rotexport.passes.fold_norms import FoldNorms


def folded(**options: bool):
    graph = graph_of(decoder(2, **options))
    FoldNorms().run(graph)
    return graph


def test_the_residual_stream_is_one_free_component_once_norms_are_folded() -> None:
    stream = residual(analyse(folded()))
    assert stream.free
    assert stream.size == DIM
    assert stream.residual_sums == 4
    # embedding, and per block: q k v o gate up down; and the head
    assert len(stream.absorbers) == 1 + 2 * 7 + 1
    assert stream.orthogonal_only


def test_a_norm_with_a_scale_pins_the_stream() -> None:
    stream = residual(analyse(graph_of(decoder(2))))
    assert {pin.node.op for pin in stream.pins} == {"RMSNormalization"}


def test_values_and_outputs_share_a_free_basis_per_head_and_the_cache_does_not_pin_it() -> None:
    graph = folded()
    bases = analyse(graph)
    for _, attention in attention_nodes(graph):
        component = bases.at(attention.inputs[2])
        assert component is bases.at(attention.outputs[0])
        assert component.free
        assert component.size == HEAD
        assert len(component.absorbers) == 3  # the value matrix, its bias, the output matrix


def test_blocks_do_not_share_their_value_bases() -> None:
    graph = folded()
    bases = analyse(graph)
    first, second = (bases.at(node.inputs[2]) for _, node in attention_nodes(graph))
    assert first is not second


def test_rotary_embedding_pins_queries_and_keys() -> None:
    graph = folded()
    bases = analyse(graph)
    for _, attention in attention_nodes(graph):
        component = bases.at(attention.inputs[0])
        assert component is bases.at(attention.inputs[1])
        assert [pin.node.op for pin in component.pins] == ["RotaryEmbedding", "RotaryEmbedding"]
        assert all(pin.writes for pin in component.pins)


def test_without_rotary_embedding_queries_and_keys_are_free() -> None:
    graph = folded(rope=False)
    bases = analyse(graph)
    assert all(bases.at(attention.inputs[0]).free for _, attention in attention_nodes(graph))


def test_an_unknown_operator_pins_what_it_touches() -> None:
    graph = graph_of(
        """
    odd (float[2, 4] x, float[4, 4] W1, float[4, 4] W2) => (float[2, 4] y) {
        a = MatMul(x, W1)
        b = Det2<domain = "rotexport">(a)
        y = MatMul(a, W2)
    }""".replace('Det2<domain = "rotexport">', "Sin")
    )
    component = analyse(graph).at(graph.tensors()["a"])
    assert [str(pin) for pin in component.pins] == ["a (Sin 'b')"]


def test_one_number_for_all_features_pins_an_addition() -> None:
    graph = graph_of("""
    shift (float[2, 4] x, float[4, 4] W1, float[4, 4] W2) => (float[2, 4] y) <float one = {1.0}> {
        a = MatMul(x, W1)
        b = Add(a, one)
        y = MatMul(b, W2)
    }""")
    assert not analyse(graph).at(graph.tensors()["a"]).free


def test_a_scalar_product_carries_the_basis_and_a_vector_product_does_not() -> None:
    text = """
    scale (float[2, 4] x, float[4, 4] W1, float[4, 4] W2) => (float[2, 4] y) <%s> {
        a = MatMul(x, W1)
        b = Mul(a, s)
        y = MatMul(b, W2)
    }"""
    scalar, vector = (graph_of(text % s) for s in ("float s = {2.0}", "float[4] s = {1.0, 2.0, 3.0, 4.0}"))
    assert analyse(scalar).at(scalar.tensors()["a"]) is not None
    assert analyse(scalar).at(scalar.tensors()["a"]).free
    assert not analyse(vector).at(vector.tensors()["a"]).free
