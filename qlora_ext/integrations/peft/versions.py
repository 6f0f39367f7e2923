"""What differs between the releases of PEFT that this plug-in works with: 0.18 and newer.

Nothing else in this package asks for PEFT's version.

    0.19    layers take the whole `config` and `target_name`; before, each setting is a keyword, and
            a layer is not told its name
    0.19.1  target_parameters reads a stack [E, N, K] as such; before, as [E, K, N]
    0.20    a layer lists its `lora_variants`; before, its `resolve_lora_variant` chooses one.
            KappaTune. `quantization_utils`, through which BOFT, MiSS, SHiRA and VeRA read packed
            weights
    0.21    OFT reads them through it, too. HiRA and PVeRA, which 0.20 and 0.19 have in another form
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import peft
from packaging.version import Version

RELEASE = Version(peft.__version__).release

if RELEASE >= (0, 20):
    from peft.helpers import KappaTuneSelector
    from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend

    class ChoosesVariant:
        """Does nothing: PEFT itself chooses from `lora_variants`."""

else:
    QuantizationBackend, resolve_quantization_backend = object, None
    KappaTuneSelector = None

    class ChoosesVariant:
        """A mixin for LoRA layers that chooses a variant from `lora_variants`."""

        def resolve_lora_variant(self, *, config=None, **settings):
            """As PEFT's. Raises ValueError for a variant that the layer lacks."""
            settings = settings if config is None else vars(config)
            alora = settings.get("use_alora") or settings.get("alora_invocation_tokens")
            wanted = {"alora_invocation_tokens": alora}
            wanted |= {k: settings.get(k) for k in ("arrow_config", "use_bdlora", "use_dora")}
            key = tuple(sorted(name for name, value in wanted.items() if value))
            if key not in self.lora_variants:
                raise ValueError(
                    f"LoraConfig: {' with '.join(key)} on {self._name}, a 4-bit layer, is not "
                    f"supported; leave {'one of them' if len(key) > 1 else 'it'} out"
                )
            variant = self.lora_variants[key]
            return variant and variant()


try:  # for transformers 5, whose mixtures have fused experts; from 0.19 on
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:
    convert_peft_config_for_transformers = None


if RELEASE >= (0, 21):
    from peft.tuners.hira import HiraModel
    from peft.tuners.hira.layer import Linear as HiraLinear
    from peft.tuners.pvera import PveraModel
    from peft.tuners.pvera.layer import Linear as PveraLinear
else:
    HiraModel = PveraModel = None
    HiraLinear = PveraLinear = object


# Tuners whose layers train and merge on a packed weight. The tests cover each.
SUPPORTED = {"ADALORA", "IA3", "LORA", "RANDLORA", "ROAD"}
NEWER = ""  # what an error says about the others
if RELEASE >= (0, 20):
    SUPPORTED |= {"BOFT", "MISS", "SHIRA", "VERA"}
if RELEASE >= (0, 21):
    SUPPORTED |= {"HIRA", "OFT", "PVERA"}
elif RELEASE >= (0, 20):
    NEWER = f" (PEFT is {peft.__version__}; HIRA, OFT and PVERA need 0.21)"
else:
    NEWER = f" (PEFT is {peft.__version__}; BOFT, MISS, SHIRA and VERA need 0.20, "
    NEWER += "HIRA, OFT and PVERA 0.21)"


# Whether PEFT stores A and B of a stack of experts [E, N, K] in the way of adapters/stacks.py.
ADAPTS_STACKS = RELEASE >= (0, 19, 1)


# The layer that is being adapted, for errors. PEFT tells a layer its name only from 0.19 on.
adapted_layer: ContextVar[str] = ContextVar("qlora_ext_adapted_layer", default="a layer")


def layer_arguments(config: Any, target_name: str) -> dict[str, Any]:
    """The arguments that a LoRA layer's constructor takes besides the settings given to it."""
    return {"config": config, "target_name": target_name} if RELEASE >= (0, 19) else {}
