"""What ranks exchange besides the collectives of `d2v.train.distributed`."""
