"""`qlora-ext chat`: talk to a base model, an adapter on its base, or a merged model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import transformers

from ..adapters.peft_config import NotPlainLora
from ..checks import check_finite, check_parameters
from ..files import FLOATS, SafetensorsFiles, find_folder, read_json, reading, safetensors_files
from ..integrations.transformers.building import (
    build_folder,
    check_complete,
    loading,
    read_config,
    stored_method,
    unquantized,
)
from ..models.patterns import bad_regex
from ..text import shorten
from .errors import CliError, as_cli_error

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Chat:
    """A model, its tokenizer, and the conversation so far.

    Args:
        name: a checkpoint's or adapter's folder or hub name.
        base: the base of an adapter; None takes the one that its config names.
        four_bit: pack an unquantized base while loading it.
        device: "cpu", "cuda".
    """

    def __init__(self, name: str, *, base: str | None, four_bit: bool, device: str):
        from ..integrations.transformers.config import QLoraExtConfig

        folder = find_folder(name)
        adapter = folder if os.path.lexists(folder / ADAPTER) else None
        if adapter is not None:
            base = base or read_json(folder / ADAPTER).get("base_model_name_or_path")
            if not base:
                raise CliError(f"{folder} does not name its base: give it with --base")
            if not isinstance(base, str):
                raise CliError(
                    f"{folder / ADAPTER}: base_model_name_or_path is {shorten(base)}, want the "
                    "name of a folder or model: give it with --base"
                )
            folder = find_folder(base)
        self.folder = folder
        self.model = load_model(folder, QLoraExtConfig() if four_bit else None, device)
        if adapter is not None:
            load_adapter(self.model, adapter)
        self.model.eval()
        self.tokenizer = load_tokenizer([*([adapter] if adapter else []), folder])
        self.turns: list[dict[str, str]] = []

    def prompt(self, text: str) -> torch.Tensor:
        """Token ids [1, S] of the conversation with `text`, in the tokenizer's chat template; of
        `text` alone if it has none."""
        source = getattr(self.tokenizer, "name_or_path", self.folder)
        with reading(source, "has a tokenizer that fails"):
            if self.tokenizer.chat_template is None:
                ids = self.tokenizer(text, return_tensors="pt").input_ids
            else:
                turns = [*self.turns, {"role": "user", "content": text}]
                made = self.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                ids = made["input_ids"]
        known = self.model.get_input_embeddings().num_embeddings
        if ids.numel() and int(ids.max()) >= known:
            raise CliError(
                f"{source}: its tokenizer gives token {int(ids.max())}, but the model has only "
                f"{known:,} tokens, want the tokenizer of this model"
            )
        return ids.to(self.model.device)

    @torch.no_grad()
    def answer(self, text: str, *, max_tokens: int, temperature: float, stream: bool) -> str:
        """Continues the conversation. stream: whether to print the answer while it is made."""
        ids = self.prompt(text)
        if ids.shape[1] == 0:
            raise CliError("the prompt is empty, want some text")
        streamer = None
        if stream:
            streamer = transformers.TextStreamer(
                self.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
        pad = self.tokenizer.pad_token_id
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        # Here the settings of config.json and generation_config.json take effect.
        with reading(self.folder, "has a model that cannot answer"):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                streamer=streamer,
                **sampling,
            )
            said = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        self.turns += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": said},
        ]
        return said


def load_model(folder: Path, packing, device: str):
    """Loads a model of any format onto a device.

    packing: the QLoraExtConfig to pack an unquantized model with, or None.

    Raises:
        CheckpointError, CliError: the folder is not a checkpoint in safetensors files, or its
            config.json describes a much larger model than they hold.
    """
    from ..integrations.transformers.files import check_loaded
    from ..integrations.transformers.pretrained import from_pretrained

    if os.path.lexists(folder / ADAPTER):
        raise CliError(f"{folder} is an adapter ({ADAPTER}), want the model that it is for")
    files = SafetensorsFiles(safetensors_files(folder), any_dtype=True)
    config = read_config(folder, files)
    settings = {
        "dtype": "auto",
        "device_map": None if device == "cpu" else device,
        "trust_remote_code": False,
        "use_safetensors": True,  # never a pickle
    }
    if os.path.lexists(folder / "generation_config.json"):
        read_json(folder / "generation_config.json")
    with loading(folder, files):
        _check_weights(folder, config, files)
        method = stored_method(config)
        load = transformers.AutoModelForCausalLM.from_pretrained
        if method in ("qlora_ext", "bitsandbytes"):
            load = from_pretrained
        elif method is None and packing is not None:
            settings["quantization_config"] = packing
        model, info = load(folder, output_loading_info=True, **settings)
        # Check this whatever class was saved: a random head cannot answer.
        check_complete(folder, model, info["missing_keys"])
        if method != "qlora_ext" and "quantization_config" not in settings:
            check_loaded(model, files.paths)  # otherwise our quantizer has checked it
        return model


def _check_weights(folder: Path, config, files: SafetensorsFiles) -> None:
    """Raises CliError if config.json describes more weights than the files can hold. The missing
    ones would be initialised at random and take memory."""

    def find_class(config, path):
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]

    model = build_folder(folder, unquantized(config), torch.bfloat16, find_class)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    # A byte holds two weights, and a tied weight is stored once. Small models do no harm.
    held = sum(files.numel(key) * (2 if files.stored[key] == "U8" else 1) for key in files)
    if wanted > 2 * held + 2**20:
        raise CliError(
            f"{folder}: config.json describes a model of {wanted:,} weights, but its files hold "
            f"{held:,}; one of them is from another model"
        )


def load_adapter(model, folder: Path) -> None:
    """Loads an adapter into a model: with our loader if it is plain LoRA, else with PEFT's."""
    from ..adapters.files import load_adapter as ours

    try:
        ours(model, folder)
    except NotPlainLora as error:
        _check_for_peft(folder)
        try:
            import peft

            adapted = peft.PeftModel.from_pretrained(model, folder)  # in place
        except Exception:  # the first error says more
            raise CliError(str(error)) from None
        with as_cli_error(OverflowError):
            check_parameters(str(folder / ADAPTER_WEIGHTS), adapted)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise CliError(str(error).removeprefix("load_adapter: ")) from None


