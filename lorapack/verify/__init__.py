"""Do two directories say the same? Both are run on the same inputs and their outputs compared."""

from lorapack.verify.verify import Verification, demand_same, verify

__all__ = ["Verification", "demand_same", "verify"]
