"""ZeRO's third stage: no device ever holds a whole model."""

from typing import Any

import deepspeed
import torch
from torch import nn


def partition(module: nn.Module, config: dict[str, Any], place: torch.device) -> None:
    """Shard all parameters of `module` over the workers, one after the other, and move its buffers.

    The module may be on the CPU, its weights mapped from their files: only one parameter is whole on
    the device at a time. What is trained becomes float32 on the way. All workers get the values
    of the first. Parameters that are sharded already stay as they are.

    Args:
        config: as for `deepspeed.initialize`; says where the shards are kept.
        place: the device that computes.
    """
    # `zero.Init` reads the number of workers from DeepSpeed's own group, which is made on first use.
    deepspeed.init_distributed(verbose=False)
    first: nn.Parameter | None = None
    for parameter in module.parameters():
        if hasattr(parameter, "ds_id"):
            continue
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if first is None:
            first = parameter
            alone = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=alone, config_dict_or_path=config, dtype=torch.float32)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, buffer.to(place))
