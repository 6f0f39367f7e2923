"""litgpt's `finetune lora` with the base model in 4 bits. It ran on a CPU; no GPU was tried.

    python examples/trainers/litgpt_lora.py checkpoints/org/model --precision bf16-true

It takes the arguments of `litgpt finetune_lora` (--help lists them) and runs litgpt's own code:
lora_query, lora_key, lora_value, lora_projection, lora_mlp and lora_head say what gets adapters,
and the result is litgpt's, merged into the unquantized checkpoint. Leave out --quantize, for which
litgpt knows only bitsandbytes' names. Needs litgpt 0.5.13 and qlora_ext.
"""

import types

import lightning
import torch
from litgpt.finetune import lora
from litgpt.utils import CLI

from qlora_ext.integrations.lightning import FabricPrecision4bit

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def fabric_in_4bit(*, precision, plugins=None, **settings):
    """A lightning.Fabric as litgpt asks for it, with our precision plug-in."""
    if plugins is not None or precision not in DTYPES:
        raise SystemExit(
            f"litgpt_lora: precision is {precision!r}, want one of {', '.join(DTYPES)}, and no "
            "--quantize: the base model is in 4 bits already"
        )
    return lightning.Fabric(plugins=FabricPrecision4bit(dtype=DTYPES[precision]), **settings)


if __name__ == "__main__":
    # litgpt.finetune.lora makes its one Fabric as L.Fabric; merging makes another one, elsewhere.
    lora.L = types.SimpleNamespace(Fabric=fabric_in_4bit)
    CLI(lora.setup)
