"""Files that are missing, cut off, corrupt, hostile, or contradict the index."""

import json
import struct

import pytest
import torch
from breaking import INDEX, WEIGHTS, codes, edit_json, errors, finding, rewrite_header, shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from llmcompressor_moe.check import check_checkpoint
from llmcompressor_moe.checkpoint.layout import DTYPE_BITS, read_header, read_layout, read_small


def test_layout_equals_what_safetensors_reads(good):
    path = good()
    layout = read_layout(path)
    assert not layout.problems
    with safe_open(path / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(layout.tensors)
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor, info = file.get_tensor(name), layout.tensors[name]
            assert (tuple(tensor.shape), tensor.nbytes) == (info.shape, info.nbytes)
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            assert read_small(layout, name, limit=10**9) == raw
    assert layout.nbytes == sum(t.nbytes for t in layout.tensors.values()) > 0


def test_every_torch_dtype_that_safetensors_writes_is_known(tmp_path):
    made = {}
    for name, dtype in vars(torch).items():
        if isinstance(dtype, torch.dtype):
            try:
                save_file(
                    {"x": torch.empty(4, 16, dtype=torch.uint8).view(dtype)}, tmp_path / "one.safetensors"
                )
            except Exception:  # not every dtype can be viewed or written
                continue
            tensors = read_header(tmp_path / "one.safetensors")
            made[name] = tensors["x"].dtype
    assert {"F32", "BF16", "I64", "F8_E4M3", "BOOL"} <= set(made.values()) <= set(DTYPE_BITS)


def test_sharded_checkpoint_is_legal(good):
    path = good()
    shard(path)
    assert check_checkpoint(path).findings == []


@pytest.mark.parametrize("left", [0, 5, 8, 100])
def test_truncated_at_the_front(good, left):
    path = good()
    raw = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(raw[:left])
    assert "file-truncated" in errors(path)


def test_truncated_data_and_trailing_bytes(good):
    path = good()
    raw = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(raw[:-1])
    assert errors(path) == {"file-truncated"}
    (path / WEIGHTS).write_bytes(raw + b"\0")
    assert errors(path) == {"file-corrupt"}


def test_header_longer_than_any_header(good):
    path = good()
    raw = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + raw[8:])
    assert errors(path) == {"file-corrupt"}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"__metadata__": 3}',
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "x": 1}',
        b"[" * 100_000,
        b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 0]}}',
        b"\xff\xfe",
        b'{"x": ' + b"9" * 5000 + b"}",
    ],
)
def test_hostile_headers_become_findings(good, header):
    path = good()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "file-corrupt" in errors(path)


