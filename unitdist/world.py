"""Who this process is among all processes of the job, read once from the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from unitdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and size of the job as the launcher announced them.

    Fields: `rank` in [0, size), `local_rank` in [0, local_size) on this node, `size` processes in the
    job, `local_size` processes on this node.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise ConfigError(
                f"the launcher announced an impossible world: RANK={self.rank} WORLD_SIZE={self.size} "
                f"LOCAL_RANK={self.local_rank} LOCAL_WORLD_SIZE={self.local_size}"
            )

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone prints and writes what all ranks share."""
        return self.rank == 0

    @classmethod
    def single(cls) -> "World":
        """The world of one process."""
        return cls(rank=0, local_rank=0, size=1, local_size=1)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "World":
        """Read torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE); none: one process.

        accelerate and deepspeed set the same names; deepspeed leaves LOCAL_SIZE instead of
        LOCAL_WORLD_SIZE. Raises ConfigError when they are incomplete or not numbers.
        """
        env = os.environ if environment is None else environment
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return cls.single()
        missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in env]
        if missing:
            raise ConfigError(
                f"the environment names only part of a distributed job: {', '.join(missing)} missing; "
                "start with torchrun, accelerate launch or deepspeed"
            )
        try:
            size = int(env["WORLD_SIZE"])
            local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or size)
            return cls(rank=int(env["RANK"]), local_rank=int(env["LOCAL_RANK"]), size=size, local_size=local_size)
        except ValueError as error:
            raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from None
