"""The configuration of a LoRA adapter that PEFT loads."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any


def lora_config(ranks: Mapping[str, int], alphas: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``.

    Args:
        ranks: Rank by module.
        alphas: Alpha by module; the scale of a product is its alpha divided by its rank.
        more: Further settings.

    Example:
        >>> config = lora_config({"fc": 4, "proj": 4, "head": 2}, {"fc": 4, "proj": 4, "head": 2})
        >>> config["r"], config["rank_pattern"], config["target_modules"]
        (4, {'^head': 2}, 'fc|proj|head')
    """
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        # Without the anchor a pattern would also match the ends of other names.
        "rank_pattern": {f"^{re.escape(path)}": other for path, other in ranks.items() if other != rank},
        "alpha_pattern": {f"^{re.escape(path)}": other for path, other in alphas.items() if other != alpha},
        # A regular expression must match whole names; a list would also match the ends of other names.
        "target_modules": "|".join(map(re.escape, ranks)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **more,
    }
