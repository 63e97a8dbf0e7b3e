"""To the Hub and back. The Hub is the test suite's own (`loopback_hub`); its client and the command line are real."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from huggingface_hub import ModelCard
from loopback_hub import TOKEN, Fault, Faults, LoopbackHub
from loopback_hub.faults import PASSING
from loopback_hub.rules import errors
from peft import PeftModel
from support import BASE, CALIBRATION, edit, llama, lora, refused, run

from lorapack.compress import compress_adapter
from lorapack.core.report import from_json, to_json
from lorapack.read import read_adapter
from lorapack.write import write_adapter
from lorapack.write.card import BEGIN, END

BASE_ID = "somebody/tiny-llama"
OURS = {"README.md", "adapter_config.json", "adapter_model.safetensors", "report.json"}


COMMANDS = (
    "lorapack.cli.pull",
    "lorapack.cli.push",
    "lorapack.cli.show",
    "lorapack.ship.push",
    "lorapack.write.adapter",
)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The Hub, and a Python for commands that knows it by its environment variables."""
    with LoopbackHub() as hub:
        home = tmp_path_factory.mktemp("home")
        environment = {**os.environ, **hub.environment(home)}
        with warm.server(environment, COMMANDS) as server:
            yield hub, server, home


@pytest.fixture
def hub(running):
    """The Hub without faults; its log starts empty."""
    running[0].log.clear()
    running[0].faults = None
    return running[0]


@pytest.fixture
def command(running):
    """Run a command of lorapack against the Hub."""
    _, server, home = running

    def call(*arguments, cwd=home, **environment):
        return warm.run(server, [*map(str, arguments)], cwd, environment)

    return call


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """What `compress` writes: shared adapters, figures of quality, a base model with a Hub id."""
    path = tmp_path_factory.mktemp("smaller")
    llama().save_pretrained(path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, path / "base")
    original = lora(llama(), path / "adapter", target_modules=["q_proj", "up_proj"])
    edit(original / "adapter_config.json", base_model_name_or_path=BASE_ID)
    rows = path / "rows.jsonl"
    rows.write_text("".join(CALIBRATION.read_text().splitlines(keepends=True)[:24]))
    made = compress_adapter(
        read_adapter(original),
        str(rows),
        str(path / "base"),
        name="adapter",
        method="lora-drop",
        budget="60%",
        recover_steps=0,
        max_length=32,
        device="cpu",
    )
    assert made.adapter.groups, "the test needs something that is shared"
    write_adapter(made.adapter, path / "out", report=made.report)
    return path / "out"


@pytest.fixture
def directory(smaller, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(smaller, tmp_path / "out"))


