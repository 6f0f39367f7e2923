"""`qlora-ext chat`: talk to a base model, an adapter on its base, or a merged model."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from ..checkpoint import stored_method
from ..files import find_folder, read_json
from .errors import CliError


class Chat:
    """A model, its tokenizer, and what was said so far.

    Args:
        name: a checkpoint's or adapter's folder or hub name.
        base: of an adapter; None takes the one that its config names.
        four_bit: pack an unquantized base while loading it.
        device: "cpu", "cuda".
    """

    def __init__(self, name: str, *, base: str | None, four_bit: bool, device: str):
        from ..integrations.transformers import QLoraExtConfig

        folder = find_folder(name)
        adapter = folder if (folder / "adapter_config.json").exists() else None
        if adapter is not None:
            base = base or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            if not base:
                raise CliError(f"{folder} does not name its base: give it with --base")
            folder = find_folder(base)
        self.model = load_model(folder, QLoraExtConfig() if four_bit else None, device)
        if adapter is not None:
            load_adapter(self.model, adapter)
        self.model.eval()
        self.tokenizer = load_tokenizer([*([adapter] if adapter else []), folder])
        self.turns: list[dict[str, str]] = []

    def prompt(self, text: str) -> torch.Tensor:
        """Token ids [1, S]: by the tokenizer's chat template, or the text as it is without one."""
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(text, return_tensors="pt").input_ids
        else:
            turns = [*self.turns, {"role": "user", "content": text}]
            made = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = made["input_ids"]
        return ids.to(self.model.device)

    @torch.no_grad()
    def answer(self, text: str, *, max_tokens: int, temperature: float, stream: bool) -> str:
        """Continues the conversation; printed as it is made if `stream`."""
        ids = self.prompt(text)
        if ids.shape[1] == 0:
            raise CliError("the prompt is empty")
        streamer = None
        if stream:
            streamer = transformers.TextStreamer(
                self.tokenizer, skip_prompt=True, skip_special_tokens=True
            )
        pad = self.tokenizer.pad_token_id
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
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
    """A model in whatever format its folder is, on a device.

    packing: the QLoraExtConfig to pack an unquantized one with, or None.
    """
    from ..integrations.transformers import from_pretrained

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        method = stored_method(config)
        settings = {"dtype": "auto", "device_map": None if device == "cpu" else device}
        if method in ("qlora_ext", "bitsandbytes"):
            return from_pretrained(folder, **settings)
        if method is None and packing is not None:
            settings["quantization_config"] = packing
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        raise CliError(f"{folder}: {str(error).strip().splitlines()[0]}") from None


def load_adapter(model, folder: Path) -> None:
    """Puts an adapter on a model: ours where it is plain LoRA, else PEFT's loader."""
    from ..lora import load_adapter as ours

    try:
        ours(model, folder)
    except (ValueError, TypeError) as error:
        try:
            import peft

            peft.PeftModel.from_pretrained(model, folder)  # the model is adapted in place
        except Exception:  # the first sentence is the one that helps
            raise CliError(str(error)) from None


def load_tokenizer(folders: list[Path]):
    """The first tokenizer there is: an adapter may bring one."""
    for folder in folders:
        if (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists():
            try:
                return transformers.AutoTokenizer.from_pretrained(folder)
            except Exception as error:  # tokenizers raises that very class for a damaged file
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CliError(f"{folder}: its tokenizer does not load ({first})") from None
    raise CliError(f"{folders[-1]} has no tokenizer (tokenizer.json)")
