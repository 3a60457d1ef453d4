"""Define tuples and masks that all packages share, and the letters that docstrings use for shapes.

Letters
    B   images in a batch
    N   predictions for each image (SparseInst: instance activation maps)
    G   groups: activation maps for each instance
    M   ground-truth instances of one image
    K   classes
    C   channels
    D   dimension of mask kernels and mask features
    H, W    the decoder's grid
    Hm, Wm  the mask grid

Sizes are (height, width). Names with ``_logits`` hold values before the sigmoid, names with ``_probs`` values after it.
Names with ``_masks`` and neither of these are boolean, except targets, which are fractions in [0, 1].
"""
