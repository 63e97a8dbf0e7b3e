import os
import warnings

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_peft():
    """Other libraries' deprecations are not ours to fix."""
    with warnings.catch_warnings():
        for library in ("peft", "transformers", "torch", "huggingface_hub"):
            warnings.filterwarnings("ignore", module=rf"{library}\..*")
        yield