def _check_for_peft(folder: Path) -> None:
    """Raises CliError unless it is safe to let PEFT read an adapter. PEFT would unpickle, import a
    module that the config names, match any regular expression, and make matrices and layers of any
    size. This also refuses values that are not finite."""
    path = folder / ADAPTER
    config = read_json(path)
    files = SafetensorsFiles([folder / ADAPTER_WEIGHTS], any_dtype=True)
    for key in files:
        if files.dtypes.get(key) in FLOATS:
            with as_cli_error(OverflowError):
                check_finite(f"{folder / ADAPTER_WEIGHTS}: {key}", files[key], files.dtypes[key])
    largest = max((n for key in files for n in files.shapes[key]), default=0)
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    ranks = [config.get("r"), *(patterns[0].values() if isinstance(patterns[0], dict) else ())]
    if any(isinstance(rank, int) and rank > largest for rank in ranks):
        raise CliError(f"{path}: r is {shorten(config.get('r'))}, want the rank of its tensors")
    for key in ("megatron_config", "layer_replication"):
        if config.get(key):
            raise CliError(
                f"{path}: {key} is {shorten(config[key])}, want an adapter without it; if you "
                "trust this one, load it with PEFT"
            )
    names = [config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern",
                                         "modules_to_save", "target_parameters")]  # fmt: skip
    texts = [text for value in [*names, *patterns] if isinstance(value, (str, list, dict))
             for text in ([value] if isinstance(value, str) else value)]  # fmt: skip
    if bad := bad_regex(text for text in texts if isinstance(text, str)):
        raise CliError(f"{path} has {shorten(bad[0])} among its layer names, want {bad[1]}")


def load_tokenizer(folders: list[Path]):
    """The tokenizer of the first folder that has one. An adapter may bring its own."""
    for folder in folders:
        if (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists():
            with reading(folder, "has a tokenizer that does not load"):
                return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    raise CliError(f"{folders[-1]} has no tokenizer (tokenizer.json): copy that of its base there")
