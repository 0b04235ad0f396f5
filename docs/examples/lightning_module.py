"""Unitization in a LightningModule. sync_batchnorm stays off: the layer synchronizes itself."""

import lightning
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unitdist import convert_unitization, set_norm_divisors


class UnitizedResNet(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = convert_unitization(torchvision.models.resnet18(num_classes=10))
        set_norm_divisors(self.net, 64)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.parameters() if p.ndim > 1]
        plain = [p for p in self.parameters() if p.ndim <= 1]  # weight, bias and alpha of norms: no weight decay
        groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)


if __name__ == "__main__":
    data = TensorDataset(torch.randn(32, 3, 64, 64), torch.randint(10, (32,)))
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir="lightning_run", log_every_n_steps=1
    )
    trainer.fit(UnitizedResNet(), DataLoader(data, batch_size=8, shuffle=True, num_workers=0))
    print(f"loss {trainer.callback_metrics['loss']:.3f}")
