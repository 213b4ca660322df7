"""From a pile of images to a registered model: shard, train, evaluate, sample, register."""
