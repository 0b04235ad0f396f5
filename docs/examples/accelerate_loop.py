"""Unitization with Accelerate: accelerate launch accelerate_loop.py (or python accelerate_loop.py)."""

import torch
import torchvision
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unitdist import convert_unitization, set_norm_divisors

accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)
model = convert_unitization(torchvision.models.resnet18(num_classes=10))
set_norm_divisors(model, 64)
decayed = [p for p in model.parameters() if p.ndim > 1]
plain = [p for p in model.parameters() if p.ndim <= 1]  # weight, bias and alpha of norms: no weight decay
optimizer = torch.optim.SGD(
    [{"params": decayed, "weight_decay": 1e-4}, {"params": plain, "weight_decay": 0.0}], lr=0.01, momentum=0.9
)
data = TensorDataset(torch.randn(32, 3, 64, 64), torch.randint(10, (32,)))
loader = DataLoader(data, batch_size=8, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for images, labels in loader:
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    accelerator.print(f"loss {loss.item():.3f}")
if accelerator.is_main_process:
    torch.save(accelerator.unwrap_model(model).state_dict(), "accelerate_loop.pt")
accelerator.end_training()
