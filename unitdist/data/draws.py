"""Random numbers as a pure function of (seed, epoch, sample, purpose): no generator, no state, no order of calls.

A sample's augmentation is therefore the same whichever rank, thread or resumed process prepares it. The function is
SplitMix64: hash64 = mix(mix(state) + (sample_id + 1) * GOLDEN) with state mixed from seed, epoch and purpose,
all modulo 2^64.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Purposes of a draw. Their numbers are part of the result: never renumber, only append.
ORDER = 0
SCALE = 1
CROP_Y = 2
CROP_X = 3
FLIP = 4
REPLACEMENT = 5
BLOCK_ORDER = 6
ERASE = 7
ERASE_AREA = 8
ERASE_ASPECT = 9
ERASE_Y = 10
ERASE_X = 11
AREA = 100  # 100..109: one per attempt
ASPECT = 120  # 120..129
OPERATION = 140  # 140..149: one per RandAugment operation

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """SplitMix64's finalizer on one Python int."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def hash64(seed: int, epoch: int, sample_ids: Ints, purpose: int) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit numbers, one per sample id, independent between seeds, epochs, samples and purposes."""
    state = 0
    for part in (seed, epoch, purpose):
        state = _mix((state + (part + 1) * _GOLDEN) & _MASK)
    value = (sample_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(_mix(state))
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniform(seed: int, epoch: int, sample_ids: Ints, purpose: int) -> Floats:
    """float64 in [0, 1), a multiple of 2^-53, one per sample id."""
    return (hash64(seed, epoch, sample_ids, purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integer(seed: int, epoch: int, sample_ids: Ints, purpose: int, count: Ints | int) -> Ints:
    """int64 uniform in [0, count), count >= 1 for all samples or one per sample."""
    return np.floor(uniform(seed, epoch, sample_ids, purpose) * count).astype(np.int64)
