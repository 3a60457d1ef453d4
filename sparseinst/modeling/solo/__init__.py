"""SOLO and Decoupled SOLO (ECCV 2020, arXiv 1912.04488), SOLOv2 (NeurIPS 2020, arXiv 2003.10152)."""
