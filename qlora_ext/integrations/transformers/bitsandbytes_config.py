"""What becomes of each setting of transformers' BitsAndBytesConfig; docs/trainers.md lists them."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import BitsAndBytesConfig

from ...models.names import as_names

NAME = "BitsAndBytesConfig"
SKIPPED = "llm_int8_skip_modules"
BLOCKSIZE = "bnb_4bit_blocksize"


class Setting(NamedTuple):
    """What is done with one setting."""

    ours: str | None = None  # the setting of QLoraExtConfig that it becomes
    want: tuple = ()  # the values that we take; empty for all
    why: str = ""  # what to do instead


# Those without `ours` change nothing: layers compute in their input's dtype and store bytes, and
# thresholds are for 8 bits.
SETTINGS = {
    "load_in_4bit": Setting(
        want=(True,), why="8 bits need bitsandbytes itself; an unquantized model needs no config"
    ),
    "load_in_8bit": Setting(want=(False,)),
    "bnb_4bit_quant_type": Setting("quant_type", ("nf4", "fp4")),
    "bnb_4bit_use_double_quant": Setting("double_quant", (True, False)),
    # This key is ours: `save_pretrained` adds it, and stock transformers ignores it.
    BLOCKSIZE: Setting("blocksize"),
    SKIPPED: Setting("modules_to_not_convert"),
    "bnb_4bit_compute_dtype": Setting(want=("float32", "bfloat16", "float16")),
    "bnb_4bit_quant_storage": Setting(),
    "llm_int8_threshold": Setting(),
    "llm_int8_has_fp16_weight": Setting(),
    "llm_int8_enable_fp32_cpu_offload": Setting(
        want=(False,),
        why=f"layers on the CPU stay packed; name those that should be dense in {SKIPPED}",
    ),
}
# In a checkpoint's config only these matter. The others say how its writer had loaded the model.
_MATTERS_STORED = {"load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
_NOT_SETTINGS = {"quant_method", "_load_in_4bit", "_load_in_8bit"}


def our_settings(config: Any) -> dict[str, Any]:
    """QLoraExtConfig's keywords for a BitsAndBytesConfig, or for the dict in a config.json.

    Raises:
        ValueError: the config asks for something that we don't do; the error names it.
    """
    stored = isinstance(config, dict)
    # An old config.json may lack keys.
    defaults = BitsAndBytesConfig().to_dict()
    settings = dict(config) if stored else config.to_dict()
    settings.setdefault("load_in_4bit", settings.get("_load_in_4bit", False))
    for key, setting in SETTINGS.items():
        value = settings.get(key, defaults.get(key))
        if setting.want and value not in setting.want and (key in _MATTERS_STORED or not stored):
            want = setting.want[0] if len(setting.want) == 1 else f"one of {setting.want}"
            raise ValueError(
                f"BitsAndBytesConfig: {key} got {value!r}, want {want}"
                + f" ({setting.why})" * bool(setting.why)
            )
    for key in () if stored else sorted(settings.keys() - SETTINGS.keys() - _NOT_SETTINGS):
        if key not in defaults or settings[key] != defaults[key]:
            raise ValueError(
                f"BitsAndBytesConfig: {key} got {settings[key]!r}, want it left out, because "
                "qlora_ext does not know it"
            )
    result = {
        setting.ours: settings.get(key, defaults.get(key))
        for key, setting in SETTINGS.items()
        if setting.ours and (key in settings or key in defaults)
    }
    names = result["modules_to_not_convert"]
    if names is not None:
        result["modules_to_not_convert"] = as_names(names, NAME, SKIPPED)
    return result
