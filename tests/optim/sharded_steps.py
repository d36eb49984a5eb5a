"""Run by torchrun: every optimizer on matrices that are cut up, and on whole ones, with the same gradients.

Prints a line of JSON: for each of them the largest relative difference of a parameter after the steps. Half way the
state of the cut-up ones is put together and read back, as a checkpoint does.
"""

import json
import os
import warnings

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import edgewright.optim

CASES = [
    ("Apollo", {}),
    ("Apollo", {"proj": "svd"}),
    ("ApolloMini", {}),
    ("GaLore", {}),
    ("Fira", {}),
    ("GradNormLoRP", {}),
]
SHAPES = [(96, 64), (64, 96), (33, 40), (96,)]


def read_back(optimizer, parameters, mesh):
    for parameter in parameters:
        for key, value in list(optimizer.state[parameter].items()):
            if isinstance(value, DTensor):
                full = value.full_tensor()
                same = full.shape == parameter.shape
                optimizer.state[parameter][key] = distribute_tensor(full, mesh, [Shard(0)]) if same else full


def difference(name, options, mesh):
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    whole = [nn.Parameter(each.clone()) for each in start]
    cut = [nn.Parameter(distribute_tensor(each, mesh, [Shard(0)])) for each in start]
    kind = getattr(edgewright.optim, name)
    ours, theirs = (kind(params, update_proj_gap=3, weight_decay=0.1, **options) for params in (cut, whole))
    for step in range(8):
        for a, b in zip(cut, whole, strict=True):
            b.grad = torch.randn(b.shape)
            a.grad = distribute_tensor(b.grad, mesh, [Shard(0)])
        ours.step()
        theirs.step()
        if step == 4:
            read_back(ours, cut, mesh)
    pairs = [(a.detach().full_tensor(), b.detach()) for a, b in zip(cut, whole, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = [[name, options, difference(name, options, mesh)] for name, options in CASES]
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)
    distributed.barrier()
    os._exit(0)  # gloo's threads may still want the interpreter while it is torn down, and then abort the process


main()
