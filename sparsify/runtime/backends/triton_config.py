"""Which kernel computes a product and with which tile, and the rule that chooses without measuring."""

from dataclasses import dataclass

from sparsify.formats import ModuleScheme

KINDS = ("gemv", "gemm", "decode")  # of a linear; "experts" are the tiles of gemm for the experts of a layer


@dataclass(frozen=True)
class Config:
    """How to compute one product. gemv: block_n outputs x block_k inputs per step; gemm: a tile and the number of
    programs that share the inputs; decode: tiles of the decoded weights, multiplied by PyTorch."""

    kind: str
    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int

    def tile_k(self, scheme: ModuleScheme) -> int:
        """Inputs per step: a tile never crosses a group of scales."""
        one_group = scheme.bits == 16 or scheme.group_size == scheme.shape[1]
        return self.block_k if one_group else min(self.block_k, scheme.group_size)

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{self.kind} {tile} splits {self.splits} warps {self.warps} stages {self.stages}"


def heuristic(rows: int, scheme: ModuleScheme, processors: int) -> Config:
    """A good configuration without measuring. processors: multiprocessors of the GPU.

    From 126 configurations on an H100 with the linears of models of 8 and 70 billion parameters: up to 64 rows the rule is within
    9% of the best. For 128 rows a tile of 128 would be up to 31% faster there, but spills registers on Ampere.
    """
    n, k = scheme.shape
    if rows == 1:
        return Config("gemv", 1, 16, 2048, 1, 8, 1)
    if rows == 2:
        return Config("gemv", 1, 32, 1024, 1, 8, 1)
    if rows > 128:
        return Config("decode", 1, 32, 256, 1, 4, 1)
    block_m = _tile_of(rows)
    block_n = 32 if block_m == 16 else 64
    tiles = -(-rows // block_m) * -(-n // block_n)
    # eight programs for each multiprocessor; each split writes and reads its sums once more
    most = max(1, min(8, 8 * processors // tiles, k // 512))
    return Config("gemm", block_m, block_n, 64, 1 << (most.bit_length() - 1), 2 if block_m < 64 else 4, 4)


def experts_config(entries: int, experts: int) -> Config:
    """The tile for the experts of a layer, from the rows that each has on average. entries: choices of experts, of all tokens.

    From 48 tiles on an H200 with 128 experts of 2048 x 768: within 2% of the best of them from 1 to 1024 tokens of 8
    experts each, within 18% with 4096. There are enough experts that none shares its inputs among programs.
    """
    few = entries <= 8 * experts
    return Config("experts", 16 if few else 32, 32 if few else 64, 64, 1, 2, 4)


def _tile_of(rows: int) -> int:
    """Rows of a tile: a power of two from 16 to 64."""
    return min(64, max(16, 1 << (rows - 1).bit_length()))
