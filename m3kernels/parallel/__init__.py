"""Parts of a parallel model that know no model: the mesh, the collectives, and what is sharded over the vocabulary.

Importing this registers how the ops are sharded for models of DTensors (:mod:`m3kernels.parallel.sharding_rules`).
"""

from m3kernels.parallel import sharding_rules
from m3kernels.parallel.collectives import (
    all_gather_tokens,
    all_reduce_max,
    all_reduce_sum,
    copy_to_ranks,
    rank_in,
    reduce_scatter_tokens,
    size_of,
)
from m3kernels.parallel.cross_entropy import vocab_parallel_linear_cross_entropy
from m3kernels.parallel.embedding import vocab_parallel_embedding
from m3kernels.parallel.local import linear, linears, local, summed_together
from m3kernels.parallel.mesh import ParallelError, group_of, make_mesh

__all__ = [
    "ParallelError",
    "all_gather_tokens",
    "all_reduce_max",
    "all_reduce_sum",
    "copy_to_ranks",
    "group_of",
    "linear",
    "linears",
    "local",
    "make_mesh",
    "rank_in",
    "reduce_scatter_tokens",
    "size_of",
    "summed_together",
    "vocab_parallel_embedding",
    "vocab_parallel_linear_cross_entropy",
]

sharding_rules.register()
