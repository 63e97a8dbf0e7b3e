"""Many adapters in one run: grouped by base, spread over processes or a Ray cluster, gone on with after a stop."""

from lorapack.fleet.fleet import compress_fleet

__all__ = ["compress_fleet"]
