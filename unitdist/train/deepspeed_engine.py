"""What only DeepSpeed needs: its config, and whole optimizer states gathered from ZeRO's shards.

DeepSpeed's own checkpoints are bound to the world size, its universal form refuses SGD, and its loader runs pickled
code. So states are gathered by parameter name and saved in our one file, which every engine and world size reads.
"""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unitdist.config import Config
from unitdist.errors import ConfigError, TrainingError
from unitdist.wording import install_extra
from unitdist.world import World

if TYPE_CHECKING:
    from unitdist.train.engine import Engine


def check_supported(config: Config) -> None:
    """Refuse what DeepSpeed would get wrong. Raises ConfigError."""
    train = config.train
    if train.precision == "fp16":
        raise ConfigError("train.precision: fp16 is not offered with train.engine: deepspeed; use bf16 or fp32")
    if train.zero_stage > 0 and config.optim.name in ("lars", "lamb"):
        raise ConfigError(
            f"optim.name: {config.optim.name} needs whole tensors, ZeRO {train.zero_stage} flattens them; use train.zero_stage=0"
        )
    if train.zero_stage == 3 and train.ema_decay is not None:
        raise ConfigError(
            "train.ema_decay: not with train.zero_stage: 3, whose weights lie in shards; use stage 2 or less"
        )
    if config.health.on_nonfinite != "stop":
        raise ConfigError(
            f"health.on_nonfinite: {config.health.on_nonfinite} is not for train.engine: deepspeed, which updates inside its own "
            "backward; use stop (at log steps), or train.engine=ddp"
        )
    if train.zero_stage == 3 and config.health.checksum_every_steps is not None:
        raise ConfigError("health.checksum_every_steps: not with train.zero_stage: 3, whose weights no two ranks share")
    if train.compile:
        raise ConfigError("train.compile: not with train.engine: deepspeed; use train.engine=ddp")


def deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    """DeepSpeed's JSON, complete: what it leaves unsaid DeepSpeed fills in (it would clip gradients to 1.0)."""
    train = config.train
    return {
        "train_batch_size": config.data.global_batch_size,
        "train_micro_batch_size_per_gpu": config.data.global_batch_size // (world.size * train.accumulation_steps),
        "gradient_accumulation_steps": train.accumulation_steps,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def build_plugin(config: Config, world: World, *, on_gpu: bool) -> Any:
    """Accelerate's DeepSpeed plugin. Raises ConfigError where DeepSpeed is not installed."""
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # noqa: F401
        import transformers  # noqa: F401  (Accelerate's DeepSpeed path imports it)
        from accelerate.utils import DeepSpeedPlugin
    except ImportError as error:
        raise ConfigError(
            f"train.engine: deepspeed needs the extra `deepspeed` ({error}); {install_extra('deepspeed')}"
        ) from None
    return DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, world))


def check_optimizer(wrapped: Any, zero_stage: int) -> None:
    """Raises TrainingError when ZeRO was asked for and the optimizer is not DeepSpeed's."""
    inner = type(wrapped.optimizer).__name__
    if zero_stage > 0 and "DeepSpeedZeroOptimizer" not in inner:
        raise TrainingError(f"train.zero_stage: {zero_stage} was asked for, the optimizer is {inner}")


def gather_model_state(module: nn.Module) -> dict[str, Tensor]:
    """ZeRO 3: the whole state dict, on the CPU of every rank."""
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = dict(module.named_parameters())
    state = {}
    for name, value in module.state_dict().items():
        whole = safe_get_full_fp32_param(parameters[name]) if name in parameters else value
        state[name] = whole.detach().to("cpu", copy=True)
    return state


def gather_optimizer_state(engine: "Engine", parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """ZeRO 1 to 3: each parameter's whole optimizer buffers and step count, on the CPU of every rank."""
    from deepspeed.utils import safe_get_full_optimizer_state

    assert engine.optimizer is not None
    _link_buffers(engine.sharded_optimizer)
    shards = [values for values in engine.optimizer.state.values() if values]
    if not shards:
        return {}
    tensors = [key for key, value in shards[0].items() if isinstance(value, Tensor) and value.dim()]
    scalars = {key: value for key, value in shards[0].items() if key not in tensors and value is not None}
    gathered = {}
    for name, parameter in parameters.items():
        buffers = {key: safe_get_full_optimizer_state(parameter, key) for key in tensors}
        gathered[name] = {
            key: value.detach().to("cpu", copy=True) for key, value in buffers.items() if value is not None
        }
        gathered[name] |= {key: value.clone() if isinstance(value, Tensor) else value for key, value in scalars.items()}
    return gathered


def restore_optimizer_state(
    engine: "Engine", parameters: dict[str, nn.Parameter], state: dict[str, dict[str, Any]]
) -> None:
    """ZeRO 1 to 3: put whole buffers back into the shards.

    The shards' buffers do not exist before the first step. One step with learning rate 0 on gradients of 0 makes them
    and moves no weight; what the forward does to the running statistics is undone.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    if not state:
        return
    assert engine.optimizer is not None
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    _step_on_zero_gradients(engine)
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    _link_buffers(engine.sharded_optimizer)
    for name, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim():
                safe_set_full_optimizer_state(parameters[name], value.to(engine.device), key)
    steps = next(iter(state.values())).get("step")
    for shard in engine.optimizer.state.values():
        if steps is not None and "step" in shard:
            shard["step"] = steps.clone() if isinstance(steps, Tensor) else steps


def _link_buffers(sharded_optimizer: Any) -> None:
    """Let DeepSpeed find every group's buffers. Under ZeRO 1 and 2 it (0.19.8) links them once, after the step of the
    first parameter group, when the second group's do not exist yet."""
    if hasattr(sharded_optimizer, "_lazy_init_hp_params_optimizer_state"):
        sharded_optimizer._hp_optimizer_states_linked = False
        sharded_optimizer._lazy_init_hp_params_optimizer_state()


def _step_on_zero_gradients(engine: "Engine") -> None:
    assert engine.model is not None and engine.module is not None
    buffers = {name: value.clone() for name, value in engine.module.named_buffers()}
    images = torch.zeros(2, *engine.image_shape, device=engine.device)
    for _ in range(engine.config.accumulation_steps):
        with engine.accelerator.accumulate(engine.model):
            engine.accelerator.backward(engine.model(images).sum() * 0.0)
    for name, value in engine.module.named_buffers():
        value.copy_(buffers[name])
