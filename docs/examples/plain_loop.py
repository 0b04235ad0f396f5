"""Unitization in a plain training loop. On one process: python plain_loop.py; on several: torchrun --nproc-per-node 2 plain_loop.py."""

import os

import torch
import torchvision
from torch import nn

from unitdist import convert_unitization, set_norm_divisors

distributed = "RANK" in os.environ
if distributed:
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
local_rank = int(os.environ.get("LOCAL_RANK", 0))
device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")

torch.manual_seed(0)
model = convert_unitization(torchvision.models.resnet18(num_classes=10))  # statistics are synchronized over all ranks
set_norm_divisors(model, 64)  # n = H*W of each layer at the training resolution
model = model.to(device, memory_format=torch.channels_last)
network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if distributed else model

decayed = [p for name, p in model.named_parameters() if p.ndim > 1]
plain = [p for name, p in model.named_parameters() if p.ndim <= 1]  # weight, bias and alpha of norms: no weight decay
groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": plain, "weight_decay": 0.0}]
optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)

images, labels = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))  # your DataLoader instead
for step in range(3):
    loss = nn.functional.cross_entropy(network(images.to(device)), labels.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
if not distributed or torch.distributed.get_rank() == 0:  # all ranks at once would tear the file
    torch.save(model.state_dict(), "plain_loop.pt")  # alpha and the norm divisors are in it
if distributed:
    torch.distributed.destroy_process_group()
