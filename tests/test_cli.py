"""The command line: what each command does, and how it refuses what it cannot use."""

import hashlib
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import click
import pytest
import torch
from peft import PeftModel
from support import ADAPTER, BASE, CALIBRATION, HELDOUT, call, edit, gpt2, llama, lora, refused, run
from transformers import AutoModelForCausalLM

from lorapack import read_adapter
from lorapack.cli.files import read_statistics, write_statistics
from lorapack.cli.main import cli
from lorapack.core import plan as plans
from lorapack.core import report as reports
from lorapack.core import statistics as moments
from lorapack.core.adapter import digest, size
from lorapack.errors import OutputError
from lorapack.read.files import read_safetensors

COMMANDS = sorted(cli.commands)
IDS = torch.arange(3, 43).reshape(2, 20)


def hashes(*directories):
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for directory in directories
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def tree(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def head(source, rows, target):
    target.write_text("".join(source.read_text().splitlines(keepends=True)[:rows]))
    return target


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def data(root):
    return head(CALIBRATION, 40, root / "data.jsonl")


@pytest.fixture(scope="module")
def held(root):
    return head(HELDOUT, 12, root / "held.jsonl")


@pytest.fixture(scope="module")
def compressed(root, data, held):
    """Twice the same compression; the directories, and what the first one said."""
    before, said = hashes(ADAPTER, BASE), []
    for name in ("one", "two"):
        done = run(
            *("compress", ADAPTER, "--base", BASE, "--data", data, "--eval-data", held, "-o", root / "made" / name),
            *("--method", "lora-drop", "--budget", "60%", "--recover-steps", 2, "--max-length", 64, "--seed", 7),
        )
        assert done.returncode == 0, done.stderr
        said.append(done)
    assert hashes(ADAPTER, BASE) == before, "an input was changed"
    assert names(root / "made") == ["one", "two"], "something was left beside the output"
    return root / "made" / "one", root / "made" / "two", said[0]


# What the commands do


def test_compress_makes_a_smaller_adapter_that_peft_loads(compressed):
    out, _, done = compressed
    assert names(out) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "report.json"]
    before, after = size(read_adapter(ADAPTER)), size(read_adapter(out))
    assert after.parameters <= 0.6 * before.parameters
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), out)
    tensors = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.isfinite(tensors).all()
    assert f"Wrote {out}" in done.stdout and done.stderr == ""


def test_with_nothing_but_data_the_smallest_that_keeps_99_percent_is_made(root, data, held):
    done = run(
        *("compress", ADAPTER, "--base", BASE, "--data", data, "--eval-data", held, "-o", root / "default"),
        *("--recover-steps", 0, "--max-length", 64),
    )
    assert done.returncode == 0, done.stderr
    report = reports.from_json((root / "default" / "report.json").read_text())
    assert report.plan.method == "adaptive" and report.settings["retain"]["share"] == 0.99
    kept = [parameters for parameters, low in report.settings["retain"]["tried"] if low >= 0.99]
    assert min(kept) == report.after.parameters < report.before.parameters


def test_compress_writes_a_report_of_what_it_wrote(compressed):
    out, _, done = compressed
    report = reports.from_json((out / "report.json").read_text())
    found = read_adapter(out)
    assert report.adapter == {
        "name": "adapter",
        "original": digest(read_adapter(ADAPTER)),
        "compressed": digest(found),
    }
    assert report.before == size(read_adapter(ADAPTER)) and report.after == size(found)
    assert report.quality.rows == 12 and report.data["parts"]["evaluation"]["rows"] == 12
    assert report.settings["seed"] == 7 and report.recovery["steps"] == 2
    assert (
        f"{report.after.parameters:,}" in done.stdout
        and f"{report.after.parameters:,}" in (out / "README.md").read_text()
    )


def test_the_same_seed_gives_the_same_bytes(compressed):
    one, two, _ = compressed
    assert names(one) == names(two)
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    first, second = (json.loads((directory / "report.json").read_text()) for directory in (one, two))
    assert first.pop("run").keys() == second.pop("run").keys()
    assert first == second


