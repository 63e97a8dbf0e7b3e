"""Many adapters in one run: grouped by base, spread over processes or a Ray cluster, gone on with after a stop.

The summary is part of a page's report, and a fleet writes such a page: it is imported when it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorapack.fleet.fleet import compress_fleet

__all__ = ["compress_fleet"]


def __getattr__(name: str) -> Any:
    if name == "compress_fleet":
        from lorapack.fleet.fleet import compress_fleet

        return compress_fleet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
