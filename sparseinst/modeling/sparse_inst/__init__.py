"""SparseInst (CVPR 2022, arXiv 2203.12827)."""