def done(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def files(hub, repo, revision="main"):
    return {path: blob.content for path, blob in hub.repositories[repo].at(revision).files.items()}


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def logits(directory):
    import lorapack  # noqa: F401

    model = PeftModel.from_pretrained(llama(), directory).eval()
    with torch.no_grad():
        return model(torch.arange(64).reshape(2, 32)).logits


# There and back


@pytest.mark.parametrize("form", ["compact", "peft"])
def test_what_is_pushed_comes_back_with_the_same_bytes_and_the_same_logits(form, hub, command, smaller, tmp_path):
    repo = f"somebody/round-trip-{form}"
    printed = done(command("push", smaller, repo, "--format", form))
    head = hub.repositories[repo].at("main")
    assert f"commit {head.oid}" in printed and head.parent.message == "initial", "one commit"
    done(command("pull", repo, "-o", tmp_path / "back"))
    back = content(tmp_path / "back")
    assert back == {name: blob for name, blob in files(hub, repo).items() if name in OURS} and back.keys() == OURS
    if form == "compact":
        for name in OURS - {"README.md"}:
            assert back[name] == (smaller / name).read_bytes(), name
    else:
        assert json.loads(back["adapter_config.json"])["peft_type"] == "LORA"
    assert torch.equal(logits(tmp_path / "back"), logits(smaller))
    assert torch.equal(logits(smaller), logits(smaller)) and not torch.equal(logits(smaller), llama_logits())


def llama_logits():
    with torch.no_grad():
        return llama()(torch.arange(64).reshape(2, 32)).logits


def test_every_command_takes_the_hub_id_of_what_was_pushed(hub, command, smaller, tmp_path):
    done(command("push", smaller, "somebody/named"))
    there = json.loads(done(command("inspect", "somebody/named", "--json")))
    assert there == json.loads(done(command("inspect", smaller, "--json")))
    done(command("expand", "somebody/named", "-o", tmp_path / "plain"))
    assert torch.equal(logits(tmp_path / "plain"), logits(smaller))


def test_the_report_that_is_sent_has_no_way_to_a_file(hub, command, directory):
    file = directory / "report.json"
    report = json.loads(file.read_text())
    report["run"]["command"] = ["lorapack", "compress", "/alice/adapter", "--data", "~/rows.jsonl", "--budget", "50%"]
    report["data"]["source"] = "/alice/rows.jsonl"
    file.write_text(json.dumps(report))
    done(command("push", directory, "somebody/ways"))
    sent = json.loads(files(hub, "somebody/ways")["report.json"])
    assert sent["run"]["command"] == ["lorapack", "compress", "adapter", "--data", "rows.jsonl", "--budget", "50%"]
    assert sent["data"]["source"] == "rows.jsonl"
    assert not any(b"alice" in content for content in files(hub, "somebody/ways").values())
    assert "/alice/adapter" in file.read_text()


HUBS_OWN = """
import json, sys
from huggingface_hub import HfApi, ModelCard, model_info, snapshot_download
api, repo = HfApi(), sys.argv[1]
refs = api.list_repo_refs(repo)
found = {"name": api.whoami()["name"], "branches": {b.name: b.target_commit for b in refs.branches}}
found |= {"sha": model_info(repo).sha, "base": ModelCard.load(repo).data.base_model, "at": snapshot_download(repo)}
print(json.dumps(found))
"""


def test_the_hubs_own_client_sees_what_was_pushed(hub, command, smaller, tmp_path):
    repo = "somebody/seen"
    done(command("push", smaller, repo))
    environment = {**os.environ, **hub.environment(tmp_path)}
    given = [sys.executable, "-c", HUBS_OWN, repo]
    found = json.loads(done(subprocess.run(given, capture_output=True, text=True, env=environment, timeout=120)))
    head = hub.repositories[repo].at("main").oid
    assert found["branches"] == {"main": head} and found["sha"] == head
    assert (found["name"], found["base"]) == ("somebody", BASE_ID)
    assert content(Path(found["at"])) == files(hub, repo)


def test_the_same_again_makes_no_second_commit(hub, command, smaller):
    done(command("push", smaller, "somebody/again"))
    head = hub.repositories["somebody/again"].at("main")
    assert "has all of it" in done(command("push", smaller, "somebody/again"))
    assert hub.repositories["somebody/again"].at("main") is head


def test_a_branch_is_made_and_main_stays(hub, command, smaller):
    before = hub.create("somebody/branch").at("main")
    done(command("push", smaller, "somebody/branch", "--revision", "small", "--message", "a branch"))
    assert hub.repositories["somebody/branch"].at("main") is before
    assert hub.repositories["somebody/branch"].at("small").message == "a branch"
    assert files(hub, "somebody/branch", "small").keys() >= OURS


def test_a_pull_request_leaves_main_alone_and_is_opened_once(hub, command, smaller):
    found = hub.create("somebody/proposal")
    before = found.at("main")
    for _ in range(2):
        assert "/discussions/1" in done(command("push", smaller, "somebody/proposal", "--create-pr"))
    assert found.at("main") is before and len(found.proposals) == 1
    assert files(hub, "somebody/proposal", "refs/pr/1").keys() >= OURS


def test_a_private_repository_is_made_private_and_read_with_the_token_alone(hub, command, smaller, tmp_path):
    done(command("push", smaller, "somebody/private", "--private"))
    assert hub.repositories["somebody/private"].private
    line = refused(command("pull", "somebody/private", "-o", tmp_path / "x", HF_TOKEN=""))
    assert "somebody/private" in line and not (tmp_path / "x").exists()


def test_a_public_repository_does_not_pass_for_a_private_one(hub, command, smaller):
    hub.create("somebody/public")
    assert "is public" in refused(command("push", smaller, "somebody/public", "--private"))


def test_old_files_of_ours_are_deleted_and_other_files_stay(hub, command, smaller):
    hub.create(
        "somebody/old", files={"adapter_model.bin": b"old", "figure.png": b"theirs", "sub/adapter_model.bin": b"x"}
    )
    done(command("push", smaller, "somebody/old"))
    assert files(hub, "somebody/old").keys() == OURS | {".gitattributes", "figure.png", "sub/adapter_model.bin"}


def test_other_files_of_the_directory_are_not_sent_and_said(hub, command, directory):
    (directory / "notes.txt").write_text("mine")
    assert "Not sent: notes.txt" in done(command("push", directory, "somebody/notes", "--dry-run"))
    done(command("push", directory, "somebody/notes"))
    assert "notes.txt" not in files(hub, "somebody/notes")


def test_a_busy_hub_does_not_make_pull_give_out_an_older_version(hub, command, smaller, tmp_path):
    repo = "somebody/newer"
    done(command("push", smaller, repo, "--format", "peft"))
    done(command("pull", repo, "-o", tmp_path / "first"))
    done(command("push", smaller, repo))
    hub.faults = Faults(seed=0, rate=1, most=1, kinds=(Fault.DOWN,), of=("info",))
    done(command("pull", repo, "-o", tmp_path / "second"))
    assert content(tmp_path / "second")["report.json"] == (smaller / "report.json").read_bytes()
    assert content(tmp_path / "first") != content(tmp_path / "second")


def test_damage_on_the_hub_is_noticed_when_it_is_read(hub, command, smaller, tmp_path):
    done(command("push", smaller, "somebody/damaged"))
    found = hub.repositories["somebody/damaged"]
    blob = found.at("main").files["adapter_config.json"]
    found.put("main", {"adapter_config.json": replace(blob, content=blob.content + b" ")}, "by hand")
    line = refused(command("pull", "somebody/damaged", "-o", tmp_path / "x"))
    assert "adapter_config.json" in line and "report.json" in line and not (tmp_path / "x").exists()
    assert "adapter_config.json" in refused(command("inspect", "somebody/damaged"))


# A dry run


@pytest.mark.parametrize("there", [False, True])
def test_a_dry_run_sends_nothing_that_writes_and_shows_what_the_push_then_sends(there, hub, command, smaller):
    repo = f"somebody/dry-{there}"
    if there:
        hub.create(repo, files={"adapter_model.bin": b"old", "README.md": b"---\nlicense: mit\n---\n\nTheirs.\n"})
    shown = json.loads(done(command("push", smaller, repo, "--format", "peft", "--dry-run", "--json")))
    assert hub.log and {entry.method for entry in hub.log} <= {"GET", "HEAD"}
    assert shown["makes"] == (None if there else "repository") and (repo in hub.repositories) == there
    done(command("push", smaller, repo, "--format", "peft"))
    sent = files(hub, repo)
    assert shown["files"] == {name: len(sent[name]) for name in OURS}
    assert shown["card"] == sent["README.md"].decode()
    assert shown["deleted"] == (["adapter_model.bin"] if there else []) and "adapter_model.bin" not in sent


# What is refused, before anything is written


def refusal(hub, command, *arguments):
    line = refused(command("push", *arguments))
    assert {entry.method for entry in hub.log} <= {"GET", "HEAD"}, "something was written"
    return line


PLANTED = {
    "Hugging Face": "hf_" + "aB3" * 12,
    "GitHub": "ghp_" + "a1B2" * 9,
    "AWS": "AKIA" + "ABCD" * 4,
    "private key": "-----BEGIN RSA PRIVATE " + "KEY-----",
    "password": "https://me:" + "secret@example.org/x",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_secret_in_the_card_is_refused_and_not_repeated(kind, hub, command, directory):
    with open(directory / "README.md", "a") as file:
        file.write(f"\nUse {PLANTED[kind]} to load it.\n")
    line = refusal(hub, command, directory, "somebody/secret")
    assert kind in line and "README.md" in line and PLANTED[kind] not in line


@pytest.mark.parametrize("form", ["compact", "peft"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "report.json", "README.md"])
def test_a_secret_in_any_file_that_is_sent_is_refused(name, form, hub, command, directory):
    plant(directory, name, PLANTED["Hugging Face"])
    if (name, form) == ("adapter_model.safetensors", "peft"):  # another file is written, without that header
        done(command("push", directory, "somebody/without", "--format", form))
        assert PLANTED["Hugging Face"].encode() not in files(hub, "somebody/without")[name]
        return
    assert "Hugging Face token" in refusal(hub, command, directory, "somebody/secret", "--format", form)


def plant(directory, name, text):
    """Put a text into a file of an adapter, so that everything else about the directory stays right."""
    from safetensors.torch import load_file, save_file

    path = directory / name
    if name.endswith(".safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", "note": text})
    elif name == "adapter_config.json":
        edit(path, revision=text)
    elif name == "report.json":
        report = from_json(path.read_text())
        path.write_text(to_json(replace(report, settings={**report.settings, "note": text})))
    else:
        path.write_text(path.read_text() + f"\n{text}\n")
    from lorapack.read.files import file_digests

    report = from_json((directory / "report.json").read_text())
    (directory / "report.json").write_text(to_json(replace(report, files=file_digests(directory))))


def test_the_token_in_use_is_refused_whatever_it_looks_like(hub, command, directory):
    plant(directory, "report.json", TOKEN)
    assert "token" in refusal(hub, command, directory, "somebody/secret")


@pytest.mark.parametrize(
    "path", ["/home/me/rows.jsonl", "C:\\Users\\me\\x", "~/data/rows", "file:///x", "/scratch/a/b"]
)
@pytest.mark.parametrize("name", ["report.json", "README.md", "adapter_config.json"])
def test_a_path_of_this_machine_is_refused(path, name, hub, command, directory):
    plant(directory, name, path)
    assert "a path of this machine" in refusal(hub, command, directory, "somebody/path")


def test_a_secret_in_the_message_is_refused(hub, command, smaller):
    line = refusal(hub, command, smaller, "somebody/secret", "--message", f"with {PLANTED['GitHub']}")
    assert "--message" in line and PLANTED["GitHub"] not in line


@pytest.mark.parametrize("base", ["/models/llama", "./llama", "../x", "here", "", None])
def test_a_base_model_that_is_a_path_is_refused_and_can_be_named(base, hub, command, directory, tmp_path):
    (tmp_path / "here").mkdir()
    config = json.loads((directory / "adapter_config.json").read_text())
    write_with_base(directory, config, base)
    line = refused(command("push", directory, "somebody/base", cwd=tmp_path))
    assert "--base" in line and not [entry for entry in hub.log if entry.method not in ("GET", "HEAD")]
    done(command("push", directory, "somebody/base", "--base", BASE_ID, cwd=tmp_path))
    sent = files(hub, "somebody/base")
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == BASE_ID
    assert json.loads(sent["report.json"])["base_model"] == BASE_ID
    done(command("pull", "somebody/base", "-o", tmp_path / "back"))
    del hub.repositories["somebody/base"]


def write_with_base(directory, config, base):
    from lorapack.read.files import file_digests

    edit(directory / "adapter_config.json", base_model_name_or_path=base)
    report = from_json((directory / "report.json").read_text())
    report = replace(report, base_model=base or "", files=file_digests(directory))
    (directory / "report.json").write_text(to_json(report))


def test_without_a_report_it_is_refused(hub, command, directory):
    (directory / "report.json").unlink()
    assert "report.json" in refusal(hub, command, directory, "somebody/x")


def test_the_report_of_other_bytes_is_refused(hub, command, directory, smaller):
    from safetensors.torch import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * 2}, path, metadata={"format": "pt"})
    assert "not the report of these bytes" in refusal(hub, command, directory, "somebody/x")
    report = from_json((directory / "report.json").read_text())
    (directory / "report.json").write_text(to_json(replace(report, files={})))  # as written before files were named
    assert "not the report of these bytes" in refusal(hub, command, directory, "somebody/x")


