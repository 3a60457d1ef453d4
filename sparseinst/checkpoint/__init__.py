"""Read weights files safely, rename their tensors for the model, load them and report the coverage."""

from sparseinst.checkpoint.atomic_write import OutputError, write_atomically, write_text_atomically
from sparseinst.checkpoint.checkpointer import SparseInstCheckpointer, checkpointer_from_config
from sparseinst.checkpoint.coverage import Coverage, measure_coverage
from sparseinst.checkpoint.entries import extract_tensors
from sparseinst.checkpoint.files import WeightsFileError, read_weights_file
from sparseinst.checkpoint.locations import check_weights_file, find_weights
from sparseinst.checkpoint.names import convert, describe_names, family_of

__all__ = [
    "Coverage",
    "OutputError",
    "SparseInstCheckpointer",
    "WeightsFileError",
    "check_weights_file",
    "checkpointer_from_config",
    "convert",
    "describe_names",
    "extract_tensors",
    "family_of",
    "find_weights",
    "measure_coverage",
    "read_weights_file",
    "write_atomically",
    "write_text_atomically",
]