def test_expand_writes_plain_peft_with_the_same_predictions(compressed, root):
    done = run("expand", compressed[0], "-o", root / "expanded")
    assert done.returncode == 0, done.stderr
    assert json.loads((root / "expanded" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    found = []
    for directory in (compressed[0], root / "expanded"):
        with torch.no_grad():
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), directory)
            found.append(model(input_ids=IDS).logits)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_evaluate_leaves_out_the_rows_that_were_used_to_compress(compressed, data):
    options = ("--original", ADAPTER, "--base", BASE, "--data", data, "--max-length", 64)
    done = run("evaluate", compressed[0], *options)
    assert done.returncode == 0, done.stderr
    report = reports.from_json((compressed[0] / "report.json").read_text())
    used = len(report.used_rows())
    assert used == sum(report.data["parts"][name]["rows"] for name in ("calibration", "recovery", "selection")) == 28
    assert f"{used} rows were used to compress it and are left out" in done.stdout
    assert f"Quality on {40 - used} held-out rows" in done.stdout


def test_measure_plan_edit_and_compress_by_hand(root, data, held):
    """The same way in single steps, the plan changed by hand in between."""
    chain = root / "chain"
    chain.mkdir()
    common = ("--base", BASE, "--data", data, "--max-length", 64)
    drop_little = ("--method", "lora-drop", "--threshold", 0.99)
    done = run("measure", ADAPTER, *common, "--json", cwd=chain)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    norms = {module: found["output_norm"] for module, found in said["modules"].items()}
    for kind in {module.rsplit(".", 1)[1] for module in norms}:
        total = sum(norm for module, norm in norms.items() if module.endswith(kind))
        assert all(
            found["importance"] == pytest.approx(found["output_norm"] / total)
            for module, found in said["modules"].items()
            if module.endswith(kind)
        )
    done = run("plan", ADAPTER, "--statistics", "statistics.safetensors", *drop_little, cwd=chain)
    assert done.returncode == 0, done.stderr
    assert names(chain) == ["plan.json", "statistics.safetensors"] and said["statistics"] == "statistics.safetensors"
    statistics = read_statistics(str(chain / "statistics.safetensors"))
    assert statistics.tokens == said["tokens"] and moments.output_norms(read_adapter(ADAPTER), statistics) == norms
    plan = json.loads((chain / "plan.json").read_text())
    assert plans.from_json((chain / "plan.json").read_text()).choices[0].action == "keep"
    choices = {choice["module"]: choice for choice in plan["choices"]}
    drop, cut = "model.layers.4.self_attn.k_proj", "model.layers.0.mlp.up_proj"
    choices[drop] |= {"action": "drop", "rank": None, "group": None, "reason": "I say so"}
    choices[cut] |= {"action": "keep", "rank": 3, "group": None}
    (chain / "plan.json").write_text(json.dumps(plan))
    done = run(
        *("compress", ADAPTER, *common, "--eval-data", held, "--plan", "plan.json", "-o", "out"),
        *("--statistics", "statistics.safetensors", "--recover-steps", 0),
        cwd=chain,
    )
    assert done.returncode == 0, done.stderr
    found = read_adapter(chain / "out")
    assert drop not in found.modules and found.factors(cut).rank == 3
    report = reports.from_json((chain / "out" / "report.json").read_text())
    assert next(c for c in report.plan.choices if c.module == drop).reason == "I say so"
    assert report.recovery is None


