"""The GGUF container: against the gguf package, every block format, and damaged files."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.files.gguf import NewTensor, data_length, fp32_reader, read_header
from lorakit.files.gguf import write_gguf as write_container
from lorakit.models.gguf import read_gguf
from tests.conftest import tiny_llama
from tests.models.gguf_files import write_gguf


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tiny_llama(num_hidden_layers=1))


def test_header_equals_the_gguf_reader(good):
    header, reader = read_header(good), gguf.GGUFReader(good)
    assert set(header.tensors) == {t.name for t in reader.tensors}
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.offset == tensor.data_offset
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
    for key, value in header.metadata.items():
        expected = reader.fields[key].contents()
        assert value == expected, key


@pytest.mark.parametrize("kind", sorted(gguf.GGML_QUANT_SIZES, key=lambda k: k.name))
def test_every_type_that_gguf_dequantizes(tmp_path, kind):
    """Random bytes of every block format decode as the gguf package decodes them."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    try:
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        expected = None
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    for key, value in {
        "embedding_length": 2 * block, "feed_forward_length": 3, "block_count": 1,
        "attention.head_count": 1, "vocab_size": 4,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, tensors = read_gguf(tmp_path / "t.gguf")
    shape, read, *_ = tensors["model.layers.0.mlp.up_proj.weight"]
    assert shape == (3, 2 * block)
    if expected is None:
        with pytest.raises(lk.LorakitError, match="cannot be dequantized"):
            read()
    else:
        with np.errstate(all="ignore"):
            got = read().numpy()
        assert np.array_equal(got, expected.astype(np.float32), equal_nan=True)


def test_truncated_anywhere(good, tmp_path):
    data = good.read_bytes()
    bad = tmp_path / "bad.gguf"
    for length in [*range(0, 200, 7), *range(200, len(data) - 40, 977), len(data) - 40]:
        bad.write_bytes(data[:length])
        with pytest.raises(lk.LorakitError, match=r"bad\.gguf: .*(cut off|not a GGUF)"):
            lk.load_model(bad, dtype="float32")


@settings(max_examples=150)
@given(position=st.integers(0, 4000), value=st.integers(0, 255))
def test_one_damaged_byte_never_crashes(good, tmp_path_factory, position, value):
    data = bytearray(good.read_bytes())
    data[position] = value
    bad = tmp_path_factory.getbasetemp() / "damaged.gguf"
    bad.write_bytes(data)
    try:
        lk.load_model(bad, dtype="float32")
        lk.load_tokenizer(bad)
    except lk.LorakitError as error:
        assert "damaged.gguf" in str(error)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


HUGE = 2**60
PAIR = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a")
TENSOR = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("t")
CLAIMS = {
    "pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE),
    "tensors": b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0),
    "a string": PAIR + struct.pack("<IQ", 8, HUGE),
    "an array of numbers": PAIR + struct.pack("<IIQ", 9, 5, HUGE),
    "an array of strings": PAIR + struct.pack("<IIQ", 9, 8, HUGE),
    "an array of arrays": PAIR + struct.pack("<IIQ", 9, 9, 1),
    "an unknown type": PAIR + struct.pack("<I", 99),
    "dimensions": TENSOR + struct.pack("<I", 2**31),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_no_memory_is_taken_for_what_a_file_only_claims(tmp_path, name):
    path = tmp_path / "bad.gguf"
    path.write_bytes(CLAIMS[name] + b"\0" * 64)
    tracemalloc.start()
    try:
        with pytest.raises(lk.LorakitError, match=r"bad\.gguf: the GGUF header is damaged or cut"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_no_memory_is_taken_for_a_tensor_that_the_file_does_not_hold(tmp_path):
    """The header is well made, but the tensor's 4 TB are not in the file."""
    path = tmp_path / "bad.gguf"
    info = struct.pack("<IQIQ", 1, 2**40, gguf.GGMLQuantizationType.F32, 0)
    path.write_bytes(TENSOR + info + b"\0" * 64)
    header = read_header(path)
    with pytest.raises(lk.LorakitError, match=r"bad\.gguf: the file is cut off: tensor t ends at"):
        data_length(path, "t", header.tensors["t"])


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
single = st.floats(width=32, allow_nan=False)
values = st.one_of(
    texts,
    st.booleans(),
    st.integers(0, 2**32 - 1),
    single,
    st.lists(texts, min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
    st.lists(single, min_size=1, max_size=4),
)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60)
@given(st.dictionaries(texts.filter(bool), values, max_size=5), st.dictionaries(texts, shapes))
def test_a_file_that_was_written_reads_back(tmp_path_factory, metadata, tensors):
    """read(write(metadata, tensors)) = (metadata, tensors), for all that a file can hold."""
    path = tmp_path_factory.getbasetemp() / "written.gguf"
    metadata = {"general.architecture": "llama"} | {f"x.{k}": v for k, v in metadata.items()}
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in tensors.items()}
    new = [
        NewTensor(name, array.shape, "F32", lambda array=array: array.view(np.uint8))
        for name, array in arrays.items()
    ]
    write_container(path, metadata, new)
    header = read_header(path)
    assert header.metadata == metadata
    assert list(header.tensors) == list(arrays)
    for name, info in header.tensors.items():
        assert info.shape == arrays[name].shape
        read = fp32_reader(path, info, data_length(path, name, info))
        assert np.array_equal(read().numpy(), arrays[name])


def test_a_file_whose_tensor_fails_is_not_there(tmp_path):
    def fail():
        raise OSError("no room")

    tensors = [NewTensor("a", (4,), "F32", lambda: np.zeros(16, np.uint8))]
    tensors += [NewTensor("b", (4,), "F32", fail)]
    (tmp_path / "m.gguf").write_bytes(b"older")
    with pytest.raises(OSError, match="no room"):
        write_container(tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"older"
