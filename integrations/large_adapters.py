#!/usr/bin/env python3
"""A pre-commit hook that refuses adapters above a size unless lorapack has made them; needs Python alone."""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}  # lorapack's: 1 KB = 1000 B


def size(text: str) -> int:
    """``10MB``, ``1.5 MB`` or ``200000`` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?B)?", text.upper())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 10MB")
    return int(float(found[1]) * UNITS[found[2] or ""])


def read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def compressed(path: Path) -> bool:
    """Whether lorapack made this file: the compact format, or the bytes that the report beside it was written with."""
    if read(path.with_name("adapter_config.json")).get("peft_type") == "LORAPACK":
        return True
    files = read(path.with_name("report.json")).get("files")
    return isinstance(files, dict) and files.get(path.name) == hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """One line for each file that is refused; 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-bytes", type=size, default=size("10MB"), metavar="N|KB")
    parser.add_argument("files", nargs="*", type=Path)
    given = parser.parse_args()
    large = [path for path in given.files if path.stat().st_size > given.max_bytes and not compressed(path)]
    for path in large:
        sys.stderr.write(
            f"{path}: {path.stat().st_size:,} bytes, more than {given.max_bytes:,}, and not made by lorapack: "
            f"lorapack compress {path.parent} --data FILE -o OUT\n"
        )
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
