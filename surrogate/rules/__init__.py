"""Selection rules, one file each: scores in, an order of the pool out."""
