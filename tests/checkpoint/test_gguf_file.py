"""Headers of GGUF files: every way of being damaged ends in one clear error."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotexport.checkpoint import open_checkpoint
from rotexport.checkpoint.gguf_file import read_gguf
from rotexport.errors import CheckpointError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_key_value("ints", [1, 2, 3], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32)
    writer.add_token_list(["a", "bc", "déf"])
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    blocks = gguf.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("second", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors(path):
    file = read_gguf(path)
    assert file.metadata["llama.block_count"] == 2
    assert file.metadata["ints"] == [1, 2, 3]
    assert file.metadata["tokenizer.ggml.tokens"] == 3, "of strings, only the count is kept"
    assert file.tensors["second"].shape == (2, 64)
    np.testing.assert_array_equal(file.tensors["first"].read(), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_allclose(file.tensors["second"].read(), 1, rtol=1e-2)  # int8 codes, fp16 scale


def test_the_package_that_wrote_it_finds_the_same(path):
    file = read_gguf(path)
    for tensor in gguf.GGUFReader(path).tensors:
        assert file.tensors[tensor.name].offset == tensor.data_offset
        assert file.tensors[tensor.name].stored_bytes == tensor.n_bytes


def test_a_file_cut_anywhere_is_refused(path, tmp_path):
    raw = path.read_bytes()
    last = read_gguf(path).tensors["second"]
    cut = tmp_path / "cut.gguf"
    for length in range(0, last.offset + last.stored_bytes, 3):
        cut.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            read_gguf(cut)


@given(position=st.integers(4, 300), value=st.integers(0, 255))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_never_escapes_as_another_error(path, tmp_path, position, value):
    raw = bytearray(path.read_bytes())
    raw[position] = value
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(raw)
    try:
        file = read_gguf(damaged)
    except CheckpointError:
        return
    for tensor in file.tensors.values():
        tensor.read()


def test_no_gguf_file(tmp_path):
    path = tmp_path / "not.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match="does not start with 'GGUF'"):
        open_checkpoint(path)


def test_a_big_endian_file_is_refused(path, tmp_path):
    swapped = tmp_path / "big.gguf"
    swapped.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(CheckpointError, match=r"version 50331648; versions 2 and 3 \(little-endian\)"):
        open_checkpoint(swapped)


def test_a_type_without_dequantization_is_refused(tmp_path):
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.Q8_K
    blocks = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    writer.add_tensor("odd", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="Q8_K, which cannot be dequantized"):
        read_gguf(path)
