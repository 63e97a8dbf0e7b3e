"""A Hub on the loopback interface: it stands in for the real one, whose write API no package on a registry offers.

It speaks what `huggingface_hub` asks of it (repos/create, validate-yaml, preupload, the LFS batch with real SHA-256,
commits as NDJSON, branches, resolve with ranges, tree, discussions, model info, whoami), stores commits atomically,
keeps a log of its requests, and breaks on purpose where it is told to.
"""

from loopback_hub.faults import Fault, Faults
from loopback_hub.server import TOKEN, LoopbackHub

__all__ = ["TOKEN", "Fault", "Faults", "LoopbackHub"]
