"""The GPUs of the tables, and how many blocks of a kernel one of their multiprocessors holds.

Limits by compute capability: CUDA C++ Programming Guide, technical specifications.
"""

from dataclasses import dataclass

WARP = 32


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    multiprocessors: int
    shared: int  # bytes of a multiprocessor
    shared_block: int  # bytes that a block may have
    warps: int = 64  # of a multiprocessor, as the two below
    blocks: int = 32
    registers: int = 65536

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that a multiprocessor holds."""
        warps = -(-threads // WARP)
        # A warp's registers come by 256, warps in fours; shared memory by 128 bytes, and 1 KB a block is the system's.
        of_warp = -(-max(registers, 1) * WARP // 256) * 256
        by_registers = self.registers // of_warp // 4 * 4 // warps
        by_shared = self.shared // (-(-shared // 128) * 128 + 1024)
        return min(self.warps // warps, self.blocks, by_registers, by_shared)

    def occupancy(self, threads: int, registers: int, shared: int) -> float:
        """Share of the warps that a multiprocessor could hold."""
        return self.resident(threads, registers, shared) * -(-threads // WARP) / self.warps


GPUS = (
    Gpu("A100", "sm80", 108, 164 << 10, 163 << 10),
    Gpu("H200", "sm90", 132, 228 << 10, 227 << 10),
)
