"""Engines: what runs `score_shard` over many shards; one file each."""
