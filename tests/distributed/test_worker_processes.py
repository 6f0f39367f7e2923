"""A packed model in processes that the parent starts after it has computed with threads."""

import multiprocessing.util
import tempfile

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from qlora_ext import LoraConfig, add_lora, quantize_model

THREADS = 2  # with one, torch starts no threads, and a forked child would not hang either


@pytest.fixture(scope="module", autouse=True)
def sockets_with_short_names():
    """A socket's name has at most 107 bytes. Python before 3.14 takes any temporary folder for its
    sockets, however long the folder's name is."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tempfile, "tempdir", "/tmp")
        multiprocessing.util.get_temp_dir()  # keeps what it finds


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 64))
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=["0", "2"])
    model = add_lora(quantize_model(model), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What a model gives for x, and the gradients of its adapters."""
    torch.set_num_threads(THREADS)
    y = model(x)
    adapters = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().mean(), adapters)]


class Rows(Dataset):
    """Rows that a packed model computes in the loader's worker."""

    def __init__(self, model: nn.Module, x: torch.Tensor):
        self.model, self.x = model, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.model(self.x[i : i + 1])[0]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_packed_model_computes_in_a_child(model, start):
    x = torch.randn(64, 256)
    with torch.multiprocessing.get_context(start).Pool(1) as pool:
        want = outputs(model, x)  # the parent's threads are there from here on
        got = pool.apply_async(outputs, (model, x)).get(timeout=200)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.timeout(240)
def test_a_packed_model_computes_in_the_worker_of_a_data_loader(model):
    x = torch.randn(8, 256)
    want = outputs(model, x)[0]
    loader = DataLoader(
        Rows(model, x), batch_size=4, num_workers=1, multiprocessing_context="spawn", timeout=200
    )
    torch.testing.assert_close(torch.cat(list(loader)), want, rtol=1e-5, atol=1e-5)
