"""For testing a training program against a storage that fails, and a storage against what is promised."""

from seedvc_ckpt.testing.contract import StorageContract
from seedvc_ckpt.testing.faulty import Call, Fault, Faults, FaultyStorage

__all__ = ["Call", "Fault", "Faults", "FaultyStorage", "StorageContract"]
