"""A frozen teacher served to a training job: what is asked, the wire, and the pool of replicas.

Nothing here imports Megatron or Transformer Engine: a replica runs where neither is installed.
"""
