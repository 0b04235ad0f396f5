"""One rank of the launch in test_synced_batch_norm.py: python synced_batch_norm_worker.py RANK WORLD FOLDER."""

import copy
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from unitdist.config import ModelConfig
from unitdist.models.build import build_model
from unitdist.models.synced_batch_norm import SyncedBatchNorm


def run_layer(rank: int, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """This rank's slice of the batch through the layer, forward and backward, twice; then evaluation."""
    layer = SyncedBatchNorm(case["x"].shape[1], eps=1e-3, momentum=0.3).double()
    layer.load_state_dict({**layer.state_dict(), "weight": case["weight"], "bias": case["bias"]})
    first, last = case["bounds"][rank], case["bounds"][rank + 1]
    x = case["x"][first:last].clone().requires_grad_()
    layer(x.detach() * 2 + 1)
    y = layer(x)
    (y * case["grad"][first:last]).sum().backward()
    result: dict[str, torch.Tensor | None] = {"y": y.detach(), "x_grad": x.grad}
    result |= {"weight_grad": layer.weight.grad, "bias_grad": layer.bias.grad}
    result |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    result["eval"] = layer.eval()(x.detach()).detach()
    return result


def build_nets(group: dist.ProcessGroup) -> dict[str, object]:
    """What build_model makes of the batchnorm arm where there are several ranks."""
    kinds: dict[str, object] = {}
    for name in ("mnist_resnet8", "mnist_mlp", "timm:resnet18", "timm:regnetx_002"):
        config = ModelConfig(name=name, norm="batchnorm", num_classes=10)
        torch.manual_seed(0)
        model = build_model(config, image_size_px=28, process_group=group).double()
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        channels = 3 if name.startswith("timm") else 1
        x_nchw = torch.randn(3, channels, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        loss = parallel(x_nchw).square().mean()
        loss.backward()
        alone = build_model(config, image_size_px=28, sync=False).double()
        alone.load_state_dict(model.state_dict())
        loss_alone = alone(x_nchw).square().mean()
        kinds[name] = {
            "all synced": all(isinstance(norm, SyncedBatchNorm) for norm in norms) and len(norms) > 0,
            "group": {norm.group_name for norm in norms} == {group.group_name},
            "alone synced": any(isinstance(module, SyncedBatchNorm) for module in alone.modules()),
            "keys": list(model.state_dict()) == list(alone.state_dict()),
            "pickled": type(pickle.loads(pickle.dumps(norms[0]))).__name__,
            "loss": float(loss.detach()),
            "loss alone": float(loss_alone.detach()),
        }
    return kinds


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    cases = torch.load(folder / "cases.pt")
    group = dist.new_group([0, 1])
    result = {"layer": [run_layer(rank, case) for case in cases], "nets": build_nets(group)}
    torch.save(result, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
