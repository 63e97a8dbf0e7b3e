"""`model.load_adapter("compact")` in transformers: hand it the shared factors under every layer's name.

transformers reads an adapter's file itself, past PEFT's loading, so a compact checkpoint is unfolded
here before its loader sees it. Injection (`lorapack.plugin.peft`) has tied the layers by then: what is
loaded into one of a group is loaded into all.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

LoadAdapter = Callable[..., Any]


def unfolding(load_adapter: LoadAdapter) -> LoadAdapter:
    """`load_adapter` that also takes a compact directory or Hub id."""
    signature = inspect.signature(load_adapter)

    @functools.wraps(load_adapter)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        source, options = given.get("peft_model_id"), given.get("adapter_kwargs") or {}
        if source is None or given.get("adapter_state_dict") is not None:
            return load_adapter(self, *args, **kwargs)

        from peft import PeftConfig
        from peft.utils import load_peft_weights

        from lorapack.plugin.peft import LorapackConfig, unfolded

        where = {name: options[name] for name in ("revision", "subfolder", "token", "cache_dir") if name in options}
        if given.get("local_files_only"):
            where["local_files_only"] = True
        config = given.get("peft_config")
        try:
            config = config or PeftConfig.from_pretrained(source, **where)
        except (OSError, ValueError, KeyError):  # not ours to report: the original says it in its own words
            return load_adapter(self, *args, **kwargs)
        if not isinstance(config, LorapackConfig):
            return load_adapter(self, *args, **kwargs)
        given["peft_model_id"] = None
        given["peft_config"] = config
        given["adapter_state_dict"] = unfolded(config, load_peft_weights(source, device="cpu", **where))
        return load_adapter(*call.args, **call.kwargs)

    load.__dict__["unfolds_lorapack"] = True
    return load


def register() -> None:
    """Wrap the loader of every transformers model; calling it again changes nothing."""
    from transformers.integrations.peft import PeftAdapterMixin

    if not hasattr(PeftAdapterMixin.load_adapter, "unfolds_lorapack"):
        PeftAdapterMixin.load_adapter = unfolding(PeftAdapterMixin.load_adapter)
