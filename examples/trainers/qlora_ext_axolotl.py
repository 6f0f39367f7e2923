"""An axolotl plugin: `load_in_4bit` gives qlora_ext's layers, without QLORA_EXT_ENABLE.

    plugins:
      - qlora_ext_axolotl.QLoraExtPlugin

The folder of this file must be on PYTHONPATH.
"""

from axolotl.integrations.base import BasePlugin

from qlora_ext.integrations import bitsandbytes
from qlora_ext.integrations.transformers.answering import answer_bitsandbytes

# axolotl turns them on by itself. They read bitsandbytes' QuantState, which our layers don't have.
OWN_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class QLoraExtPlugin(BasePlugin):
    def register(self, cfg):
        for name in OWN_KERNELS:
            cfg[name] = False

    def pre_model_load(self, cfg):
        bitsandbytes.enable()
        answer_bitsandbytes()
