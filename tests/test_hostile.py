"""Files made to do harm, and files that are merely broken: one clear error, little memory, nothing run."""

import json
import math
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from bombs import HEADERS, TEXTS, headed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from readers import KEPT, LORA, MOMENTS, PAIRS, READERS
from safetensors.torch import save

from lorapack.errors import InputError
from lorapack.read import read_adapter
from lorapack.read.config import check_config
from lorapack.read.patterns import SECONDS, first_match
from lorapack.recover import state

JSON = ["adapter_config", "compact_config", "plan", "report", "base_config", "base_index"]
JSON += ["kohya_names", "diffusers_metadata", "mlx_config", "gguf_config"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def read(name, data, directory):
    try:
        READERS[name].read(data, directory)
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_is_read(name, tmp_path):
    assert read(name, READERS[name].good, tmp_path) is None


@pytest.mark.parametrize("name", JSON)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_value_in_any_place_is_read_or_refused(name, tmp_path, data):
    good = json.loads(READERS[name].good)
    path = data.draw(st.sampled_from(list(places(good))))
    read(name, json.dumps(changed(good, path, data.draw(values))).encode(), tmp_path)


def test_a_name_of_two_lines_is_refused_in_one(tmp_path):
    config = json.loads(READERS["compact_config"].good)
    config["lorapack"]["forms"] = {"\n": {"\n": None}}
    assert "unknown" in read("compact_config", json.dumps(config).encode(), tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_are_read_or_refused(name, tmp_path):
    rng, good = random.Random(0), READERS[name].good
    for _ in range(150):
        spoiled = bytearray(good)
        at, length = rng.randrange(len(good)), rng.randrange(1, 20)
        kind = rng.randrange(4)
        if kind == 0:
            spoiled[at] = rng.randrange(256)
        elif kind == 1:
            del spoiled[at : at + length]
        elif kind == 2:
            spoiled[at:at] = spoiled[at : at + length]
        else:
            spoiled[at:at] = rng.choice([b"null", b"-1", b"1e999", b"9" * 40, b"[]", b"{}", b'"\\ud800"', b"\x00"])
        read(name, bytes(spoiled), tmp_path)


@pytest.mark.parametrize(
    "parts",
    [[], {"calibration": 3}, {"calibration": {"rows": 1}}, {"calibration": {"fingerprints": 7}}],
)
def test_a_report_whose_rows_are_not_named_is_refused(parts, tmp_path):
    report = json.loads(READERS["report"].good)
    report["data"] = {"parts": parts}
    assert "data.parts" in read("report", json.dumps(report).encode(), tmp_path)


# What fuzzing found: the reader, and the bytes that it stumbled over.

FOUND = [
    ("recovery_state", lambda: save({"now.0": torch.ones(2), "kept.0": torch.ones(2)}, {state.KIND: "-1"})),
    ("recovery_state", lambda: changed_header(KEPT, step=float("inf"))),
    ("statistics", lambda: changed_header(MOMENTS, tokens=float("inf"))),
    ("points", lambda: b"9223372036854775808"),
    ("statistics", lambda: save({"q.forward": torch.eye(2)}, {"lorapack_statistics": "[" * 100_000})),
]


def changed_header(data, **changes):
    """A safetensors file with other values in the JSON that is its one metadatum."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    ((key, text),) = header["__metadata__"].items()
    header["__metadata__"] = {key: json.dumps(json.loads(text) | changes)}
    return headed(json.dumps(header).encode()) + data[8 + length :]


def retold(data, dtype, size):
    """A safetensors file of which one tensor claims that its bytes are of another type, `size` bytes a number."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for entry in header.values():
        begin, end = entry.get("data_offsets", (0, 0))
        row = size * math.prod(entry.get("shape", ())[:-1])
        if end > begin and (end - begin) % row == 0:
            entry |= {"dtype": dtype, "shape": [*entry["shape"][:-1], (end - begin) // row]}
            break
    return headed(json.dumps(header).encode()) + data[8 + length :]


@pytest.mark.parametrize(
    "name", ["diffusers", "kohya", "loralib", "mlx_tensors", "adapter_safetensors", "statistics", "recovery_state"]
)
@pytest.mark.parametrize(
    ("dtype", "size", "said"), [("F8_E4M3", 1, "torch.float8_e4m3fn"), ("C64", 8, "torch.complex64")]
)
def test_numbers_that_are_not_computed_with_are_refused_by_name(name, dtype, size, said, tmp_path):
    """torch reads the narrow ones and then cannot tell whether they are finite; of the complex ones it drops half."""
    refused = read(name, retold(READERS[name].good, dtype, size), tmp_path)
    assert f"is stored as {said}, which is not computed with" in refused


@pytest.mark.parametrize(("name", "found"), FOUND)
def test_what_fuzzing_found_is_refused(name, found, tmp_path):
    assert read(name, found(), tmp_path)


# Bombs: small files that would become large in memory.

MEASURE = """
import json, os, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from readers import READERS
from lorapack.errors import InputError
def now(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
def measure(file, reader):
    data = file.read_bytes()
    reader.read(reader.good, Path(tempfile.mkdtemp(dir=file.parent)))
    with open("/proc/self/clear_refs", "w") as flags:
        flags.write("5")
    before, said = now("VmRSS"), None
    try:
        reader.read(data, Path(tempfile.mkdtemp(dir=file.parent)))
    except InputError as error:
        said = str(error)
    return [said, now("VmHWM") - before - len(data)]
for path in sys.argv[2:]:
    if os.fork() == 0:  # each in a process of its own: a peak stays
        file = Path(path)
        file.with_suffix(".json").write_text(json.dumps(measure(file, READERS[file.parent.name])))
        os._exit(0)
    assert os.wait()[1] == 0, path
"""


BOMBS = {
    "2^60 numbers in one tensor": ["adapter_safetensors", "base_safetensors"],
    "a header longer than any model's": ["adapter_safetensors", "base_safetensors"],
    "as many tensors as a header may have": ["adapter_safetensors"],
    "a header of empty lists": ["base_safetensors"],
    "a file of empty lists": ["adapter_config", "report"],
    "a file of zeros in a list of choices": ["plan"],
    "as many wrong choices as are looked at": ["plan"],
    "lists in lists in lists": ["adapter_config", "plan"],
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_a_small_file_stays_small_in_memory(tmp_path):
    files = [tmp_path / reader / bomb for bomb, readers in BOMBS.items() for reader in readers]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((HEADERS | TEXTS)[file.name]())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(Path(__file__).parent), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for file in files:
        refused, more_than_the_file = json.loads(file.with_suffix(".json").read_text())
        assert refused, (file, done.stderr)
        assert more_than_the_file <= 200e6, file


def test_a_tensor_of_one_number_that_claims_to_be_many_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    torch.save(PAIRS | {"bias": torch.zeros(1).expand(2**40)}, tmp_path / "adapter_model.bin")
    assert (tmp_path / "adapter_model.bin").stat().st_size < 10_000
    with pytest.raises(InputError, match="bias claims more numbers than the file holds"):
        read_adapter(tmp_path)


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    torch.save(PAIRS | {"bias": torch.zeros(2**20)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert torch.load(tmp_path / "adapter_model.bin", weights_only=True)["bias"].numel() == 2**20, "torch unpacks it"
    with pytest.raises(InputError, match="is compressed"):
        read_adapter(tmp_path)


# Patterns of module names: regular expressions from the file.

names = st.lists(st.sampled_from(["a", "b", "0", "10", "q_proj", "model"]), min_size=1, max_size=4).map(".".join)
keys = (
    names | names.map(re.escape) | names.map(lambda n: "^" + re.escape(n)) | st.sampled_from([".*", "a|b", r"\d+", ""])
)


@settings(max_examples=300, deadline=None)
@given(st.lists(keys, unique=True, max_size=6), names)
def test_a_pattern_is_found_as_peft_finds_it(patterns, module):
    found = first_match({pattern: n for n, pattern in enumerate(patterns)}, "rank_pattern")(module)
    key = get_pattern_key(patterns, module)  # the name itself where nothing matches
    assert found == (patterns.index(key) if key in patterns else None)


def test_a_pattern_that_would_take_for_ever_is_refused(monkeypatch):
    monkeypatch.setattr("lorapack.read.patterns.SECONDS", 0.2)
    settings = check_config(LORA | {"rank_pattern": {"(a|a)+b": 4}}, "adapter_config.json")
    with pytest.raises(InputError, match="takes too long on the name"):
        settings.rank("a" * 40)
    assert SECONDS > 0.2


@pytest.mark.parametrize("pattern", ["(", "(" * 5000, "a" * 20_000 + ".", "a{99999999999999999999}"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(InputError, match="no regular expression"):
        check_config(LORA | {"rank_pattern": {pattern: 4}}, "adapter_config.json")
