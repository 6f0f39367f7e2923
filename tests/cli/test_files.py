"""files.py and config_file.py: what is taken from a folder that may come from anyone."""

import json
import os
import re
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import save, save_file

from qlora_ext.checks import check_finite
from qlora_ext.files import (
    SafetensorsFiles,
    find_folder,
    read_json,
    reading,
    safetensors_files,
)
from qlora_ext.models.config_file import check_config, read_raw_config
from qlora_ext.text import CheckpointError, first_line, printable


def with_header(path, change):
    """A safetensors file of two tensors, its header's text changed."""
    whole = save({"a": torch.arange(4.0), "b": torch.zeros(2, 3, dtype=torch.float16)})
    length = int.from_bytes(whole[:8], "little")
    text = change(whole[8 : 8 + length].decode().rstrip()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    return path


def test_tensors_are_read_by_name_from_several_files(tmp_path):
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2, dtype=torch.uint8)}, tmp_path / "2.safetensors")
    files = SafetensorsFiles(sorted(tmp_path.iterdir()))
    assert list(files) == ["a", "b"] and len(files) == 2 and "b" in files and "c" not in files
    assert torch.equal(files["a"], torch.arange(6.0).reshape(2, 3))
    assert files.shapes["a"] == (2, 3) and files.nbytes("a") == 24 and files.numel("b") == 2
    assert files.dtypes["b"] == torch.uint8 and files.where["b"].name == "2.safetensors"
    with pytest.raises(KeyError):
        files["c"]
    with pytest.raises(CheckpointError, match=r"a is in .*1\.safetensors and in .*1\.safetensors"):
        SafetensorsFiles([tmp_path / "1.safetensors"] * 2)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2\.safetensors: b cannot be read|2\.safetensors"):
        files["b"]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_tensors_without_elements_are_read(tmp_path, shape):
    tensor = torch.zeros(shape, dtype=torch.float16)
    save_file({"a": tensor, "b": tensor.clone()}, tmp_path / "1.safetensors")
    files = SafetensorsFiles([tmp_path / "1.safetensors"])
    assert files["a"].shape == shape and files["a"].dtype == torch.float16
    assert files.equal("a", "b")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t[:-1] + ',"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}',
            "has 'a' twice in its header",
        ),
        (lambda t: t.replace('"b"', '"b\\u0000"'), "is not printable"),
        (lambda t: t.replace('"b"', '"\\u001b[2J"'), "is not printable"),
        (lambda t: t.replace('"b"', '"layers.\\u00b2.b"'), "is spelled with a digit that"),
        (lambda t: t.replace('"b"', '""'), "the name of a tensor, '', is empty"),
        (lambda t: t.replace('"b"', f'"{"b" * 5000}"'), "5,000 characters long, want at"),
        (lambda t: t.replace("[2,3]", "[0,4611686018427387904]"), "damaged or not a safetensors"),
        (lambda t: t.replace("[2,3]", "[3,3]"), "damaged or not a safetensors file"),
        (lambda t: t.replace("F16", "F99"), "damaged or not a safetensors file"),
        (lambda t: t[:-1], "damaged or not a safetensors file"),
        (lambda t: "[" * 10_000, "damaged or not a safetensors file"),
        (
            lambda t: t[:-1] + ',"c":{"dtype":"U8","shape":[0,1099511627776,1048576],'
            '"data_offsets":[28,28]}}',
            "c' has shape [0, 1099511627776, 1048576]",
        ),
        (
            lambda t: t[:-1] + ',"c":{"dtype":"F4","shape":[0],"data_offsets":[28,28]}}',
            "c has dtype F4, want one of F64",
        ),
    ],
)  # fmt: skip
def test_headers_that_are_refused(tmp_path, change, message):
    path = with_header(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        SafetensorsFiles([path])
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_header_that_is_good(tmp_path):
    path = with_header(tmp_path / "model.safetensors", lambda t: t)
    assert torch.equal(SafetensorsFiles([path])["a"], torch.arange(4.0))
    unknown = ',"c":{"dtype":"F4","shape":[0],"data_offsets":[28,28]}}'
    with_header(path, lambda t: t[:-1] + unknown)
    assert SafetensorsFiles([path], any_dtype=True).stored["c"] == "F4"


def test_pickles_are_refused_and_not_read(tmp_path):
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="may be a pickle, which can run any code"):
        SafetensorsFiles([path])
    path.rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        SafetensorsFiles([tmp_path / "model.safetensors"])


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "circle", "nothing"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "circle":
        path.symlink_to(path.name)
    want = {"folder": "is a folder", "pipe": "is a named pipe", "device": "is a device",
            "circle": "cannot be read", "nothing": "is missing"}[kind]  # fmt: skip
    said = []

    def read():
        for what in (read_json, lambda p: SafetensorsFiles([p])):
            with pytest.raises(CheckpointError, match=rf"config\.json {want}") as caught:
                what(path)
            said.append(str(caught.value))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert len(said) == 2


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "holds a list, want a JSON object"),
        (b'{"a": "\xff"}', "cannot be read"),
        ('{"a": 1}'.encode("utf-16"), "cannot be read"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nests lists and objects too deeply, want at most 64"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b" " * (2**26 + 1), "bytes, want at most"),
    ],
)
def test_json_that_is_refused(tmp_path, raw, message):
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} .*{message}"):
        read_json(path)