def test_inspect_says_what_is_inside():
    done = run("inspect", ADAPTER, "--json")
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    assert found["format"] == "PEFT LoRA" and found["base_model"] == "stories260k"
    assert {row["type"]: row["modules"] for row in found["types"]} == {
        f"{name}_proj": 5 for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert found["size"] == {
        "modules": 35,
        "factors": 35,
        "parameters": 92480,
        "bytes": 369920,
        "carried_parameters": 0,
        "carried_bytes": 0,
    }


def test_inspect_shows_what_is_shared_and_what_is_carried(compressed, capsys, monkeypatch, root):
    code, out, _ = call(capsys, monkeypatch, "inspect", compressed[0])
    assert code == 0 and "lorapack compact" in out
    groups = read_adapter(compressed[0]).groups
    assert groups
    for group, members in groups.items():
        assert re.search(rf"{re.escape(group)} \(rank \d+\) serves {', '.join(members)}", out)


# Help and light commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_names_its_options(command, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, command, "--help")
    assert code == 0
    assert out.startswith("Usage: ") and f" {command} " in out.splitlines()[0]
    usage = out.splitlines()[0].split()
    for parameter in cli.commands[command].params:
        if isinstance(parameter, click.Argument):  # shown by its metavar
            assert (parameter.metavar or parameter.opts[0].upper()) in usage
        else:
            assert all(option in out for option in parameter.opts)


def imported_by(code):
    """The top modules that a process has imported after running the code."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code) + "\nimport sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    found = imported_by(f"""
        import click
        from lorapack.cli.main import cli
        cli.main({arguments!r}, standalone_mode=False)
    """)
    assert not found & {"torch", "transformers", "peft", "numpy", "safetensors", "datasets", "huggingface_hub"}


def test_inspect_and_expand_import_no_model_code(tmp_path):
    found = imported_by(f"""
        from lorapack.cli.main import cli
        cli.main(["inspect", {str(ADAPTER)!r}], standalone_mode=False)
        cli.main(["expand", {str(ADAPTER)!r}, "-o", {str(tmp_path / "out")!r}], standalone_mode=False)
    """)
    assert "torch" in found
    assert not {name for name in found if name.split(".")[0] in ("transformers", "peft")}


def test_without_a_command_it_shows_the_help_and_fails():
    done = run()
    assert done.returncode == 2 and "compress" in done.stderr + done.stdout


# Refusals


@pytest.fixture(scope="module")
def spoiled(root, data):
    """Inputs with something wrong, by name."""
    folder = root / "spoiled"
    llama().save_pretrained(folder / "tiny")
    gpt2().save_pretrained(folder / "gpt2")
    for name in ("tiny", "gpt2"):
        for part in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BASE / part, folder / name)
    shutil.copytree(BASE, folder / "no tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(BASE, folder / "cut base")
    (folder / "cut base" / "model.safetensors").write_bytes((BASE / "model.safetensors").read_bytes()[:1000])
    shutil.copytree(ADAPTER, folder / "names no base")
    edit(folder / "names no base" / "adapter_config.json", base_model_name_or_path=None)
    shutil.copytree(ADAPTER, folder / "other task")
    edit(folder / "other task" / "adapter_config.json", task_type="SEQ_2_SEQ_LM")
    (folder / "empty.jsonl").write_text("")
    (folder / "columns.jsonl").write_text('{"titel": "a", "inhalt": "b"}\n' * 9)
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "few.jsonl").write_text('{"text": "the same"}\n' * 9)
    (folder / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    )
    (folder / "plan.json").write_text('{"method": "by hand", "choices": [], "groups": {}, "options": {}}')
    (folder / "broken.json").write_text("{")
    lora(llama(), folder / "tiny adapter", target_modules=["q_proj"])
    return folder


# Arguments that replace or follow the good ones, and what the refusal must name. {} is the folder of `spoiled`.
BAD = {
    "no such adapter": (["{}/nowhere"], "does not exist"),
    "a directory that is no adapter": (["{}"], "no adapter_config.json"),
    "a base of other shapes": (["--base", "{}/tiny"], "64x172"),
    "a base without the module": (["--base", "{}/gpt2"], "no module"),
    "a base without tokenizer": (["--base", "{}/no tokenizer"], "cannot be loaded"),
    "a base that is cut off": (["--base", "{}/cut base"], "cannot be loaded"),
    "a base that is not there": (["--base", "{}/nowhere"], "nowhere does not exist"),
    "an adapter that names no base": (["{}/names no base", "--base", ""], "--base"),
    "an adapter of another task": (["{}/other task"], "SEQ_2_SEQ_LM"),
    "no data": (["--data", "{}/nowhere.jsonl"], "nowhere.jsonl does not exist"),
    "empty data": (["--data", "{}/empty.jsonl"], "no rows"),
    "wrong columns": (["--data", "{}/columns.jsonl"], "titel, inhalt"),
    "broken JSON": (["--data", "{}/broken.jsonl"], "line 2"),
    "copies of one row": (["--data", "{}/few.jsonl"], "too few"),
    "chats without a template": (["--data", "{}/chats.jsonl", "--eval-data", "{}/chats.jsonl"], ""),
    "data of an unknown ending": (["--data", "{}/tiny/model.safetensors"], ".safetensors"),
    "empty evaluation data": (["--eval-data", "{}/empty.jsonl"], "no rows"),
    "columns that are no pairs": (["--columns", "prompt"], "--columns"),
    "an unknown role": (["--columns", "body=text"], "'body'"),
    "a column that is not there": (["--columns", "text=body"], "'body'"),
    "an unknown option": (["--frobnicate"], "--frobnicate"),
    "an unknown value of an option": (["--share-init", "magic"], "--share-init"),
    "a word for a number": (["--seed", "seven"], "--seed"),
    "an unknown device": (["--device", "tpu"], "--device"),
    "an unknown method": (["--method", "magic"], "lora-drop"),
    "a budget too small": (["--method", "lora-drop", "--budget", "1%"], "too small"),
    "a budget that is no number": (["--budget", "half"], "half"),
    "a budget of nothing": (["--budget", "0"], "above 0"),
    "a threshold of nothing": (["--method", "lora-drop", "--threshold", "0"], "outside (0, 1]"),
    "a threshold above one": (["--method", "lora-drop", "--threshold", "1.5"], "outside (0, 1]"),
    "a threshold that is no number": (["--method", "lora-drop", "--threshold", "nan"], "outside (0, 1]"),
    "a sample of nothing": (["--sample", "0"], "--sample"),
    "rows too short": (["--max-length", "1"], "--max-length"),
    "rows too long": (["--max-length", "100000"], "--max-length"),
    "fewer steps than none": (["--recover-steps", "-1"], "--recover-steps"),
    "a batch of nothing": (["--batch-size", "0"], "--batch-size"),
    "a plan of nothing": (["--plan", "{}/plan.json"], "nothing is said of"),
    "a plan that is no JSON": (["--plan", "{}/broken.json"], "plan.json"),
    "a plan that is not there": (["--plan", "{}/nowhere.json"], "nowhere.json"),
    "statistics that are none": (["--statistics", "{}/tiny/model.safetensors"], ""),
    "statistics that are not there": (["--statistics", "{}/nowhere"], "nowhere"),
    "a revision of a directory": (["--revision", "main"], "--revision"),
    "an output in /proc": (["-o", "/proc/x/out"], "cannot be made"),
    "an output in /sys": (["-o", "/sys/x"], "cannot be made"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(case, spoiled, data, held, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, needle = BAD[case]
    changes = [change.replace("{}", str(spoiled)) for change in changes]
    adapter = changes.pop(0) if not changes[0].startswith("-") else str(ADAPTER)
    good = ["--base", BASE, "--data", data, "--eval-data", held, "--max-length", 32, "--recover-steps", 0]
    before = hashes(ADAPTER, BASE, spoiled)
    code, out, err = call(capsys, monkeypatch, "compress", adapter, *good, "-o", "new/parents/out", *changes)
    assert (code, out) == (2, ""), (code, out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lorapack: ") and needle in lines[0], err
    assert tree(tmp_path) == []
    assert hashes(ADAPTER, BASE, spoiled) == before


def test_refusals_of_the_real_command(spoiled, data, tmp_path):
    """The same through the installed command: other libraries must keep quiet there too."""
    good = ("--data", data, "--max-length", 32, "-o", "new/out")
    assert "64x172" in refused(run("compress", ADAPTER, "--base", spoiled / "tiny", *good, cwd=tmp_path))
    line = refused(run("compress", ADAPTER, *good, cwd=tmp_path))  # the base is called stories260k, and no path
    assert "stories260k" in line and "--base" in line
    assert "--frobnicate" in refused(run("inspect", ADAPTER, "--frobnicate", cwd=tmp_path))
    assert tree(tmp_path) == []


def test_an_existing_output_is_refused_before_any_work(data, held, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    code, _, err = call(capsys, monkeypatch, "compress", ADAPTER, "--data", "/nowhere/x.jsonl", "-o", out)
    assert code == 2 and "exists" in err and "--overwrite" in err
    for command in (["measure", ADAPTER, "--data", "/nowhere/x.jsonl"], ["plan", ADAPTER, "--statistics", "/nowhere"]):
        code, _, err = call(capsys, monkeypatch, *command, "-o", out / "mine")
        assert code == 2 and "exists" in err
    assert (out / "mine").read_text() == "precious" and tree(tmp_path) == ["out", "out/mine"]


@pytest.mark.parametrize("place", ["adapter/out", "adapter", "base", "base/out", "data", "."])
def test_no_output_can_replace_or_enter_an_input(place, tmp_path, capsys, monkeypatch):
    """Not even with --overwrite; the base is found where the adapter says it is."""
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "data").mkdir()
    head(CALIBRATION, 20, tmp_path / "data" / "rows.jsonl")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    before = hashes(tmp_path)
    code, _, err = call(
        *(capsys, monkeypatch, "compress", tmp_path / "adapter", "--data", tmp_path / "data" / "rows.jsonl"),
        *("--max-length", 32, "--recover-steps", 0, "-o", tmp_path / place, "--overwrite"),
    )
    assert code == 2 and "overlap" in err, err
    assert hashes(tmp_path) == before and len(err.strip().splitlines()) == 1


# The disk and the user


@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP")
@pytest.mark.parametrize(
    ("said", "rounds"), [({}, 10000), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "passive"}, 0)]
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(said, rounds):
    """On a machine with other work, threads that spin slow the very thread that they wait for."""
    done = run("inspect", ADAPTER, OMP_DISPLAY_ENV="VERBOSE", **said)
    assert f"GOMP_SPINCOUNT = '{rounds}'" in done.stderr


def limited(limit):
    """Before a command starts: no file may grow beyond that, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lorapack", "expand", str(ADAPTER), "-o", "new/out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=limited(20_000),  # Python ignores SIGXFSZ: a write fails
        timeout=300,
    )
    assert "cannot be written" in refused(done)
    assert tree(tmp_path) == []


