"""From files in S3 to shards of tokens: readers -> formats -> templates -> tokenise -> shards, row by row."""
