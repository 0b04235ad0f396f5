"""An error that one rank met, raised by all ranks together."""

import torch.distributed as dist

from unitdist.errors import UnitdistError


def raise_first(own: UnitdistError | None, group: dist.ProcessGroup | None = None) -> None:
    """Called by all ranks of the group (None: the whole job), each with its own error or None: every rank raises the first
    failing rank's error, which that rank prints. Returns where no rank has failed."""
    outcomes: list[tuple[type[UnitdistError], str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, None if own is None else (type(own), str(own)), group=group)
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            kind, message = outcome
            agreed_error = kind(message)
            agreed_error.speaker = rank
            raise agreed_error from own
