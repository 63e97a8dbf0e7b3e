"""What must not leave the machine: tokens, keys, and paths of its file system."""

import re
from pathlib import Path

from lorapack.errors import InputError

# Each begins with the text that gives it away, and looks back from there: so a large file is searched quickly.
SECRETS = {
    "a Hugging Face token": rb"hf_(?<!\whf_)(?:[A-Za-z0-9]{30,}|(?:oauth|app)_[\w.-]{20,})",
    "a GitHub token": rb"gh(?<!\wgh)(?:[pousr]_[A-Za-z0-9]{36})|github_pat_\w{50,}",
    "a GitLab token": rb"glpat-[\w-]{20,}",
    "an AWS access key": rb"A(?<!\wA)(?:KIA|SIA)[A-Z0-9]{16}\b",
    "a Google API key": rb"AIza(?<!\wAIza)[\w-]{35}",
    "a Slack token": rb"xox[abeoprs]-[\w-]{10,}",
    "an OpenAI or Anthropic key": rb"sk-(?<![\w-]sk-)[\w-]{32,}",
    "a Weights & Biases key": rb"WANDB_API_KEY\W{1,5}\w{40}",
    "a JSON web token": rb"eyJ(?<!\weyJ)[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": rb"://(?<=[a-z]://)[^\s/:@\"'<>]+:[^\s/@\"'<>]{3,}@",
}
PATHS = (
    rb"(?<![\w./:~-])/(?:home|Users|root|mnt|tmp|var|data|workspace|scratch|srv|opt|media|content|kaggle|private|work|gpfs|lustre)"
    rb"/[\w.~-]+"
    rb"|\bfile://"
    rb"|(?<![\w/.])~/[\w.-]"
    rb"|(?<!\w)[A-Za-z]:\\{1,2}\w"
)
TEXTS = (".json", ".md")


def refuse_leaks(directory: Path, token: str | None = None) -> None:
    """Refuse a directory of which a file holds a secret, or a text names a path of this machine.

    Args:
        directory: every file in it is looked at, tensors too: their header is text.
        token: one that is in use, whatever it looks like.

    Raises:
        InputError: names the file, the line and the kind; of the secret only the first characters.
    """
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        refuse_leak(path.read_bytes(), path.name, path.suffix in TEXTS, token)


def refuse_leak(content: bytes, where: str, text: bool = True, token: str | None = None) -> None:
    """`refuse_leaks` for one content, called `where`; paths are looked for in a text."""
    kinds = dict(SECRETS)
    if token:
        kinds["the token in use"] = re.escape(token.encode())
    if text:
        kinds["a path of this machine"] = PATHS
    for kind, pattern in kinds.items():
        if found := re.search(pattern, content):
            line = content.count(b"\n", 0, found.start()) + 1
            seen = found[0][: 40 if kind.startswith("a path") else 4].decode(errors="replace")
            raise InputError(f"{where} line {line} holds {kind} ({seen}…): take it out, nothing was sent")
