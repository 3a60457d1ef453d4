from sparseinst.modeling.sparse_inst.decoder import SPARSE_INST_DECODER_REGISTRY, GroupIAMDecoder


@SPARSE_INST_DECODER_REGISTRY.register()
class SharpDecoder(GroupIAMDecoder):
    """Make mask probabilities steeper at the boundary."""

    def forward(self, features, with_iams=False):  # (B, C, H, W)
        outputs = super().forward(features, with_iams)
        outputs["pred_masks"] = 2 * outputs["pred_masks"]  # (B, N, Hm, Wm), logits
        return outputs
