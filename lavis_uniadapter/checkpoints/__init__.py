"""Files of weights: BLIP checkpoints, the released layout, adapter folders."""
