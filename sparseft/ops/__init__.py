"""The ops: one file each, opening with its plain-torch definition, then registration, then the
public function.

Importing this package registers the ops under ``torch.ops.sparseft``; it touches no device and
imports no Triton.
"""

from sparseft.ops._backend import backend, current_backend, resolve_backend
from sparseft.ops.apply_diff import (
    apply_diff_,
    gather_entries,
    sum_entries,
    undo_,
    write_entries,
    write_entries_,
    write_sum,
    write_sum_,
)
from sparseft.ops.compose import compose_diffs, pack_diffs
from sparseft.ops.low_rank import low_rank_approximation
from sparseft.ops.residual import difference_, prune_residual_
from sparseft.ops.sampled_grad import sampled_embedding_grad, sampled_weight_grad
from sparseft.ops.sparse_step import adamw_step_, lion_step_, sgd_step_
from sparseft.ops.spmm import RowGroups, spmm
from sparseft.ops.spmm_embedding import embedding_diff
from sparseft.ops.streaming_topk import StreamingTopK
from sparseft.ops.svd_plan import SvdChunk, SvdPlan, plan_svd
from sparseft.ops.topk import TopK, topk_differences, topk_patterns, topk_single
from sparseft.ops.truncated_svd import TruncatedSVD, truncated_svd

__all__ = [
    "RowGroups",
    "StreamingTopK",
    "SvdChunk",
    "SvdPlan",
    "TopK",
    "TruncatedSVD",
    "adamw_step_",
    "apply_diff_",
    "backend",
    "compose_diffs",
    "current_backend",
    "difference_",
    "embedding_diff",
    "gather_entries",
    "lion_step_",
    "low_rank_approximation",
    "pack_diffs",
    "plan_svd",
    "prune_residual_",
    "resolve_backend",
    "sampled_embedding_grad",
    "sampled_weight_grad",
    "sgd_step_",
    "spmm",
    "sum_entries",
    "topk_differences",
    "topk_patterns",
    "topk_single",
    "truncated_svd",
    "undo_",
    "write_entries",
    "write_entries_",
    "write_sum",
    "write_sum_",
]