def test_offsets_that_overlap_leave_holes_or_lie_about_the_shape(good):
    first, second = "lm_head.weight", "model.embed_tokens.weight"

    def swap(header):
        header[first]["data_offsets"] = header[second]["data_offsets"]

    def shape(header):
        header[first]["shape"] = [header[first]["shape"][0] + 1, header[first]["shape"][1]]

    def forget(header):
        del header[first]

    for change in (swap, shape, forget):
        path = good()
        rewrite_header(path / WEIGHTS, change)
        with pytest.raises(SafetensorError), safe_open(path / WEIGHTS, "pt"):
            pass
        assert errors(path) == {"file-corrupt"}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_header_is_accepted_exactly_when_safetensors_accepts_it(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("header") / "one.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, file)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    file.write_bytes(bytes(raw[: len(raw) - cut]))
    try:
        with safe_open(file, "pt") as opened:
            theirs = {k: tuple(opened.get_slice(k).get_shape()) for k in opened.keys()}  # noqa: SIM118
    except Exception:
        theirs = None
    try:
        ours = {name: info.shape for name, info in read_header(file).items()}
    except ValueError:
        ours = None
    # being stricter is allowed, being laxer is not
    assert ours is None or ours == theirs


def test_an_empty_tensor_that_claims_endless_experts_ends(good):
    path = good("granitemoe")
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    tensors = load_file(path / WEIGHTS)
    save_file(tensors | {name: tensors[name][:0]}, path / WEIGHTS, {"format": "pt"})
    rewrite_header(path / WEIGHTS, lambda header: header[name].update(shape=[10**15, 0, 64]))
    assert not check_checkpoint(path).ok


def test_names_cannot_steer_the_terminal_or_flood_it(good):
    path = good()
    save_file(load_file(path / WEIGHTS) | {"\x1b[2J" + "x" * 10**5: torch.zeros(1)}, path / WEIGHTS)
    subject = finding(path, "tensor-extra").subject
    assert "\x1b" not in subject
    assert len(subject) < 1000


def test_missing_shard(good):
    path = good()
    (path / shard(path)[1]).unlink()
    found = finding(path, "file-missing")
    assert found.subject == "model-00002-of-00003.safetensors"
    assert errors(path) == {"file-missing"}


def test_index_names_an_absent_tensor_or_the_wrong_file(good):
    path = good()
    names = shard(path)
    edit_json(path / INDEX, lambda index: index["weight_map"].update(ghost=names[0]))
    assert finding(path, "index-tensor-missing").subject == "ghost"

    def move(index):
        del index["weight_map"]["ghost"]
        index["weight_map"]["lm_head.weight"] = names[1]

    edit_json(path / INDEX, move)
    assert "index-tensor-elsewhere" in errors(path)
    edit_json(path / INDEX, lambda index: index["weight_map"].pop("lm_head.weight"))
    assert "index-tensor-unnamed" in errors(path)


def test_tensor_in_two_shards(good):
    path = good()
    names = shard(path)
    one, two = load_file(path / names[0]), load_file(path / names[1])
    stolen = next(iter(one))
    save_file(two | {stolen: one[stolen]}, path / names[1], {"format": "pt"})
    assert finding(path, "tensor-duplicate").subject == stolen


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors"])
def test_index_that_leaves_the_directory_is_not_followed(good, target):
    path = good()
    shard(path)
    edit_json(path / INDEX, lambda index: index["weight_map"].update(x=target))
    assert "index-unreadable" in errors(path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\ud800"]
)
def test_unreadable_index(good, content):
    path = good()
    shard(path)
    (path / INDEX).write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "index-unreadable" in errors(path)


def test_left_over_files_that_readers_treat_differently(good):
    path = good()
    save_file({"old": torch.zeros(1)}, path / "model-00001-of-00001.safetensors")
    assert "file-ambiguous" in errors(path)
    path = good()
    whole = (path / WEIGHTS).read_bytes()
    shard(path)
    save_file({"old": torch.zeros(1)}, path / "model-00009-of-00009.safetensors")
    assert codes(check_checkpoint(path), "warning") == {"file-unused"}
    (path / WEIGHTS).write_bytes(whole)
    assert errors(path) == {"file-ambiguous"}


def test_shards_without_index(good):
    path = good()
    shard(path)
    (path / INDEX).unlink()
    assert "index-missing" in errors(path)


def test_pickles(good):
    path = good()
    (path / "pytorch_model.bin").write_bytes(b"x")
    (path / "training_args.bin").write_bytes(b"x")
    report = check_checkpoint(path)
    assert report.ok
    assert [f.subject for f in report.findings] == ["pytorch_model.bin"]
    (path / WEIGHTS).unlink()
    assert errors(path) == {"pickle-weights"}
    (path / "pytorch_model.bin").unlink()
    assert errors(path) == {"weights-missing"}


def test_tokenizer_missing_is_a_warning(good):
    path = good()
    (path / "tokenizer.json").unlink()
    report = check_checkpoint(path)
    assert report.ok
    assert codes(report, "warning") == {"tokenizer-missing"}


def test_unreadable_file(good):
    path = good()
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(path / WEIGHTS)  # a loop cannot be read, not even by root
    assert "file-unreadable" in errors(path)


def test_no_directory(tmp_path):
    with pytest.raises(NotADirectoryError, match="is not a directory"):
        check_checkpoint(tmp_path / "absent")


def test_empty_directory_has_nothing_to_serve(tmp_path):
    assert errors(tmp_path) == {"weights-missing", "config-missing"}


def test_report_survives_json(good):
    path = good()
    (path / WEIGHTS).unlink()
    report = check_checkpoint(path)
    again = type(report).model_validate(json.loads(report.model_dump_json()))
    assert again == report
    assert not again.ok
