"""Two directories that say the same, or do not: adapters of any form, models, real rows and drawn ones."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import BASE, HELDOUT, bert, edit, llama, lora, refused, run

from lorapack.errors import GateError, InputError
from lorapack.merge.merge import merge_adapter
from lorapack.read import read_adapter
from lorapack.verify import demand_same, verify
from lorapack.write import write_adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, an adapter, its merge; base and adapter have a tokenizer's vocabulary."""
    path = tmp_path_factory.mktemp("verify")
    model = llama()
    model.save_pretrained(path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, path / "base")
    lora(model, path / "adapter", target_modules=["q_proj", "v_proj", "up_proj"])
    edit(path / "adapter" / "adapter_config.json", base_model_name_or_path=str(path / "base"))
    merge_adapter(path / "adapter", path / "merged")
    write_adapter(read_adapter(path / "adapter"), path / "expanded", expand=True)
    write_adapter(read_adapter(path / "adapter"), path / "compact")
    return path


def changed(source: Path, out: Path, change) -> Path:
    shutil.copytree(source, out)
    file = next(out.glob("*.safetensors"))
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("other", ["merged", "expanded", "compact"])
def test_every_form_of_an_adapter_says_the_same_both_ways_round(place, other):
    for one, two in ((place / "adapter", place / other), (place / other, place / "adapter")):
        found = verify(one, two)
        assert found.same and found.greatest < 1e-5 and found.agreement == 1.0 and found.effect > 0.01


def test_what_the_adapter_does_is_measured_against_the_base_alone(place):
    found = verify(place / "adapter", place / "base", tolerance=1e9)
    assert found.mean == pytest.approx(found.effect, rel=1e-6)
    assert not found.same and "the adapter itself makes" in found.reasons[0]


def test_a_difference_ends_with_exit_code_3_and_one_line(place, tmp_path):
    off = changed(place / "adapter", tmp_path / "off", lambda n, t: t * 1.01 if "layers.3" in n and "_B" in n else t)
    done = run("verify", place / "adapter", off, "--json")
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "do not say the same" in done.stderr
    said = json.loads(done.stdout)
    assert said["same"] is False and said["greatest"] > said["tolerance"] * said["spread"]
    assert verify(place / "adapter", off, tolerance=1).same


def test_outputs_that_are_no_numbers_are_not_the_same(place, tmp_path):
    off = changed(place / "merged", tmp_path / "off", lambda n, t: t * float("nan") if n == "lm_head.weight" else t)
    assert not verify(place / "merged", off).same
    assert not verify(off, place / "merged").same
    with pytest.raises(GateError, match="do not say the same"):
        demand_same(verify(off, off))


def test_real_rows_are_read_by_the_bases_tokenizer(place):
    found = verify(place / "adapter", place / "merged", data=str(HELDOUT))
    assert found.same and found.outputs != verify(place / "adapter", place / "merged").outputs


def test_16_bits_are_allowed_what_rounding_does_and_no_more(place, tmp_path):
    merge_adapter(place / "adapter", tmp_path / "rounded", dtype="bfloat16")
    found = verify(place / "adapter", tmp_path / "rounded")
    assert found.same and found.dtype == "bfloat16" and found.greatest > 1e-4
    off = changed(place / "adapter", tmp_path / "off", lambda n, t: t * 2 if "_B" in n else t)
    assert not verify(off, tmp_path / "rounded").same


def test_a_head_of_another_size_comes_from_the_adapter(tmp_path):
    bert().bert.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    lora(bert(labels=5), tmp_path / "adapter", **options)
    found = verify(tmp_path / "adapter", tmp_path / "adapter", tmp_path / "base")
    assert found.same and found.outputs == 4 * 5


def without_a_tensor(place, path):
    file = path / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "layers.3" not in n}, file)
    return "has no tensor"


def with_a_tensor_too_many(place, path):
    file = path / "adapter_model.safetensors"
    more = {n.replace("layers.3", "layers.7"): t for n, t in load_file(file).items()}
    save_file(load_file(file) | more, file)
    return "no place for it"


def without_a_base(place, path):
    edit(path / "adapter_config.json", base_model_name_or_path=None)
    return "--base"


def of_another_shape(place, path):
    file = path / "adapter_model.safetensors"
    save_file({n: t[:, :8].contiguous() if "lora_A" in n else t for n, t in load_file(file).items()}, file)
    return "cannot be loaded"


def nothing(place, path):
    (path / "adapter_config.json").unlink()
    return "no adapter and no model"


@pytest.mark.parametrize(
    "change", [without_a_tensor, with_a_tensor_too_many, without_a_base, of_another_shape, nothing]
)
def test_what_cannot_be_compared_is_refused(place, tmp_path, change):
    shutil.copytree(place / "adapter", tmp_path / "off")
    message = change(place, tmp_path / "off")
    with pytest.raises(InputError) as said:
        verify(place / "adapter", tmp_path / "off")
    assert message in str(said.value) and "\n" not in str(said.value)


def test_bad_options_are_one_line(place):
    with pytest.raises(InputError, match="--tolerance"):
        verify(place / "adapter", place / "merged", tolerance=float("nan"))
    assert "does not exist" in refused(run("verify", place / "adapter", place / "merged", "--data", "no.jsonl"))


def test_a_merge_that_does_not_say_the_same_leaves_nothing(place, tmp_path):
    merge_adapter(place / "adapter", tmp_path / "good", verify=True)
    small = changed(place / "adapter", tmp_path / "small", lambda n, t: t * 1e-5 if "_B" in n else t)
    done = run("merge", small, "-o", tmp_path / "rounded away", "--dtype", "bfloat16", "--verify")
    assert done.returncode == 3 and "the adapter itself makes" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "small"]
