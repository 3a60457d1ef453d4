"""The model: backbone, encoder, decoder, criterion, post-processing."""

from sparseinst.modeling.sparse_inst.criterion import (
    SPARSE_INST_CRITERION_REGISTRY,
    SparseInstCriterion,
    build_sparse_inst_criterion,
)
from sparseinst.modeling.sparse_inst.decoder import (
    SPARSE_INST_DECODER_REGISTRY,
    BaseIAMDecoder,
    GroupIAMDecoder,
    GroupIAMSoftDecoder,
    InstanceBranch,
    MaskBranch,
    build_sparse_inst_decoder,
)
from sparseinst.modeling.sparse_inst.encoder import (
    SPARSE_INST_ENCODER_REGISTRY,
    InstanceContextEncoder,
    build_sparse_inst_encoder,
)
from sparseinst.modeling.sparse_inst.matcher import (
    SPARSE_INST_MATCHER_REGISTRY,
    SparseInstMatcher,
    build_sparse_inst_matcher,
)
from sparseinst.modeling.sparse_inst.model import SparseInst
from sparseinst.modeling.sparse_inst.postprocessing import MaskMemoryError
from sparseinst.structures.targets import Detections, InstanceTargets, LossNormalizer, MatchedPairs

__all__ = [
    "SPARSE_INST_CRITERION_REGISTRY",
    "SPARSE_INST_DECODER_REGISTRY",
    "SPARSE_INST_ENCODER_REGISTRY",
    "SPARSE_INST_MATCHER_REGISTRY",
    "BaseIAMDecoder",
    "Detections",
    "GroupIAMDecoder",
    "GroupIAMSoftDecoder",
    "InstanceBranch",
    "InstanceContextEncoder",
    "InstanceTargets",
    "LossNormalizer",
    "MaskBranch",
    "MaskMemoryError",
    "MatchedPairs",
    "SparseInst",
    "SparseInstCriterion",
    "SparseInstMatcher",
    "build_sparse_inst_criterion",
    "build_sparse_inst_decoder",
    "build_sparse_inst_encoder",
    "build_sparse_inst_matcher",
]
