"""Learning what a quantized network needs: rotations, affine transforms, clips, weights and scales."""
