"""Example of a decoder of your own: import it by --import demo/my_decoder.py, or by IMPORTS in a config."""

import torch

from sparseinst.modeling.sparse_inst.decoder import SPARSE_INST_DECODER_REGISTRY, GroupIAMDecoder


@SPARSE_INST_DECODER_REGISTRY.register()
class SharpDecoder(GroupIAMDecoder):
    """Make mask probabilities steeper at the boundary."""

    def forward(self, features: torch.Tensor, with_iams: bool = False) -> dict[str, torch.Tensor]:
        """Decode the encoder's map (B, C, H, W)."""
        outputs = super().forward(features, with_iams)
        outputs["pred_masks"] = 2 * outputs["pred_masks"]  # (B, N, Hm, Wm), logits
        return outputs
