"""Helpers of models that read the weight of a layer they are given, in a file of their own."""

import torch.nn.functional as F
from torch import nn


def multiply(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Products:
    @staticmethod
    def multiply(layer, x):
        return x @ layer.weight.T


def penalty(model):
    total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total = total + module.weight.float().pow(2).sum()
    return total
