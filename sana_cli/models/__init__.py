"""The networks: a plain module for each paper, and the fused form that runs."""