@pytest.mark.parametrize(
    "name", [1, None, ["x"], "", ".", "..", "../x.safetensors", "/etc/passwd", "a\0.safetensors",
             "x" * 5000 + ".safetensors", "model.bin", "\ud800.safetensors"],
)  # fmt: skip
def test_an_index_names_files_of_its_folder(tmp_path, name):
    (tmp_path / "m.safetensors").write_bytes(save({"a": torch.ones(1)}))
    index = {"weight_map": {"a": "m.safetensors", "b": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map\['b'\] is .* want names"):
        safetensors_files(tmp_path)


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path):
    """Commands and from_pretrained are to read the same weights where both are there."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size=500)
    with torch.no_grad():
        model.model.norm.weight.fill_(5)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).model.norm.weight
    ours = SafetensorsFiles(safetensors_files(tmp_path))["model.norm.weight"]
    assert torch.equal(ours, theirs) and ours[0] == 5
    # What is no file is passed over there, too.
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert safetensors_files(tmp_path)[0].name.startswith("model-00001-of-")


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"auto_map": {"AutoModel": "m.M"}}, "brings model code of its own"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, want no more than the 21"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, want 1 or more"),
        ({"vocab_size": 2**62}, "vocab_size is 4611686018427387904, want at most"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, want 1 or more"),
        ({"num_labels": 10**9}, "num_labels is 1000000000, want at most"),
        (
            {"num_labels": 2**18 + 1},
            "num_labels is 262145, want at most 262,144 with the 84 weights",
        ),
        ({"num_local_experts": 10**6}, "num_local_experts is 1000000, want at most"),
        ({"num_experts": 9000}, "num_experts is 9000, want at most 8,192 in 32 layers"),
        (
            {"num_experts": 3000, "num_layers": 100},
            "num_experts is 3000, want at most 2,621 in 100 layers with the 84 weights",
        ),
        ({"quantization_config": {}}, "quant_method is None, want qlora_ext, bitsandbytes or"),
        ({"quantization_config": {"quant_method": "QLORA_EXT"}}, "quant_method is 'QLORA_EXT', wa"),
        ({"quantization_config": {"quant_method": ["x"]}}, "quant_method is ['x'], want qlora_ext"),
        (
            {"quantization_config": {"quant_method": "qlora_ext", "blocksize": 63}},
            "quantization_config cannot be read (QuantConfig: blocksize",
        ),
        (
            {"quantization_config": {"quant_method": "qlora_ext", "x": 1}},
            "quantization_config cannot be read (got unknown settings ['x'], want only",
        ),
        ({"architectures": 5}, "architectures is 5, want a list of names"),
        ({"architectures": [5]}, r"architectures is [5], want a list of names"),
        ({"dtype": "zzz"}, "dtype is 'zzz', want the name of a float dtype"),
        ({"dtype": "int8"}, "dtype is 'int8', want the name of a float dtype"),
        ({"dtype": "auto"}, "dtype is 'auto', want the name of a float dtype"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, want a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, want a finite number"),
        ({"rope_theta": {"__float__": "-Infinity"}}, "rope_theta is -inf, want a finite"),
        ({"rope_scaling": {"factor": float("inf")}}, "rope_scaling.factor is inf, want a finite"),
        ({"text_config": {"eps": float("nan")}}, "text_config.eps is nan, want a finite"),
        ({"x" * 5000: float("inf")}, "x... (1000 characters or more) is inf, want a finite"),
        ({"x" * 5000 + "layers": 10**9}, "... (1000 characters or more) is 1000000000, want no"),
        ({"time_step_limit": float("nan")}, "time_step_limit is nan, want a finite"),
        ({"text_config": 10**9}, "text_config is 1000000000, want an object"),
        ({"quantization_config": 5}, "quantization_config is 5, want an object"),
        ({"attn_implementation": "someone/kernel"}, "want the name of an implementation"),
        ({"text_config": {"num_layers": 10**9}}, "text_config.num_layers is 1000000000"),
        (
            {"quantization_config": {"modules_to_not_convert": ["x"] * 20_000}},
            "modules_to_not_convert has 20,000 names, want at most",
        ),
    ],
)
def test_values_of_config_json_are_refused_by_key(tmp_path, raw, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **raw}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_raw_config(tmp_path, files_of(tmp_path, 21, 4))


def files_of(folder, tensors, numel):
    """A file of so many tensors with as many elements each; few bytes, whatever the numbers."""
    state = {f"t{i}": torch.zeros(numel, dtype=torch.uint8) for i in range(tensors)}
    save_file(state, folder / "model.safetensors")
    return SafetensorsFiles([folder / "model.safetensors"])


def test_limits_may_be_infinite(tmp_path):
    inf = float("inf")
    check_config(tmp_path, {"time_step_limit": [0.0, inf], "swiglu_limit": inf, "clip_qkv": inf})
    check_config(tmp_path, {"time_step_limit": [0.0, {"__float__": "Infinity"}]})


def test_deep_models_whose_weights_are_there_are_taken(tmp_path):
    check_config(tmp_path, {"num_hidden_layers": 2000}, files_of(tmp_path, 18_000, 1))
    check_config(tmp_path, {"vision_feature_layer": -2, "num_hidden_layers": 126})
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2000, want at most 1,024"):
        check_config(tmp_path, {"num_hidden_layers": 2000})


def test_more_experts_and_labels_than_usual_are_taken_where_their_weights_are(tmp_path):
    check_config(tmp_path, {"num_experts": 8192})  # as with no file at hand
    check_config(tmp_path, {"num_labels": 2**18})
    check_config(tmp_path, {"num_experts": 2**18, "num_layers": 1})
    many = {"num_experts": 9000, "num_layers": 40}
    with pytest.raises(CheckpointError, match="num_experts is 9000, want at most 6,553 in 40 lay"):
        check_config(tmp_path, many)
    held = files_of(tmp_path, 1, 40 * 9000 * 1024)
    check_config(tmp_path, many, held)
    check_config(tmp_path, {"num_labels": 2**20}, held)
    with pytest.raises(CheckpointError, match="num_experts is 9001, want at most 9,000 in 40 lay"):
        check_config(tmp_path, {**many, "num_experts": 9001}, held)
    # A shape without elements is no weight, whatever its other sides say.
    save_file({"t": torch.zeros(2**40, 0)}, tmp_path / "model.safetensors")
    empty = SafetensorsFiles([tmp_path / "model.safetensors"])
    with pytest.raises(CheckpointError, match="num_experts is 9000"):
        check_config(tmp_path, many, empty)


def test_names_that_are_no_folder(tmp_path):
    for name in ("./" + "x" * 5000, "/a\0b", str(tmp_path / "nothing")):
        with pytest.raises(CheckpointError, match="is not a folder") as caught:
            find_folder(name)
        assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_what_a_library_raises_names_the_file():
    class Panic(BaseException):  # as pyo3's
        pass

    def raise_within(error):
        with reading("f.json"):
            raise error

    for error in (KeyError("k"), RuntimeError(""), Panic("x\ny"), RecursionError("deep")):
        with pytest.raises(CheckpointError, match=r"^f\.json cannot be read \(.") as caught:
            raise_within(error)
        assert caught.value.__cause__ is error
    with pytest.raises(CheckpointError, match="memory is used up"), reading("f.json"):
        raise MemoryError
    with pytest.raises(KeyboardInterrupt), reading("f.json"):
        raise KeyboardInterrupt
    assert first_line(KeyError("k")) == "KeyError: 'k'" and first_line(ValueError()) == "ValueError"
    assert printable("a\x1b\ud800\nb") == r"a\x1b\ud800\nb"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_a_dtype_cannot_hold(dtype):
    most = torch.finfo(dtype).max
    values = torch.zeros(3, 4, dtype=torch.float64)
    values[0, 0] = -most
    check_finite("w", values, dtype)
    check_finite("w", torch.empty(0), dtype)
    values[1, 1], values[2, 2] = most * 1.5, -most * 2
    said = rf"w holds 2 values of 12 that {dtype} cannot hold; the largest magnitude is"
    with pytest.raises(OverflowError, match=re.escape(said)):
        check_finite("w", values, dtype)
    with pytest.raises(OverflowError, match=re.escape(said)):
        check_finite("w", values.to(dtype), dtype, exact=lambda: values)
    values[0, 1] = torch.nan
    with pytest.raises(OverflowError, match=r"3 values of 12 .*, 1 NaN among them"):
        check_finite("w", values, dtype)