def test_a_configuration_changed_by_hand_is_refused(hub, command, directory):
    edit(directory / "adapter_config.json", task_type="FEATURE_EXTRACTION")
    assert "adapter_config.json is not the file" in refusal(hub, command, directory, "somebody/x")


def test_a_directory_that_does_not_read_is_refused(hub, command, directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut off" in refusal(hub, command, directory, "somebody/x")


@pytest.mark.parametrize("repo", ["x", "../x/y", "a/b/c", "owner/"])
def test_what_is_no_hub_id_is_refused(repo, hub, command, smaller):
    assert "no Hub id" in refusal(hub, command, smaller, repo)


def test_offline_nothing_is_sent(hub, smaller, tmp_path):
    offline = {**hub.environment(tmp_path), "HF_HUB_OFFLINE": "1"}
    line = refused(run("push", smaller, "somebody/x", **offline))
    assert "offline mode is on" in line and "tries" not in line and hub.log == []


def test_without_a_token_it_is_one_line(hub, command, smaller):
    line = refused(command("push", smaller, "somebody/tokenless", HF_TOKEN=""))
    assert "token" in line and "somebody/tokenless" not in hub.repositories


def test_a_licence_that_the_hub_does_not_know_is_refused_by_its_own_check(hub, command, smaller):
    line = refused(command("push", smaller, "somebody/licence", "--license", "my-own"))
    assert "license" in line and len(hub.repositories["somebody/licence"].history()) == 1


# The card


@pytest.mark.parametrize("form", ["compact", "peft"])
def test_the_card_is_valid_and_says_what_was_measured(form, hub, command, smaller):
    repo = f"somebody/card-{form}"
    done(command("push", smaller, repo, "--license", "apache-2.0", "--format", form))
    text = files(hub, repo)["README.md"].decode()
    assert errors(text) == ([], [])
    data = ModelCard(text).data  # the client's own check; it parses the model-index
    report = from_json((smaller / "report.json").read_text())
    assert (data.base_model, data.base_model_relation, data.library_name) == (BASE_ID, "adapter", "peft")
    assert (data.pipeline_tag, data.license) == ("text-generation", "apache-2.0")
    assert set(data.tags) >= {"lora", "lorapack"}
    measured = {result.metric_type: result.metric_value for result in data.eval_results}
    assert measured["loss"] == report.quality.metrics["loss"]["compressed"].value
    assert f"{report.after.bytes:,}" in text and f"{report.before.parameters:,}" in text
    assert f'PeftModel.from_pretrained(base, "{repo}")' in text
    assert ("import lorapack" in text) == (form == "compact") == (f"lorapack expand {repo}" in text)
    assert "rows.jsonl" in text and str(smaller.parent) not in text and TOKEN not in text


def test_the_card_that_compress_writes_is_valid_too(smaller):
    text = (smaller / "README.md").read_text()
    assert errors(text) == ([], []) and ModelCard(text).data.eval_results


THEIRS = """---
license: mit
language: en
pipeline_tag: summarization
tags:
- news
---

# My adapter

Trained on *news*.
"""


def test_the_text_and_the_choices_of_a_card_on_the_hub_are_kept(hub, command, smaller):
    hub.create("somebody/kept", files={"README.md": THEIRS.encode()})
    done(command("push", smaller, "somebody/kept"))
    text = files(hub, "somebody/kept")["README.md"].decode()
    assert errors(text) == ([], [])
    data = ModelCard(text).data
    assert (data.license, data.language, data.pipeline_tag) == ("mit", "en", "summarization")
    assert set(data.tags) == {"lora", "lorapack", "news"} and data.base_model == BASE_ID
    body = text.partition("---\n\n")[2]
    assert body.startswith("# My adapter\n\nTrained on *news*.\n\n" + BEGIN) and body.rstrip().endswith(END)


def test_the_figures_of_before_do_not_stay_and_a_second_push_changes_our_part_alone(hub, command, directory):
    repo = "somebody/second"
    with open(directory / "README.md", "a") as file:
        file.write("\nWritten in the directory.\n")
    done(command("push", directory, repo))
    first = files(hub, repo)["README.md"].decode()
    report = from_json((directory / "report.json").read_text())
    other = replace(report, quality=None, data=None)
    (directory / "report.json").write_text(to_json(other))
    done(command("push", directory, repo))
    second = files(hub, repo)["README.md"].decode()
    assert "model-index" in first and "model-index" not in second and "was not measured" in second
    assert first.partition(END)[2] == second.partition(END)[2] == "\n\nWritten in the directory.\n"


def test_two_texts_that_differ_are_refused_until_it_is_said_which_stays(hub, command, directory):
    repo = "somebody/two"
    hub.create(repo, files={"README.md": THEIRS.encode()})
    (directory / "README.md").write_text((directory / "README.md").read_text() + "\nMine.\n")
    assert "--prose" in refusal(hub, command, directory, repo)
    for prose, stays, goes in (("hub", "Trained on *news*.", "Mine."), ("dir", "Mine.", "Trained on *news*.")):
        done(command("push", directory, repo, "--prose", prose))
        text = files(hub, repo)["README.md"].decode()
        assert stays in text and goes not in text and text.count(BEGIN) == 1
        hub.create(repo, files={"README.md": THEIRS.encode()})


def test_a_card_whose_metadata_do_not_parse_is_one_line(hub, command, smaller):
    hub.create("somebody/broken", files={"README.md": b"---\nlicense: [mit\n---\n\nText.\n"})
    assert "cannot be read" in refusal(hub, command, smaller, "somebody/broken")


# Faults. One process pushes to many repositories at a time, each of which has its own faults, drawn from a seed.

PUSHER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from huggingface_hub import HfApi
from lorapack.errors import InputError
from lorapack.hub import pull_adapter
from lorapack.ship.push import Target, push_adapter

directory, out, jobs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def work(job):
    repo, form, create_pr = job
    try:
        api = HfApi(headers={"X-Repository": repo})
        done = push_adapter(directory, Target(repo, form, create_pr=create_pr), api=api, wait=0.01)
    except InputError as error:
        return [repo, None, str(error), None]
    try:
        place = out / repo.replace("/", "--")
        pull_adapter(repo, place, done.commit, overwrite=True)
    except InputError as error:
        return [repo, done.commit, None, str(error)]
    return [repo, done.commit, None, None]

with ThreadPoolExecutor(len(jobs)) as pool:
    print(json.dumps(list(pool.map(work, jobs))))
"""


def push_all(hub, directory, out, jobs):
    environment = {**os.environ, **hub.environment(out / "hf")}
    given = [sys.executable, "-c", PUSHER, directory, out, json.dumps(jobs)]
    result = subprocess.run(list(map(str, given)), capture_output=True, text=True, env=environment, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


OLD = {"adapter_model.bin": b"old", "adapter_config.json": b"{}", "README.md": THEIRS.encode()}


def test_under_200_faults_a_push_is_whole_or_nothing_and_never_twice(hub, command, smaller, tmp_path):
    jobs = [
        (f"trial/{form}-{kind}-{number}", form, kind == "pr")
        for form in ("compact", "peft")
        for kind in ("new", "old", "pr")
        for number in range(6)
    ]
    models = [(repo.rpartition("-")[0].replace("trial", "reference"), form, pr) for repo, form, pr in jobs[::6]]
    for repo, _, _ in [*jobs, *models]:
        if "-old" in repo or "-pr" in repo:
            hub.create(repo, files=OLD)
    wanted = {}
    for repo, commit, failed, unread in push_all(hub, smaller, tmp_path, models):
        assert failed is unread is None
        wanted[repo] = files(hub, repo, commit)

    def whole(repo, found):
        """All of ours as the push without faults made it, and nothing of before."""
        model = repo.rpartition("-")[0].replace("trial", "reference")
        rivals = {path: text for path, text in found.items() if path.startswith("rival-")}
        card = wanted[model]["README.md"].replace(model.encode(), repo.encode())
        return found == {**wanted[model], "README.md": card, **rivals}

    def none(found):
        rest = {p: t for p, t in found.items() if not p.startswith(("rival-", ".git", "adapter_model.bin"))}
        return rest in ({}, {p: t for p, t in OLD.items() if p != "adapter_model.bin"})

    def check(outcome):
        for repo, commit, _, unread in outcome:
            for made in hub.repositories[repo].history() if repo in hub.repositories else ():
                found = {path: blob.content for path, blob in made.files.items()}
                assert whole(repo, found) or none(found), f"{repo} has a partial commit {made.message}"
            if commit is not None:
                assert whole(repo, files(hub, repo, commit)), f"{repo} was reported as done"
                if unread is None:
                    place = tmp_path / repo.replace("/", "--")
                    assert content(place) == {n: t for n, t in files(hub, repo, commit).items() if n in OURS}

    hub.log.clear()
    hub.faults = Faults(seed=7, rate=0.55, most=3, kinds=(*PASSING * 6, Fault.EXPIRED))
    first = push_all(hub, smaller, tmp_path, jobs)
    injected = [entry.fault for entry in hub.log if entry.fault]
    check(first)
    hub.faults = None
    second = push_all(hub, smaller, tmp_path, jobs)
    check(second)
    assert len(injected) >= 200 and set(injected) == set(Fault), len(injected)
    assert 12 <= sum(failed is None for _, _, failed, _ in first) < len(jobs), "some get through, some give up"
    assert all(failed is unread is None for _, _, failed, unread in second), (
        "a push that was broken off can be run again"
    )
    for repo, _, create_pr in jobs:
        found = hub.repositories[repo]
        ours = [commit for commit in found.history() if commit.message == "Push with lorapack"]
        assert len(ours) == 1 and len(found.proposals) == create_pr, f"{repo} was pushed to more than once"


def test_what_somebody_commits_meanwhile_is_looked_at_again(hub, command, smaller):
    """The rival's commit holds an old file of ours, which was not there when the push began."""
    repo = "somebody/contested"
    hub.create(repo)
    hub.faults = Faults(seed=0, rate=1, most=1, kinds=(Fault.RIVAL,), of=("commit",))
    done(command("push", smaller, repo))
    found = [commit.message for commit in hub.repositories[repo].history()]
    assert found == ["Push with lorapack", "a rival's commit", "initial"]
    assert files(hub, repo).keys() == OURS | {".gitattributes", "rival-1.txt"}


def test_what_was_uploaded_is_not_uploaded_again(hub, command, smaller):
    """The token expires before the commit; the next run finds the object there."""
    repo = "somebody/resumed"
    hub.create(repo)
    hub.faults = Faults(seed=0, rate=1, most=1, kinds=(Fault.EXPIRED,), of=("commit",))
    assert "token" in refused(command("push", smaller, repo)) and len(hub.repositories[repo].history()) == 1
    done(command("push", smaller, repo))
    assert sum(entry.method == "PUT" for entry in hub.log) == 1


@pytest.mark.skipif(
    shutil.which("olah-cli") is None, reason="the mirror server olah is not installed (pip install olah)"
)
def test_it_is_read_through_a_mirror_that_others_wrote(hub, command, smaller, tmp_path):
    done(command("push", smaller, "somebody/mirrored"))
    place, port = hub.endpoint.partition("://")[2], free_port()
    upstream = ["--hf-scheme", "http", "--hf-netloc", place, "--hf-lfs-netloc", place]
    where = ["--host", "localhost", "--port", str(port), "--repos-path", "repos", "--log-path", "logs"]
    with open(tmp_path / "log", "w") as log:
        mirror = subprocess.Popen(["olah-cli", *where, *upstream], cwd=tmp_path, stdout=log, stderr=log)
    try:
        for _ in range(300):
            if "Uvicorn running" in (tmp_path / "log").read_text():
                break
            time.sleep(0.1)
        environment = {**hub.environment(tmp_path / "hf"), "HF_ENDPOINT": f"http://localhost:{port}"}
        done(run("pull", "somebody/mirrored", "-o", tmp_path / "back", **environment))
    finally:
        mirror.terminate()
        mirror.wait(30)
    assert content(tmp_path / "back") == {n: t for n, t in files(hub, "somebody/mirrored").items() if n in OURS}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_push_needs_no_model_library(hub, smaller, tmp_path):
    code = (
        "import sys; from lorapack.cli.main import cli\n"
        f"cli(['push', {str(smaller)!r}, 'somebody/light'], standalone_mode=False)\n"
        "print([m for m in ('transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **hub.environment(tmp_path)},
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_no_module_calls_pefts_own_push():
    """It overwrites the card with an empty one."""
    package = Path(__file__).parent.parent / "lorapack"
    assert not [path for path in package.rglob("*.py") if re.search(r"\.push_to_hub\(", path.read_text())]
