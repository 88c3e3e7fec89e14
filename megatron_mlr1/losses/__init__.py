"""Mathematics of a group: an op, a mask and a reduction over a group that is handed in."""
