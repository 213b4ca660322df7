"""Shards and their manifest: written once by the stage `shard`, read by every stage after it."""

from pipeline.shards.cache import BlockCache
from pipeline.shards.manifest import SHARD_BYTES, SPLITS, Manifest, Shard, SourceFacts, Split
from pipeline.shards.reader import WINDOW_BYTES, ShardReader
from pipeline.shards.writer import STATES, odd_list_of, refuse_or_skip, write_shards

__all__ = [
    "SHARD_BYTES",
    "SPLITS",
    "STATES",
    "WINDOW_BYTES",
    "BlockCache",
    "Manifest",
    "Shard",
    "ShardReader",
    "SourceFacts",
    "Split",
    "odd_list_of",
    "refuse_or_skip",
    "write_shards",
]