def test_a_full_file_system_is_one_line_and_leaves_nothing(tmp_path):
    script = (
        'mount -t tmpfs -o size=128k none "$1" || exit 77; cd "$1"; '
        '"$2" -m lorapack expand "$3" -o new/out; code=$?; ls -A; exit $code'
    )
    command = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, str(ADAPTER)]
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode in (1, 77) and "lorapack" not in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert "No space left" in refused(done)
    assert done.stdout == "", "something is left on the file system"


def test_a_full_disk_while_measuring_leaves_nothing(tmp_path):
    module = moments.Moments(torch.zeros(64, 64, dtype=torch.float64))
    statistics = moments.Statistics({"m": module}, 1.0, 1, 1, "token", {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="cannot be written") as refusal:
            write_statistics(statistics, str(tmp_path / "s.safetensors"), False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(refusal.value) and tree(tmp_path) == []
    write_statistics(statistics, str(tmp_path / "s.safetensors"), False)
    again = moments.from_tensors(*read_safetensors(tmp_path / "s.safetensors"))
    assert torch.equal(again.modules["m"].forward, module.forward)


def test_an_interrupted_run_says_so_in_one_line_and_leaves_nothing(data, tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lorapack", "compress", str(ADAPTER), "--base", str(BASE), "--data", str(data)),
            *("--recover-steps", "100000", "--max-length", "64", "-o", "new/out"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not list(tmp_path.glob("new/.out.lorapack-*/out")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    # Python ends itself by the signal where it struck inside an exec: a shell shows 130 for both
    assert process.returncode in (130, -signal.SIGINT), process.returncode
    assert err.strip().splitlines() == ["lorapack: interrupted; no output is half written"]
    assert out == "" and tree(tmp_path) == []
