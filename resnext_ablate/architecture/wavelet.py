"""A wavelet matrix: counts and selects by value within any run of a sequence.

"The wavelet matrix: An efficient wavelet tree for large alphabets", Information
Systems 47 (2015), 15-32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resnext_ablate.architecture.costs import Ints


@dataclass(frozen=True, slots=True)
class WaveletMatrix:
    """Ranks below 2**bits, such that counting and selecting in runs is quick."""

    zeros: tuple[NDArray[np.int32], ...]
    """Of each bit from the highest: how many 0 stand before a place, (n + 1,)."""

    @classmethod
    def of(cls, ranks: Ints) -> WaveletMatrix:
        """The matrix of n different ranks below n."""
        levels = []
        for bit in range(len(ranks).bit_length() - 1, -1, -1):
            is_one = (ranks >> bit & 1).astype(bool)
            zeros = np.zeros(len(ranks) + 1, np.int32)
            np.cumsum(~is_one, out=zeros[1:])
            levels.append(zeros)
            ranks = np.concatenate([ranks[~is_one], ranks[is_one]])
        return cls(tuple(levels))

    def count_below(self, low: Ints, high: Ints, limits: Ints) -> Ints:
        """How many ranks in low .. high - 1 lie below a limit, for each query."""
        counts = np.zeros_like(low)
        for bit, zeros in zip(self._bits(), self.zeros, strict=True):
            first, last = zeros[low], zeros[high]
            is_one = (limits >> bit & 1).astype(bool)
            counts += np.where(is_one, last - first, 0)
            low = np.where(is_one, zeros[-1] + low - first, first)
            high = np.where(is_one, zeros[-1] + high - last, last)
        return counts

    def quantile(self, low: Ints, high: Ints, ordinals: Ints) -> Ints:
        """The rank that stands at a place when low .. high - 1 are sorted."""
        ranks = np.zeros_like(low)
        for bit, zeros in zip(self._bits(), self.zeros, strict=True):
            first, last = zeros[low], zeros[high]
            is_one = ordinals >= last - first
            ordinals = np.where(is_one, ordinals - (last - first), ordinals)
            ranks |= is_one.astype(np.int64) << bit
            low = np.where(is_one, zeros[-1] + low - first, first)
            high = np.where(is_one, zeros[-1] + high - last, last)
        return ranks

    def _bits(self) -> range:
        return range(len(self.zeros) - 1, -1, -1)
